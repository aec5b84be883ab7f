"""Training data are validated before the first step: one error counts and lists all problems."""

import json

import pytest

from flash_vstream.errors import UserError
from flash_vstream.train.llava import checked_entries

GOOD = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a dog"}]


def errors_of(tmp_path, entries) -> str:
    path = tmp_path / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    with pytest.raises(UserError) as caught:
        checked_entries(path, tmp_path)
    return str(caught.value)


def test_good_entries_pass(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": GOOD}, {"image": "a.png", "conversations": GOOD}]))
    assert len(checked_entries(path, tmp_path)) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "entry 1 is no object"),
        ({"id": "x"}, "entry x needs conversations"),
        ({"id": "x", "conversations": {"human": "what?"}}, "entry x needs conversations"),
        ({"id": "x", "conversations": [{"from": "human"}]}, "entry x needs conversations"),
        ({"id": "x", "conversations": GOOD[:1]}, "sample x has no question with an answer"),
        ({"id": "x", "conversations": GOOD, "image": ["a.png"]}, "image must be one path"),
        ({"id": "x", "conversations": GOOD, "image": "none.png"}, "no file"),
        ({"id": "x", "conversations": GOOD, "video": "empty.mp4"}, "is empty"),
        ({"id": "x", "conversations": GOOD, "features": "none.safetensors:a"}, "no file"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path, entry, message):
    (tmp_path / "empty.mp4").write_bytes(b"")
    error = errors_of(tmp_path, [{"conversations": GOOD}, entry])
    assert message in error
    assert "1 of 2 entries" in error


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_files_of_another_shape_are_named(tmp_path, text):
    assert "data.json" in errors_of(tmp_path, text)


def test_many_problems_are_counted_and_some_shown(tmp_path):
    error = errors_of(tmp_path, [{"id": i, "conversations": GOOD, "image": f"{i}.png"} for i in range(30)])
    assert "30 of 30 entries" in error
    assert "and 20 more" in error
