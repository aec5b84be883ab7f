"""Questions about composed streams: correct by construction, balanced and checkable."""

import math
import random
import re
from collections import Counter

import pytest

from flash_vstream.models.prompts import stamp
from flash_vstream.synthetic.events import as_event, first_visits
from flash_vstream.synthetic.plans import StreamStyle, plan_stream
from flash_vstream.synthetic.questions import ASKERS, NEVER, ask_occurred, stream_questions
from helpers.captions import CAPTIONS, EVENTS

STYLE = StreamStyle(scenes=(3, 8), frames=(1, 5), repeat=0.2, blank=0.2)
OF_EVENT = {as_event(text): key for key, texts in CAPTIONS.items() for text in texts}
OF_CAPTION = {text: key for key, texts in CAPTIONS.items() for text in texts}


def asked(kind: str, count: int = 300, style: StreamStyle = STYLE):
    for seed in range(count):
        rng = random.Random(seed)
        plan = plan_stream(EVENTS.keys, style, rng)
        question = ASKERS[kind](plan, EVENTS, rng)
        if question is not None:
            yield plan, question


def named(text: str) -> list[str]:
    """The pictures whose events a question names, in order of mention."""
    found = [(text.index(event), key) for event, key in OF_EVENT.items() if event in text]
    return [key for _, key in sorted(found)]


def scene_at(plan, time):
    return next(scene for scene in plan.scenes if scene.start <= time <= scene.end)


def test_a_time_that_is_asked_about_shows_its_scene():
    half_seconds = StreamStyle(scenes=(3, 8), frames=(2, 8), interval=0.5)
    for plan, question in asked("at", style=half_seconds):
        time = int(re.search(r"(\d+)s", question.text)[1])
        (scene,) = [scene for scene in plan.scenes if (scene.start, scene.end) == question.span]
        assert scene.start <= time <= scene.end or scene.end < math.ceil(scene.start)


def test_events_are_captions_inside_a_sentence():
    assert as_event("A dog runs.") == "a dog runs"
    assert as_event("Two men wait.") == "two men wait"
    assert as_event("BMX riders race.") == "BMX riders race"


def test_hard_negatives_are_the_most_similar():
    likely = EVENTS.likely("dog-runs.jpg")
    assert all("dog" in key or "runs" in key for key in likely[:8])
    assert "dog-runs.jpg" not in likely


def test_occurrence_is_true_and_balanced():
    truths = Counter()
    for plan, question in asked("occurrence", 600):
        (key,) = named(question.text)
        shown = {scene.key: scene for scene in reversed(plan.scenes)}
        assert (question.truth == "yes") == (key in shown)
        expected = f"Yes, at {stamp(shown[key].start)}." if key in shown else f"No. {NEVER}"
        assert question.answers == (expected,)
        truths[question.truth] += 1
    assert 0.42 < truths["yes"] / truths.total() < 0.58


def test_hard_occurrence_asks_of_what_is_like_what_was_seen():
    for seed in range(200):
        rng = random.Random(seed)
        plan = plan_stream(EVENTS.keys, STYLE, rng)
        question = ask_occurred(plan, EVENTS, rng, hard=True)
        if question.truth == "no":
            (key,) = named(question.text)
            shown = {scene.key for scene in plan.scenes}
            assert key not in shown
            assert any(key in [k for k in EVENTS.likely(of) if k not in shown][:12] for of in shown)


def test_order_and_validation_are_true_and_balanced():
    truths, places = Counter(), Counter()
    for plan, question in asked("validation", 600):
        start = {scene.key: scene.start for scene in first_visits(plan)}
        x, y = named(question.text)
        assert (question.truth == "yes") == (start[x] < start[y])
        assert question.answers[0].startswith("Yes, " if question.truth == "yes" else "No, ")
        truths[question.truth] += 1
    for plan, question in asked("order", 600):
        start = {scene.key: scene.start for scene in first_visits(plan)}
        pair = named(question.text)
        earlier = min(pair, key=start.__getitem__)
        assert question.truth == earlier
        assert question.answers[0].startswith(f"{stamp(start[earlier])}: ")
        places[pair.index(earlier)] += 1
    assert 0.42 < truths["yes"] / truths.total() < 0.58
    assert 0.42 < places[0] / places.total() < 0.58


def test_neighbours_in_time_are_the_right_ones():
    for plan, question in asked("beside"):
        keys = [scene.key for scene in plan.scenes]
        (key,) = named(question.text)
        step = -1 if question.kind == "before" else 1
        assert keys[keys.index(key) + step] == question.truth
        assert OF_CAPTION[question.answers[0]] == question.truth


@pytest.mark.parametrize(("kind", "place"), [("first", 0), ("last", -1), ("now", -1)])
def test_first_and_last_scenes(kind, place):
    for plan, question in asked(kind, 100):
        assert {OF_CAPTION[answer] for answer in question.answers} == {plan.scenes[place].key}


def test_times_name_the_scene():
    never = 0
    for plan, question in asked("when"):
        if question.truth == "never":
            assert question.answers == (NEVER,)
            assert named(question.text)[0] not in {scene.key for scene in plan.scenes}
            never += 1
            continue
        (key,) = named(question.text)
        time = int(question.answers[0].removeprefix("At ").removesuffix("s."))
        assert scene_at(plan, time).key == key
        assert question.span[0] <= time <= question.span[1]
    assert 60 < never < 130
    for plan, question in asked("at"):
        time = int("".join(c for c in question.text if c.isdigit()))
        assert scene_at(plan, time).key == OF_CAPTION[question.answers[0]]


def test_the_story_tells_scenes_in_order():
    for plan, question in asked("story", 50):
        story = question.answers[0]
        for scene in plan.scenes[-8:]:
            assert f"{stamp(scene.start)}: " in story


def test_questions_are_seeded_and_causal():
    for seed in range(30):
        plan = plan_stream(EVENTS.keys, STYLE, random.Random(seed))
        cut = plan.until(plan.duration * 0.6)
        mix = dict.fromkeys(ASKERS, 1.0)
        first, second = (stream_questions(cut, EVENTS, random.Random(1), mix, 12) for _ in range(2))
        assert first == second
        assert all(question.span[1] <= cut.duration for question in first)
