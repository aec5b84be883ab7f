"""The benchmark of watches: what is composed, who is right, and its command."""

import json
import random

import pytest
from PIL import Image

from flash_vstream.bench.watches import EACH, FRAMES, METHODS, SCENES, compose, watch_stream
from flash_vstream.evaluate.pictures import LEAST_PICTURES
from flash_vstream.models.event_score import EventScorer
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.annotations import Annotation
from flash_vstream.synthetic.presence import Things
from helpers.cli import run


def annotation(number: int) -> Annotation:
    dog = number % 3 == 0
    objects = ("brown dog",) if dog else ("red ball",)
    texts = ("A dog runs.", "A dog on grass") if dog else ("A ball lies there.", "A ball on a floor")
    caption, short = texts[0], f"{texts[1]} {number}"
    return Annotation(f"{number:02}.jpg", caption, short, "garden", int(dog), objects, ())


@pytest.fixture
def made():
    return Things({own.key: own for own in map(annotation, range(60))}, {}, LEAST_PICTURES)


def shown(key: str) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), (int(key[:2]) * 4, 0, 0))] * 6


def test_events_are_there_when_their_scenes_are(made):
    keys = [f"{number:02}.jpg" for number in (1, 3, 6, 2, 9)]  # ball, dog, dog, ball, dog
    composed = compose(keys, shown, made, random.Random(0))
    assert len(composed.frames) == 30
    people, *_ = [event for event in composed.events if event.kind == "people"]
    assert people.times == ((6, 17), (24, 29))
    things = {event.text: event.times for event in composed.events if event.kind == "thing"}
    assert things == {"a dog": ((6, 17), (24, 29)), "a ball": ((0, 5), (18, 23))}
    scenes = [event for event in composed.events if event.kind == "scene"]
    assert len({event.text for event in scenes}) == len(scenes) == EACH
    for event in scenes:
        ((begin, end),) = event.times
        number = int(keys[int(begin) // 6][:2])
        assert (end - begin, event.text) == (
            5,
            f"{'a dog on grass' if number % 3 == 0 else 'a ball on a floor'} {number}",
        )


class Knowing(EventScorer):
    """Knows when an event is there; the language model's word is ``agrees``."""

    def __init__(self, generator, composed):
        super().__init__(generator)
        self.times = {event.text: event.times for event in composed.events}
        self.agrees = True

    is_cheap = True

    def score(self, event, snapshot):
        self.now = snapshot.time
        return float(any(begin <= self.now <= end for begin, end in self.times[event.text]))

    def likelihood(self, event, prefix):
        return float(self.agrees and any(begin <= self.now <= end for begin, end in self.times[event.text]))


def test_who_knows_is_right_and_who_refuses_tells_nothing(made, tiny):
    pipeline = FlashVStream(*tiny)
    composed = compose([f"{number:02}.jpg" for number in (1, 3, 2)], shown, made, random.Random(1))
    scorer = Knowing(pipeline.generator, composed)
    seconds = dict.fromkeys(METHODS, 0.0)
    for score in watch_stream(pipeline, scorer, composed, seconds).values():
        assert (score.precision, score.recall, score.median_delay) == (1, 1, 1)
    assert all(value > 0 for value in seconds.values())
    scorer.agrees = False
    scores = watch_stream(pipeline, scorer, composed, seconds)
    assert {(score.told, score.recall) for score in scores.values()} == {(0, 0)}


def test_the_command_compares_both_methods(tiny_folder, tmp_path):
    rows = []
    for number in range(30):
        own = annotation(number)
        shown(own.key)[0].save(tmp_path / own.key)
        row = {"image": own.key, "caption": own.caption, "short": own.short, "place": own.place}
        rows.append(row | {"people": own.people, "objects": own.objects, "qa": []})
    (tmp_path / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "splits.json").write_text(json.dumps({"val": [row["image"] for row in rows], "few": ["00.jpg"]}))
    command = ["eval", "watches", "--data", tmp_path, "--model", tiny_folder, "--streams", "1"]
    report = json.loads(run(*command, "--json").stdout)
    rows = {(row["method"], row["kind"]): row for row in report["rows"]}
    assert {method for method, _ in rows} == set(METHODS)
    for kind in ("thing", "people", "scene"):
        assert rows[METHODS[0], kind]["events"] == rows[METHODS[1], kind]["events"] > 0
    assert rows[METHODS[0], "all"]["events"] == sum(
        rows[METHODS[0], kind]["events"] for kind in ("thing", "people", "scene")
    )
    assert SCENES * FRAMES[0] * 5 <= report["looks"] <= SCENES * FRAMES[1] * 5
    for wrong in (["--split", "few"], ["--split", "none"]):
        result = run(*command, *wrong)
        assert (result.returncode, "a stream takes 10" in result.stderr) == (2, True)
