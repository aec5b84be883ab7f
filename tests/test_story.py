"""The story of a stream: which questions ask for it, which scenes it has, and how it is put together."""

from types import SimpleNamespace

import pytest
import torch

from flash_vstream.memory import Slots
from flash_vstream.models import story
from flash_vstream.models.answer import Answer, Evidence
from flash_vstream.models.engines import Feed
from flash_vstream.models.story import asks_for_story, scene_starts, tell

STORY = Slots.of_frames(torch.eye(4)[:3, None], torch.tensor([0.0, 4.0, 70.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "question",
    [
        "What happened?",
        "What has happened so far?",
        "Tell me what has happened so far.",
        "What did I miss?",
        "What have you seen until now?",
        "Summarize the video in order.",
        "Please give me a short summary.",
        "Tell me everything that you have seen so far, from the first scene to the last.",
        "Describe everything you saw",
        "List the events.",
        "what happened in this video?",
        "Describe the video.",
    ],
)
def test_a_story_is_asked_for(question):
    assert asks_for_story(question)


@pytest.mark.parametrize(
    "question",
    [
        "What happened first?",
        "What happened at 12s?",
        "What happened before the dog ran?",
        "What do you see?",
        "Describe the scene.",
        "How many people have you seen so far?",
        "Tell me everything about the dog.",
        "",
    ],
)
def test_other_questions_ask_for_no_story(question):
    assert not asks_for_story(question)


def seen(*angles: float) -> Slots:
    """Slots a second apart that look in directions of so many degrees."""
    radians = torch.deg2rad(torch.tensor(angles))
    features = torch.stack([radians.cos(), radians.sin()], 1)[:, None].expand(-1, 4, -1)
    return Slots.of_frames(features, torch.arange(len(angles), dtype=torch.float64))


@pytest.mark.parametrize(
    ("angles", "most", "starts"),
    [
        ((0,), 8, [0]),
        ((0, 20, 40, 20), 8, [0]),  # cosines of 0.94
        ((0, 10, 90, 95, 180), 8, [0, 2, 4]),
        ((0, 90, 145, 235), 8, [0, 1, 2, 3]),
        ((0, 90, 145, 235), 3, [0, 1, 3]),  # 90 and 145 degrees are the most alike
        ((0, 90, 145, 235), 1, [0]),
        ((0, 90), 0, [0]),
    ],
)
def test_neighbours_that_look_alike_are_one_scene(angles, most, starts):
    assert scene_starts(seen(*angles), most) == starts


class Speaker:
    """Answers questions by prepared texts, each word a token; ``asked`` are the questions."""

    def __init__(self, *texts: str):
        self.texts, self.asked = list(texts), []

    def ask(self, question: str, max_new_tokens: int) -> Answer:
        answer = Answer(question, None, True)
        answer._work = self._work(answer, self.texts[len(self.asked)].split(), max_new_tokens)
        self.asked.append(question)
        return answer

    def _work(self, answer, words, most):
        for word in words[:most]:
            assert (yield Feed(None, [0])) == "row"
            answer.text += f" {word}" if answer.text else word
            answer.tokens += 1
            yield word
        answer.finish_reason = "stop" if len(words) <= most else "length"
        slots = (0.0, 4.0) if "cat" in words else (0.0,)
        answer.evidence = [Evidence("temporal", start, start, start, 1.0, 0.5) for start in slots]


def told(speaker: Speaker, most: int = 192, stop: tuple[str, ...] = ()) -> SimpleNamespace:
    """The ``answer`` that the speaker's texts make, its ``pieces``, and how many ``feeds`` they took."""
    answer, pieces, feeds, row = Answer("What happened?", None, True), [], 0, None
    work = tell(speaker.ask, answer, STORY, most, stop, 0.0)
    while True:
        try:
            event = work.send(row)
        except StopIteration:
            return SimpleNamespace(answer=answer, pieces=pieces, feeds=feeds)
        row = None if isinstance(event, str) else "row"
        if isinstance(event, str):
            pieces.append(event)
        else:
            feeds += 1


def test_each_scene_is_asked_about_and_told_with_its_time():
    speaker = Speaker("A dog runs.", "A cat sleeps.", "Rain falls.")
    found = told(speaker)
    assert speaker.asked == ["What happened at 0s?", "What happened at 4s?", "What happened at 70s?"]
    assert found.pieces == ["0s: A", " dog", " runs.", " 4s: A cat", " sleeps.", " 70s: Rain", " falls."]
    assert found.answer.text == "".join(found.pieces) == "0s: A dog runs. 4s: A cat sleeps. 70s: Rain falls."
    assert (found.answer.tokens, found.feeds, found.answer.finish_reason) == (8, 8, "stop")
    assert [(slot.start, slot.share) for slot in found.answer.evidence] == [(0.0, 0.5), (4.0, pytest.approx(1 / 6))]


def test_the_speed_is_that_after_the_first_token(monkeypatch):
    monkeypatch.setattr(story, "time", SimpleNamespace(perf_counter=iter([10.0, 14.0]).__next__))
    answer = told(Speaker("A dog runs.", "A cat sleeps.", "Rain falls.")).answer
    assert (answer.first_token_seconds, answer.tokens_per_second) == (10.0, 7 / 4)
    monkeypatch.setattr(story, "time", SimpleNamespace(perf_counter=iter([10.0, 14.0]).__next__))
    assert told(Speaker("A dog runs."), most=1).answer.tokens_per_second is None


def test_what_goes_on_is_told_once():
    found = told(Speaker("A dog runs.", "A dog runs.", "Rain falls."))
    assert found.answer.text == "".join(found.pieces) == "0s: A dog runs. 70s: Rain falls."
    found = told(Speaker("A dog runs.", "A dog", "A dog runs."))
    assert found.answer.text == "".join(found.pieces) == "0s: A dog runs. 4s: A dog 70s: A dog runs."


def test_a_story_ends_at_its_most_tokens():
    found = told(Speaker("A dog runs.", "A cat sleeps."), most=5)
    assert (found.answer.text, found.answer.finish_reason) == ("0s: A dog runs.", "stop")  # room for one scene
    found = told(Speaker("A " + "very " * 60 + "long dog.", ""), most=48)
    assert (found.answer.tokens, found.answer.finish_reason) == (48, "length")


def test_a_story_ends_before_what_stops_it():
    found = told(Speaker("A dog runs.", "A cat sleeps.", "Rain falls."), stop=("sleeps",))
    assert found.answer.text == "".join(found.pieces) == "0s: A dog runs. 4s: A cat "
    assert found.answer.finish_reason == "stop"
    found = told(Speaker("A dog runs.", "A cat sleeps.", "Rain falls."), stop=("s. 5s", "falls..."))
    assert found.answer.text == "".join(found.pieces) == "0s: A dog runs. 4s: A cat sleeps. 70s: Rain falls."
