"""Training data are validated before the first step: one error counts and lists all problems."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flash_vstream.errors import UserError
from flash_vstream.train.llava import LlavaSamples, checked_entries


def folders_of(folder):
    return dict.fromkeys(("features", "image", "video"), folder)


GOOD = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a dog"}]


def errors_of(tmp_path, entries) -> str:
    path = tmp_path / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    with pytest.raises(UserError) as caught:
        checked_entries(path, folders_of(tmp_path))
    return str(caught.value)


def test_good_entries_pass(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": GOOD}, {"image": "a.png", "conversations": GOOD}]))
    assert len(checked_entries(path, folders_of(tmp_path))) == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_data_in_any_of_jsons_encodings_are_read(tmp_path, encoding):
    path = tmp_path / "data.json"
    path.write_bytes(json.dumps([{"conversations": GOOD}]).encode(encoding))
    assert checked_entries(path, folders_of(tmp_path))[0]["conversations"] == GOOD


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "entry 1 is no object"),
        ({"id": "x"}, "entry x needs conversations"),
        ({"id": "x", "conversations": {"human": "what?"}}, "entry x needs conversations"),
        ({"id": "x", "conversations": [{"from": "human"}]}, "entry x needs conversations"),
        ({"id": "x", "conversations": GOOD[:1]}, "sample x has no question with an answer"),
        ({"id": "x", "conversations": GOOD, "image": ["a.png"]}, "image must be one path"),
        ({"id": "x", "conversations": GOOD, "image": ""}, "image must be one path"),
        ({"id": "x", "conversations": GOOD, "image": "folder"}, "folder is a folder"),
        ({"id": "x", "conversations": GOOD, "image": "x" * 5000}, "entry x: cannot read xxx"),
        ({"id": "x", "conversations": GOOD, "image": "none.png"}, "no file"),
        ({"id": "x", "conversations": GOOD, "video": "empty.mp4"}, "is empty"),
        ({"id": "x", "conversations": GOOD, "features": "none.safetensors:a"}, "no file"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path, entry, message):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
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


def test_features_stored_for_a_medium_stand_in_for_it(tmp_path):
    """The paper's authors kept pictures' and videos' features in two folders, under the media's own names."""
    for folder in ("image_features", "video_features"):
        (tmp_path / folder / "a").mkdir(parents=True)
        save_file({"feature": torch.ones(2, 64, 32)}, tmp_path / folder / "a" / "1.safetensors")
    entries = [{"image": "a/1.jpg", "conversations": GOOD}, {"video": "a/1.mp4", "conversations": GOOD}]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    seen = []

    def encode(path):
        seen.append(path.relative_to(tmp_path).as_posix())
        return torch.ones(2, 64, 32), torch.arange(2)

    samples = LlavaSamples(tmp_path / "data.json", tmp_path, encode, images="image_features", videos="video_features")
    assert [len(samples[i].features) for i in range(2)] == [2, 2]
    assert seen == ["image_features/a/1.safetensors", "video_features/a/1.safetensors"]
