"""Questions about composed streams with their answers: VStream-QA's five kinds, and "when".

Every question carries what is needed to check its answer, so training, the score table and the
benchmark share one source.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from flash_vstream.models.prompts import stamp
from flash_vstream.synthetic.events import Events, as_event, first_visits
from flash_vstream.synthetic.plans import Scene, StreamPlan

NOW = (
    "What is happening now?",
    "What do you see right now?",
    "Describe what is happening.",
    "What is going on at the moment?",
    "What is in the picture now?",
    "Describe the scene.",
)
AT = (
    "What happened at {t}?",
    "What was happening at {t}?",
    "What did you see at {t}?",
    "Describe the scene at {t}.",
)
OCCURRED = (
    "Did this happen: {x}?",
    "Have you seen this: {x}?",
    "Was there a moment like this: {x}?",
    "Did you see {x}?",
    "Is it true that you saw {x}?",
)
FIRST = ("What happened first?", "How did it begin?", "What was the first thing that you saw?")
LAST = ("What happened last?", "What was the last thing that you saw?", "How did it end?")
BEFORE = ("What happened just before this: {x}?", "What did you see right before {x}?")
AFTER = ("What happened just after this: {x}?", "What did you see right after {x}?")
STORY = (
    "Tell me what has happened so far.",
    "What have you seen until now?",
    "Summarize the video in order.",
)
ORDER = (
    "What happened first: {x}, or {y}?",
    "Which came first: {x}, or {y}?",
    "What happened earlier: {x}, or {y}?",
)
VALID = (
    "Did this: {x}, happen before this: {y}?",
    "Did you see {x} before you saw {y}?",
    "Is it true that {x} came before {y}?",
)
WHEN = ("When did this happen: {x}?", "At what time did you see {x}?", "When was this: {x}?")
NEVER = "That did not happen."
NEVER_SHARE = 0.3
"""The share of "when" questions that are about an event that never happened."""


@dataclass(frozen=True)
class Turn:
    """A question and its answers; multiple answers are alternatives, each trained independently."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question of a ``kind`` with its answers, any of which is right.

    ``truth`` is what a grader compares: ``"yes"``, ``"no"``, or the key of the picture that the answer
    must describe (one of ``choices``, when the question offers its own). ``span`` is the part of the
    stream, in seconds, that the question is about.
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    truth: str
    span: tuple[float, float]
    choices: tuple[str, ...] = ()

    @property
    def turn(self) -> Turn:
        """The question as a training turn."""
        return Turn(self.text, self.answers)


Asker = Callable[[StreamPlan, Events, random.Random], "Question | None"]


def ask_now(plan: StreamPlan, events: Events, rng: random.Random) -> Question:
    """Scene summary: what is shown at the end of the plan."""
    scene = plan.scenes[-1]
    answers = tuple(rng.sample(events.captions[scene.key], min(2, len(events.captions[scene.key]))))
    return Question("now", rng.choice(NOW), answers, scene.key, (scene.start, scene.end))


def ask_at(plan: StreamPlan, events: Events, rng: random.Random) -> Question:
    """Action description: what was shown at a given time."""
    scene = rng.choice(plan.scenes)
    drawn = rng.randint(int(scene.start), int(scene.end))
    whole = math.ceil(scene.start)  # the first second that shows the scene
    time = max(drawn, whole) if whole <= scene.end else drawn
    answers = (events.describe(scene.key, rng),)
    return Question("at", rng.choice(AT).format(t=stamp(time)), answers, scene.key, (scene.start, scene.end))


def ask_occurred(plan: StreamPlan, events: Events, rng: random.Random, hard: bool | None = None) -> Question:
    """Event occurrence, half yes and half no; by default, half of the questions are hard."""
    hard = rng.random() < 0.5 if hard is None else hard
    kind = "occurrence-hard" if hard else "occurrence"
    if rng.random() < 0.5:
        scene = rng.choice(first_visits(plan))
        text = rng.choice(OCCURRED).format(x=as_event(events.describe(scene.key, rng)))
        return Question(kind, text, (f"Yes, at {stamp(scene.start)}.",), "yes", (scene.start, scene.end))
    absent = events.absent(plan, rng, hard)
    text = rng.choice(OCCURRED).format(x=as_event(events.describe(absent, rng)))
    return Question(kind, text, (f"No. {NEVER}",), "no", (plan.shots[0].time, plan.duration))


def ask_first(plan: StreamPlan, events: Events, rng: random.Random) -> Question:
    """Ordered narrative: the first scene."""
    return _describing("first", rng.choice(FIRST), plan.scenes[0], events, rng)


def ask_last(plan: StreamPlan, events: Events, rng: random.Random) -> Question:
    """Ordered narrative: the last scene."""
    return _describing("last", rng.choice(LAST), plan.scenes[-1], events, rng)


def ask_beside(plan: StreamPlan, events: Events, rng: random.Random) -> Question | None:
    """Ordered narrative: the scene before or after a described one."""
    visits = first_visits(plan)
    if len(visits) < 2 or len(visits) < len(plan.scenes):
        return None  # with repeats, "before" and "after" are ambiguous
    at = rng.randrange(len(visits) - 1)
    earlier, later = visits[at], visits[at + 1]
    if rng.random() < 0.5:
        text = rng.choice(BEFORE).format(x=as_event(events.describe(later.key, rng)))
        return _describing("before", text, earlier, events, rng)
    text = rng.choice(AFTER).format(x=as_event(events.describe(earlier.key, rng)))
    return _describing("after", text, later, events, rng)


def _describing(kind: str, text: str, scene: Scene, events: Events, rng: random.Random) -> Question:
    return Question(kind, text, (events.describe(scene.key, rng),), scene.key, (scene.start, scene.end))


def ask_story(plan: StreamPlan, events: Events, rng: random.Random) -> Question:
    """Ordered narrative: the last eight scenes with their times, the densest supervision of all kinds."""
    visits = plan.scenes[-8:]
    story = " ".join(f"{stamp(scene.start)}: {events.describe(scene.key, rng)}" for scene in visits)
    return Question("story", rng.choice(STORY), (story,), "", (visits[0].start, plan.duration))


def _pair(plan: StreamPlan, rng: random.Random) -> tuple[Scene, Scene] | None:
    visits = first_visits(plan)
    if len(visits) < 2:
        return None
    earlier, later = sorted(rng.sample(range(len(visits)), 2))
    return visits[earlier], visits[later]


def ask_order(plan: StreamPlan, events: Events, rng: random.Random) -> Question | None:
    """Which of two events came first; the answer repeats the event and its time."""
    pair = _pair(plan, rng)
    if pair is None:
        return None
    earlier, later = pair
    said = {scene.key: events.describe(scene.key, rng) for scene in pair}
    shown = [as_event(said[scene.key]) for scene in (pair if rng.random() < 0.5 else pair[::-1])]
    text = rng.choice(ORDER).format(x=shown[0], y=shown[1])
    answer = f"{stamp(earlier.start)}: {said[earlier.key]}"
    return Question("order", text, (answer,), earlier.key, (earlier.start, later.end), (earlier.key, later.key))


def ask_valid(plan: StreamPlan, events: Events, rng: random.Random) -> Question | None:
    """Sequence validation: whether one event came before another, half yes and half no."""
    pair = _pair(plan, rng)
    if pair is None:
        return None
    earlier, later = pair
    right = rng.random() < 0.5
    x, y = (earlier, later) if right else (later, earlier)
    text = rng.choice(VALID).format(x=as_event(events.describe(x.key, rng)), y=as_event(events.describe(y.key, rng)))
    answer = f"{'Yes' if right else 'No'}, {stamp(x.start)} is {'before' if right else 'after'} {stamp(y.start)}."
    return Question("validation", text, (answer,), "yes" if right else "no", (earlier.start, later.end))


def ask_when(plan: StreamPlan, events: Events, rng: random.Random) -> Question:
    """When an event first happened; with probability ``NEVER_SHARE``, one that never did."""
    if rng.random() < NEVER_SHARE:
        text = rng.choice(WHEN).format(x=as_event(events.describe(events.absent(plan, rng, False), rng)))
        return Question("when-never", text, (NEVER,), "never", (plan.shots[0].time, plan.duration))
    scene = rng.choice(first_visits(plan))
    text = rng.choice(WHEN).format(x=as_event(events.describe(scene.key, rng)))
    return Question("when", text, (f"At {stamp(scene.start)}.",), scene.key, (scene.start, scene.end))


ASKERS: dict[str, Asker] = {
    "now": ask_now,
    "at": ask_at,
    "occurrence": ask_occurred,
    "first": ask_first,
    "last": ask_last,
    "beside": ask_beside,
    "story": ask_story,
    "order": ask_order,
    "validation": ask_valid,
    "when": ask_when,
}
"""The question kinds by name."""


def caption_questions(plan: StreamPlan, events: Events, rng: random.Random, past_answers: int = 1) -> list[Question]:
    """Stage 1: what is shown now (with every caption), and what was shown in each earlier scene."""
    now = plan.scenes[-1]
    questions = [
        Question("now", rng.choice(NOW), tuple(events.captions[now.key]), now.key, (now.start, now.end)),
    ]
    for scene in plan.scenes[:-1]:
        text, captions = rng.choice(AT).format(t=stamp(rng.uniform(scene.start, scene.end))), events.captions[scene.key]
        answers = tuple(rng.sample(captions, min(past_answers, len(captions))))
        questions.append(Question("at", text, answers, scene.key, (scene.start, scene.end)))
    return questions


def stream_questions(
    plan: StreamPlan, events: Events, rng: random.Random, mix: dict[str, float], count: int
) -> list[Question]:
    """Stage 2: ``count`` questions with kinds drawn by their weights in ``mix``, minus any that do not apply."""
    kinds = rng.choices(list(mix), list(mix.values()), k=count)
    drawn = [ASKERS[kind](plan, events, rng) for kind in kinds]
    return [question for question in drawn if question is not None]
