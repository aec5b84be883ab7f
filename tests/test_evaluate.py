"""Benchmark readers, and grading answers about composed streams."""

import random

import pytest
import torch

from flash_vstream.errors import UserError
from flash_vstream.evaluate.baselines import MemoryMethod
from flash_vstream.evaluate.skills import GradedAnswer, summary
from flash_vstream.models import FlashVStreamProcessor
from flash_vstream.synthetic.grading import described_picture, is_correct, stated_time
from flash_vstream.synthetic.plans import StreamStyle, plan_stream
from flash_vstream.synthetic.questions import ASKERS, Question
from flash_vstream.synthetic.texts import yes_or_no
from helpers.captions import CAPTIONS, EVENTS


def read(name, model, features, times):
    method = MemoryMethod(name, model)
    for feature, moment in zip(features, times.tolist(), strict=True):
        method.write(moment, feature)
    return method.snapshot()


@pytest.fixture
def features(goldens):
    return goldens["offline.features"][:40], torch.arange(40).double()


@pytest.mark.parametrize(
    ("name", "times"), [("recent:4", [36, 37, 38, 39]), ("uniform:4", [0, 13, 26, 39]), ("uniform:1", [0])]
)
def test_baselines_keep_the_frames_they_name(tiny, features, name, times):
    snapshot = read(name, tiny[0], *features)
    assert snapshot.temporal.start.tolist() == times
    assert snapshot.frames == len(times)


def test_memories_without_a_part(tiny, features):
    whole = read("star", tiny[0], *features)
    for part in ("abstract", "temporal", "retrieved", "spatial"):
        snapshot = read(f"star-{part}", tiny[0], *features)
        assert len(getattr(snapshot, part)) == 0
        assert len(snapshot.tokens()) == len(whole.tokens()) - getattr(whole, part).features.flatten(0, 1).shape[0]
    assert read("blind", tiny[0], *features) is None


def test_times_are_left_out_of_the_prompt_alone(tiny, features):
    model, processor = tiny
    whole = read("star", model, *features)
    assert torch.equal(read("star-times", model, *features).tokens(), whole.tokens())
    assert not MemoryMethod("star-times", model).time_stamps
    assert MemoryMethod("star-spatial", model).time_stamps
    timed = FlashVStreamProcessor(processor.image_processor, processor.tokenizer, time_stamps=True)
    assert len(timed.prefix_ids(whole)) > len(timed.prefix_ids(whole, time_stamps=False))
    assert timed.prefix_ids(whole, time_stamps=False) == processor.prefix_ids(whole)


@pytest.mark.parametrize("name", ["sta", "recent", "recent:0", "recent:x", "star-nothing", "uniform:-1"])
def test_unknown_memories_are_refused(tiny, name):
    with pytest.raises(UserError, match="no memory"):
        MemoryMethod(name, tiny[0])


def test_right_answers_are_right_and_wrong_ones_are_not():
    for kind in ASKERS:
        if kind in ("story", "now"):
            continue
        for seed in range(60):
            rng = random.Random(seed)
            plan = plan_stream(EVENTS.keys, StreamStyle(scenes=(4, 6), frames=(2, 3)), rng)
            question = ASKERS[kind](plan, EVENTS, rng)
            assert question is not None
            assert is_correct(question, question.answers[0], plan, CAPTIONS), (question, plan)
            assert not is_correct(question, "", plan, CAPTIONS) or question.kind == "when-never"
            wrong = {"yes": "No.", "no": "Yes, at 3s."}.get(question.truth, "At 99s: A whale sings.")
            assert not is_correct(question, wrong, plan, CAPTIONS)


@pytest.mark.parametrize(
    ("answer", "said"), [("Yes.", "yes"), (" no, never", "no"), ("Nobody", None), ("Well, yes", None), ("", None)]
)
def test_yes_and_no_are_read_off_the_first_word(answer, said):
    assert yes_or_no(answer) == said


def test_times_and_pictures_are_read():
    assert stated_time("At 35s.") == 35
    assert stated_time("It was 4 s in.") == 4
    assert stated_time("At noon.") is None
    assert described_picture("a dog is running", ["dog-runs.jpg", "man-eats.jpg"], CAPTIONS) == "dog-runs.jpg"
    assert described_picture("zzz", ["dog-runs.jpg", "man-eats.jpg"], CAPTIONS) is None


def test_the_summary_counts_by_hand():
    def asked(kind, truth, answer, correct, far):
        return GradedAnswer(Question(kind, "?", ("x",), truth, (0, 1)), answer, correct, far)

    scores = summary(
        [
            asked("occurrence", "yes", "Yes.", True, True),
            asked("occurrence", "no", "Yes.", False, False),
            asked("when", "dog-runs.jpg", "At 1s.", True, True),
            asked("now", "dog-runs.jpg", "A dog runs outside.", True, False),
        ],
        CAPTIONS,
    )
    assert scores["occurrence"] == 0.5
    assert scores["far past"] == 1.0
    assert scores["now BLEU-4"] == pytest.approx(1.0)
    assert scores["share of yes"] == 1.0
    assert scores["questions"] == 4
