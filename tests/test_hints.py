"""Hints: what small networks tell the language model, and which frames a question recalls."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flash_vstream.memory import MemorySnapshot, Slots, StarConfig, StarMemory, pool_grid
from flash_vstream.models.event_score import RARITY, EventScorer
from flash_vstream.models.grounding import Grounder, Grounding, Mention, Words
from flash_vstream.models.hints import Hinter, Hints, recall
from flash_vstream.models.remembered import Remembered
from flash_vstream.models.short_answers import NONE, ShortAnswers
from flash_vstream.models.sight import Sight

TIMES = torch.tensor([0.0, 4.0, 9.0, 13.0, 20.0])
PAST = Slots.of_frames(torch.arange(5.0)[:, None, None].expand(5, 4, 6), TIMES.double())
SEEN = Mention("a dog run", 0, 9, 9.0, 2.0)


def times(question: str, *located) -> list[float] | None:
    found = recall(question, located, PAST)
    return None if found is None else found.exemplar.tolist()


@pytest.mark.parametrize(
    ("question", "scores", "wanted"),
    [
        ("What happened at 12s?", None, [13.0]),
        ("What was there at 0:05?", None, [4.0]),
        ("What happened between 1s and 19s?", None, [0.0, 20.0]),
        ("When did a dog run?", [0.0, 0.0, 3.0, 2.9, 0.0], [9.0]),
        ("What happened just before a dog ran?", [0.0, 2.8, 3.0, 2.9, 0.0], [0.0]),
        ("What did you see right after a dog ran?", [0.0, 2.8, 3.0, 2.9, 0.0], [20.0]),
        ("What happened before a dog ran?", [3.0, 0.0, 0.0, 0.0, 0.0], None),
        ("What did you see after a dog ran?", [-9.0, -3.0, -9.0, -9.0, -9.0], [9.0]),
        ("How did it begin?", None, [0.0]),
        ("What is happening now?", None, None),
    ],
)
def test_a_question_recalls_the_frames_that_it_is_about(question, scores, wanted):
    located = [] if scores is None else [(SEEN, torch.tensor(scores))]
    assert times(question, *located) == wanted


def test_two_events_recall_a_frame_each_in_time_order():
    one, two = torch.eye(5)[3], torch.eye(5)[1]
    assert times("Did a dog run before a cat slept?", (SEEN, one), (SEEN, two)) == [4.0, 13.0]


def test_presence_and_an_empty_memory_recall_nothing():
    asked = Mention("dog", 0, 3, 9.0, 1.0, "a dog")
    assert times("Did you see a dog at 4s?", (asked, torch.eye(5)[1])) is None
    assert recall("What happened at 4s?", [], PAST[torch.zeros(0, dtype=torch.long)]) is None


@pytest.mark.parametrize(
    ("question", "starts"),
    [
        ("What has happened so far?", [0.0, 4.0, 9.0, 13.0, 20.0]),
        ("What happened in the last 10 seconds?", [12.0, 13.0, 20.0]),
        ("What happened between 0:03 and 5s?", [3.0, 4.0]),
        ("What have I missed since 13s?", [13.0, 20.0]),
        ("What is happening now?", None),
        ("What happened at 4s?", None),
    ],
)
def test_a_story_is_about_the_time_that_is_named(hinter, question, starts):
    ends = torch.tensor([3.0, 8.0, 12.0, 19.0, 22.0], dtype=torch.float64)
    nothing = PAST[torch.zeros(0, dtype=torch.long)]
    memory = MemorySnapshot(nothing, replace(PAST, end=ends), nothing, nothing, nothing, 22.0, 23)
    (found,) = hinter.hints([question], memory)
    assert (found.scenes.start.tolist() if found.scenes is not None else None) == starts


@pytest.mark.parametrize(
    ("question", "index"),
    [
        ("What color was the dog?", 2),
        ("What was she wearing?", 0),  # a person
        ("What color is the dog?", None),  # the newest
        ("What color was the sky?", None),
    ],
)
def test_a_question_about_the_past_is_answered_from_the_frame_that_shows_it_best(hinter, snapshot, question, index):
    def things(features):
        """Of the long-term memory, the first frame shows a person and the third a dog; the others show little."""
        seen = torch.full((len(features), 3), -1.0)
        if torch.equal(features, snapshot.longterm.features):
            seen[0, 0] = seen[2, 1] = 2.0
        return [seen]

    hinter.grounder.things = things
    frame = hinter._asked_about(question, snapshot)
    assert frame.shape == (1, 16, 6)
    if index is None:
        assert torch.equal(frame, snapshot.spatial.features[-1:])
    else:
        coarse = snapshot.longterm.features[index].to(frame.dtype)
        assert torch.equal(pool_grid(frame, 2)[0], coarse)


@pytest.mark.parametrize(
    ("question", "objection"),
    [
        ("What color is the dog?", "There is no dog."),
        ("What color was the dog?", "There is no dog."),
        ("How many dogs are there?", "There are no dogs."),
        ("Where is the person?", "There is nobody."),
        ("What color is the grass?", None),
        ("Is the dog red?", None),
        ("Is the dog red or blue?", "There is no dog."),
        ("What is she wearing?", "There is nobody."),
        ("What happened to the dog first?", None),
        ("What is this?", None),
    ],
)
def test_what_is_surely_not_there_is_objected_to(hinter, snapshot, question, objection):
    with torch.no_grad():
        hinter.sight.things.bias.copy_(torch.tensor([-3.0, -3.0, -0.5]))
        hinter.sight.people.bias[0] = 3.0
    (found,) = hinter.hints([question], snapshot)
    assert found.objection == objection


def test_a_thing_that_left_is_asked_about_where_it_was_seen(hinter, snapshot):
    """Though the question is in the present tense, if the newest frame surely lacks it."""

    def things(features):
        seen = torch.full((len(features), 3), -3.0)
        if torch.equal(features, snapshot.longterm.features):
            seen[2, 1] = 2.0
        return [seen]

    hinter.grounder.things = things
    frame = hinter._asked_about("What color is the dog?", snapshot)
    assert torch.equal(pool_grid(frame, 2)[0], snapshot.longterm.features[2].to(frame.dtype))
    assert hinter._objection("What color is the dog?", snapshot) is None
    assert hinter._objection("What color is the grass?", snapshot) == "There is no grass."


def test_how_long_a_stream_is_follows_from_its_time(hinter, snapshot):
    (found,) = hinter.hints(["How long is this video?"], snapshot)
    assert found.annotate("How long is this video?") == f"How long is this video? ({int(snapshot.time)}s)"
    (found,) = hinter.hints(["How long is the rope?"], snapshot)
    assert found.short_answer != f"{int(snapshot.time)}s"


def test_an_indirect_question_is_looked_up_and_read_in_its_direct_form(hinter, snapshot):
    (found,) = hinter.hints(["Can you tell me how many people there are?"], snapshot)
    (direct,) = hinter.hints(["How many people are there?"], snapshot)
    assert found == direct
    assert found.annotate("Can you tell me how many people there are?").startswith("How many people are there?")


@pytest.mark.parametrize(
    ("people", "question", "answer"),
    [
        (0, "How many people are there?", "none"),
        (2, "How many people can you see in the video?", "two"),
        (4, "How many people did you see?", "six"),
        (2, "How many people are on the bus?", "six"),
        (2, "How many dogs are there?", "six"),
    ],
)
def test_the_number_of_people_is_the_one_that_sight_tells(hinter, snapshot, people, question, answer):
    answers = [NONE, "none", "two", "six", "red"]
    hinter.short_answers = ShortAnswers(6, 8, answers, width=8, heads=2)
    with torch.no_grad():
        torch.nn.init.zeros_(hinter.short_answers.answer[-1].weight)
        hinter.short_answers.answer[-1].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 3.0, 4.0 if people < 4 else 0.0]))
        if "people are on" in question or "dogs" in question:
            hinter.short_answers.answer[-1].bias[4] = 0.0
        hinter.sight.people.bias[people] = 5.0
    (found,) = hinter.hints([question], snapshot)
    assert found.short_answer == answer


def test_notes_and_short_answers_stand_in_the_question():
    assert Hints().annotate("Why?") == "Why?"
    assert Hints(short_answer="red").annotate("What color is it?") == "What color is it? (red)"
    assert Hints([SEEN]).annotate("a dog run?") == "a dog run (9s)?"


def test_closed_questions_are_read_in_the_form_that_is_always_answered_by_its_note():
    assert Hints(short_answer="yes").annotate("Is the bus red?") == "Is there it now (0s)?"
    assert Hints(short_answer="no").annotate("Is the bus red?") == "Is there it now (0s?)?"
    choice = Hints(short_answer="red")
    assert choice.annotate("Is the bus red or blue?") == "Is it red or something else? (red)"


class Letters:
    """A tokenizer with a token for each character."""

    def __call__(self, texts, return_offsets_mapping=False, truncation=False, max_length=96, **_):
        rows = [[ord(letter) % 64 for letter in text[:max_length]] for text in texts]
        offsets = [[(i, i + 1) for i in range(len(row))] for row in rows]
        return type("Coded", (), {"input_ids": rows, "offset_mapping": offsets})


@pytest.fixture
def hinter() -> Hinter:
    """Networks that know nothing yet, which hint nothing by chance."""
    torch.manual_seed(0)
    grounding = Grounding(6, 8, width=8, heads=2).eval()
    torch.nn.init.constant_(grounding.each()[0].mark.bias, -100.0)  # no event anywhere
    sight = Sight(6, ["person", "dog", "grass"], {"dogs": 1}, hidden=4)
    short = ShortAnswers(6, 8, [NONE, "red", "two"], width=8, heads=2)
    for layer in (sight.things, sight.people, short.answer[-1]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return Hinter(Grounder(grounding, Words(Letters(), torch.randn(64, 8)), sight), short)


@pytest.fixture
def snapshot():
    config = StarConfig(
        spatial_size=4, temporal_size=2, temporal_length=3, abstract_length=0, longterm_length=8, longterm_size=2
    )
    memory = StarMemory(config, 6)
    memory.write(torch.randn(5, 16, 6), TIMES)
    return memory.read()


def test_cues_name_people_and_likely_things(hinter, snapshot):
    with torch.no_grad():
        hinter.sight.people.bias[2] = 5.0
        hinter.sight.things.bias.copy_(torch.tensor([5.0, 2.0, -5.0]))
    assert hinter.cue(snapshot) == " 2 people; dog"
    with torch.no_grad():
        hinter.sight.people.bias[0] = 9.0
        hinter.sight.things.bias.fill_(-5.0)
    assert hinter.cue(snapshot) == " nobody"
    (found,) = hinter.hints(["What happened at 4s?"], snapshot)
    assert (found.recalled.exemplar.tolist(), found.cues) == ([4.0], (" nobody",))


def test_short_answers_are_told_where_one_is_likely(hinter, snapshot):
    question = "What color is it?"
    with torch.no_grad():
        hinter.short_answers.answer[-1].bias.copy_(torch.tensor([0.0, 3.0, 0.0]))
    assert hinter.hints([question], snapshot)[0].annotate(question) == "What color is it? (red)"
    with torch.no_grad():
        hinter.short_answers.answer[-1].bias.copy_(torch.tensor([9.0, 3.0, 0.0]))
    assert hinter.hints([question], snapshot)[0].short_answer is None
    (presence,) = hinter.hints(["Is there a dog?"], snapshot)
    assert (presence.short_answer, [mention.thing for mention in presence.mentions]) == (None, ["a dog"])


@pytest.mark.parametrize(
    ("question", "likely", "short_answer"),
    [
        ("Is it red?", "yes", "yes"),
        ("Is it red?", "no", "no"),
        ("Is it red?", NONE, None),
        ("Does it look red now?", "no", "no"),
        ("Is it red or blue?", "blue", "blue"),
        ("Is it red or blue?", "yes", "red"),  # whatever else is likely, red is the likelier of the two
        ("Is it a red, or a blue one?", "blue", "blue"),
        ("Is it red or wet?", "red", None),
        ("Was it red?", "yes", None),
        ("Do you see anything red?", "yes", "yes"),
        ("Do the people wear hats?", "no", "no"),
        ("Can you describe it?", "yes", None),
        ("Are you a robot?", "yes", None),
        ("Is anything going on?", "yes", None),
        ("Is it red since the first scene?", "yes", None),
    ],
)
def test_closed_questions_allow_yes_and_no_or_what_they_name(hinter, snapshot, question, likely, short_answer):
    network = ShortAnswers(6, 8, [NONE, "yes", "red", "no", "blue"], width=8, heads=2)
    with torch.no_grad():
        network.answer[-1].weight.zero_()
        network.answer[-1].bias.copy_(torch.tensor([0.0, 0.1, 0.3, 0.0, 0.2]))
        network.answer[-1].bias[network.answers.index(likely)] += 5.0
    hinter.short_answers = network
    (found,) = hinter.hints([question], snapshot)
    assert found.short_answer == short_answer
    forms = {None: question, "yes": "Is there it now (0s)?", "no": "Is there it now (0s?)?"}
    wanted = forms.get(short_answer, f"Is it {short_answer} or something else? ({short_answer})")
    assert found.annotate(question) == wanted


@pytest.mark.parametrize(
    ("question", "events", "choice"),
    [
        ("Is there a gate or a hill behind the man?", ("a gate", "a hill behind the man"), "a gate"),
        (
            "Is the man riding a camel or a llama on the road?",
            ("the man riding a camel", "a llama on the road"),
            "a camel",
        ),
        ("Is there a gate and a hill?", ("a gate", "a hill"), None),
        ("Did you see a gate or a hill?", ("a gate", "a hill"), None),  # which is answered by yes or no
    ],
)
def test_alternatives_that_have_no_short_answer_are_compared(hinter, snapshot, monkeypatch, question, events, choice):
    def compared(texts, parts):
        """The first is more alike."""
        return torch.tensor([[2.0], [1.0]])[: len(texts)].expand(-1, sum(map(len, parts))), [0.0]

    begins = [question.index(event) for event in events]
    spans = [(begin, begin + len(event)) for begin, event in zip(begins, events, strict=True)]
    monkeypatch.setattr(hinter.grounder, "spans", lambda texts: [spans for _ in texts])
    monkeypatch.setattr(hinter.grounder, "compared", compared)
    (found,) = hinter.hints([question], snapshot)
    assert found.short_answer == choice


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("Is there a single person?", "yes"),
        ("Are there two people in the picture?", "yes"),
        ("Are there three people?", "no"),
        ("Is there more than one person?", "yes"),
        ("Are there more than two people?", "no"),
        ("Are there at least two people?", "yes"),
        ("Are there at least four people?", "no"),
        ("Are there four people?", None),  # four and more are one class
        ("Are there more than four people?", None),
        ("Are there two people with hats?", None),
    ],
)
def test_so_many_people_are_there_as_sight_sees(hinter, snapshot, question, said):
    with torch.no_grad():
        hinter.sight.people.bias[2] = 9.0
        hinter.short_answers.answer[-1].bias[0] = 9.0  # none
    assert hinter.hints([question], snapshot)[0].verdict == said


def test_who_is_answered_by_people_alone(hinter, snapshot):
    with torch.no_grad():
        hinter.sight.people.bias[2] = 9.0
        hinter.short_answers.answer[-1].bias.copy_(torch.tensor([0.0, 5.0, 0.0]))  # red
    assert hinter.hints(["Who is there?"], snapshot)[0].short_answer is None
    assert hinter.hints(["What is there?"], snapshot)[0].short_answer == "red"


def test_what_is_decided_begins_the_answer():
    dog = Mention("dog", 0, 3, 9.0, 1.0, "a dog")
    assert Hints([dog], direct="Is there a dog?").verdict == "yes"
    assert Hints([replace(dog, score=-1.0)], direct="Is there a dog?").verdict == "no"
    assert Hints([SEEN], direct="Did a dog run?").verdict is None
    assert Hints(short_answer="no", direct="Is it red?").verdict == "no"
    assert Hints(short_answer="red", direct="Is it red or blue?").verdict == "red"
    assert Hints(short_answer="red", direct="What color is it?").verdict is None


@pytest.mark.parametrize(
    ("question", "blind", "answer"),
    [
        ("Is she sitting or standing?", [0.1, 0.85, 0.05], "standing"),
        ("Is she sitting or standing?", [0.1, 0.5, 0.4], "sitting"),
        ("What is she doing?", [0.1, 0.85, 0.05], "sitting"),
    ],
)
def test_a_choice_is_made_by_the_frame_more_than_by_the_question(hinter, snapshot, question, blind, answer):
    class Biased(ShortAnswers):
        """The same probabilities for every frame, and those in ``blind`` for an empty one."""

        def forward(self, embeddings, there, features):
            rows = [[0.1, 0.5, 0.4] if frame.any() else blind for frame in features]
            return torch.tensor(rows).log()

    hinter.short_answers = Biased(6, 8, [NONE, "sitting", "standing"], width=8, heads=2)
    with torch.no_grad():
        hinter.sight.people.bias[1] = 9.0  # she is there
    assert hinter.hints([question], snapshot)[0].short_answer == answer


def test_a_thing_that_is_waited_for_must_be_surer_than_one_that_is_asked_about(hinter, snapshot):
    scorer = EventScorer(SimpleNamespace(hinter=hinter))
    with torch.no_grad():
        hinter.sight.things.bias.copy_(torch.tensor([0.0, RARITY, 0.0]))
    assert scorer.score(scorer.event("a dog"), snapshot) == pytest.approx(0.5)
    assert scorer.score(scorer.event("grass"), snapshot) < 0.2
    assert scorer.score(scorer.event("somebody"), snapshot) == pytest.approx(0.8)  # four of five numbers, all alike


def test_frames_of_the_longterm_memory_are_looked_at_once(hinter, snapshot):
    seen = []
    sights = hinter.grounder.grounding.sights
    hinter.grounder.sights = Remembered(lambda features: seen.append(len(features)) or sights(features))
    hinter.grounder.look(snapshot)
    looked = sum(seen)
    whole = {*snapshot.retrieved.exemplar.tolist(), *snapshot.spatial.exemplar.tolist()}  # at full resolution
    assert looked == len(snapshot.longterm) + len(whole)
    first = hinter.grounder.sights(snapshot.longterm.features)
    assert sum(seen) == looked
    for own, remembered in zip(sights(snapshot.longterm.features), first, strict=True):
        torch.testing.assert_close(own, remembered)


def test_what_was_used_longest_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr("flash_vstream.models.remembered.MOST", 3)
    seen = []
    remembered = Remembered(lambda features: seen.extend(features[:, 0, 0].tolist()) or [features * 2])
    frames = torch.arange(4.0)[:, None, None].expand(4, 2, 2)
    assert torch.equal(remembered(frames)[0], frames * 2)
    remembered(frames[[1, 2, 3]])
    assert seen == [0, 1, 2, 3]
    remembered(frames[[0]])
    assert seen == [0, 1, 2, 3, 0]
