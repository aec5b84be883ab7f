"""Sight: which things a frame shows, and questions of presence answered by it."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from flash_vstream.errors import UserError
from flash_vstream.evaluate.pictures import (
    PictureQuestion,
    PictureQuestions,
    is_right,
    key_words,
    said_count,
    summary,
)
from flash_vstream.memory import StarConfig, StarMemory
from flash_vstream.models.grounding import Grounder, annotate
from flash_vstream.models.remembered import Remembered
from flash_vstream.models.sight import Seen, Sight, number_of_people
from flash_vstream.models.small_networks import add_configs, load_networks
from flash_vstream.synthetic.annotations import (
    MANY_PEOPLE,
    Annotation,
    frequent_things,
    head_noun,
    is_person,
    read_annotations,
    thing,
    things_in,
    wordings,
)
from flash_vstream.train.sight import SightConfig, train_sight

THINGS = ("person", "dog", "bus", "glasses")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("Dogs", "dog"),
        ("buses", "bus"),
        ("bus", "bus"),
        ("glasses", "glasses"),
        ("grass", "grass"),
        ("knives", "knife"),
        ("shoes", "shoe"),
        ("bikes", "bicycle"),
        ("couch", "sofa"),
        ("children", "child"),
        ("people", "person"),
    ],
)
def test_a_thing_has_one_name(word, name):
    assert thing(word) == name


def test_phrases_and_sentences_name_things():
    assert head_noun("white coffee cups on a tray") == "cup"
    assert head_noun("red") is None
    assert is_person("skateboarders")
    assert not is_person("dog")
    texts = ["Two kittens sleep beside a girl.", "a red bus"]
    assert things_in(texts, {"cat", "person", "animal", "vehicle", "dog"}) == {"cat", "person", "animal", "vehicle"}


@pytest.mark.parametrize(
    ("question", "name", "now"),
    [
        ("Is there a person?", "person", True),
        ("Is anyone there?", "person", True),
        ("Are there any people in the picture?", "person", True),
        ("Can you see somebody?", "person", True),
        ("Did you see any dogs so far?", "dog", False),
        ("Have you seen a bus?", "bus", False),
        ("Is there a single dog?", "dog", True),
        ("Is there at least one dog in the picture?", "dog", True),
        ("was there a puppy", "dog", False),
        ("Tell me if there is a pair of glasses.", None, None),
        ("Do you see glasses right now?", "glasses", True),
        ("Is the dog asleep?", None, None),
        ("Is a man on the bus?", None, None),
        ("Where is the dog?", None, None),
        ("What is happening now?", None, None),
        ("", None, None),
    ],
)
def test_questions_of_presence_are_told_from_others(question, name, now):
    sight = Sight(8, THINGS, wordings(THINGS), hidden=4)
    found = sight.presence(question)
    if name is None:
        assert found is None
    else:
        assert sight.names[found.thing] == name
        assert found.is_about_now == now
        assert sight.find(question[found.begin : found.end]) == found.thing


@pytest.fixture
def grounded():
    """A grounder whose sight says "dog" and "one person" of frames with positive features, and no grounding."""
    sight = Sight(32, THINGS, wordings(THINGS), hidden=4)

    def forward(features):
        logits = features.mean((1, 2))[:, None] * 10
        people = torch.cat([torch.zeros_like(logits), logits, logits - 20], 1)
        return Seen(logits.expand(-1, len(THINGS)), people)

    sight.forward = forward

    class Unmarked:
        def spans(self, questions):
            return [[] for _ in questions]

    grounder = Grounder.__new__(Grounder)
    grounder.sight, grounder.grounding = sight, torch.nn.Identity()
    grounder.spans = Unmarked().spans
    grounder.things = Remembered(grounder._things)
    return grounder


def test_a_question_about_now_reads_the_newest_frame_and_others_any(grounded):
    config = StarConfig(spatial_size=2, temporal_size=1, temporal_length=4, abstract_length=2, retrieved_length=1)
    memory = StarMemory(replace(config, abstract_length=0), 32)
    memory.write(torch.ones(2, 4, 32), [0.0, 1.0])
    memory.write(-torch.ones(2, 4, 32), [2.0, 3.0])
    now, ever = "Is there a dog?", "Did you see a dog?"
    (asked_now,), (asked_ever,) = grounded.mentions([now, ever], memory.read())
    assert (asked_now.seen, asked_now.time) == (False, 3.0)
    assert asked_ever.seen
    assert asked_ever.time < 2
    assert annotate(ever, [asked_ever]) == f"Was there a dog ({asked_ever.time:.0f}s)?"
    (anyone,) = grounded.mentions(["Is anyone there?"], memory.read())
    assert annotate("Is anyone there?", anyone) == "Is there a person now (3s?)?"
    (anyone,) = grounded.mentions(["Did you see anyone?"], memory.read())
    assert anyone[0].seen
    assert anyone[0].time < 2
    assert grounded.mentions(["Why?"], memory.read()) == [[]]


def test_a_person_is_there_where_somebody_is_counted():
    """Whatever the logit of the thing says, so that both questions get the same answer."""
    sight = Sight(8, THINGS, wordings(THINGS), hidden=4).eval()
    sight.threshold.copy_(torch.tensor([-0.9, 0.3]))
    person = THINGS.index("person")
    frames = torch.randn(3, 4, 8)
    with torch.no_grad():
        sight.people.weight.zero_()
        # Two are likelier than none; somebody is, though no single number; nobody is.
        for logits, number in (([1.0, 0, 1.5, 0, 0], 2), ([1.0, 0, 0, 0.5, 0], 3), ([3.0, 0, 0.5, 0, 0], 0)):
            sight.people.bias.copy_(torch.tensor(logits))
            sight.things.bias[person] = -9.0 if number else 9.0
            assert number_of_people(sight(frames).people).tolist() == [number] * 3
            assert (sight.shown(frames)[:, person] > sight.needed(1)).tolist() == [number > 0] * 3


# --- training


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Forty pictures of a dog or of nothing, told apart by one channel, with annotations."""
    folder = tmp_path_factory.mktemp("annotated")
    generator = torch.Generator().manual_seed(0)
    rows, features = [], {"train": {}, "val": {}}
    for i in range(40):
        key, dog = f"{i:02}.jpg", i % 2 == 0
        objects = ["brown dog", "green ball"] if dog else ["red ball", "wooden table"]
        row = {"image": key, "caption": f"A {objects[0]} is there.", "short": objects[0], "place": "room"}
        rows.append(row | {"people": "many" if dog else 0, "objects": objects, "qa": [["What is it?", objects[0]]]})
        frames = torch.randn(2, 16, 24, generator=generator)
        frames[..., 0] += 4 if dog else -4
        features["train" if i < 30 else "val"][key] = frames.half()
    (folder / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "captions.json").write_text("{}")
    for split, tensors in features.items():
        save_file(tensors, folder / f"{split}.safetensors")
    return folder


def test_sight_is_trained_resumed_and_loaded(prepared, tmp_path):
    settings = SightConfig(steps=60, batch_size=16, learning_rate=3e-3, hidden=16, least=5)
    result = train_sight(settings, [prepared], tmp_path)
    assert result["presence"] == 1
    assert result["person"] == 1
    assert train_sight(settings, [prepared], tmp_path) == result  # nothing is left to do
    config = SimpleNamespace()
    add_configs(config, tmp_path)
    sight = Sight(24, **config.sight_config)
    assert {"dog", "ball", "person"} <= set(sight.names)
    assert sight.find("some dogs") == sight.names.index("dog")

    model = SimpleNamespace(sight=sight)
    load_networks(model, tmp_path)
    assert float(sight.threshold[1]) >= 0
    model.sight = Sight(8, THINGS, {}, hidden=4)
    with pytest.raises(UserError, match="does not fit"):
        load_networks(model, tmp_path)
    with pytest.raises(UserError, match="no annotated pictures"):
        train_sight(settings, [tmp_path], tmp_path)


def test_bad_annotations_are_named_by_line(tmp_path):
    path = tmp_path / "annotations.jsonl"
    path.write_text('{"image": "a", "caption": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        read_annotations(path)
    with pytest.raises(UserError, match="cannot read"):
        read_annotations(tmp_path / "none")


# --- pictures


def annotation(key: str, people: int, *objects: str) -> Annotation:
    return Annotation(key, f"A {objects[0]}.", objects[0], "street", people, objects, (("What is it?", objects[0]),))


def test_questions_about_pictures_are_balanced_and_true():
    annotations = {f"{i}": annotation(f"{i}", i % 2 * MANY_PEOPLE, "red bus" if i % 2 else "dog") for i in range(40)}
    questions = PictureQuestions(annotations, {})
    assert set().union(*questions.things.named.values()) == {"bus", "dog"}
    assert frequent_things(annotations.values(), 12) == ["bus", "dog"]
    for key in annotations:
        made = questions.of(key, random.Random(key))
        things = [question for question in made if question.kind == "thing"]
        assert sorted(question.truth for question in things) == ["no", "yes"]
        for question in things:
            assert (("bus" in question.text) == (int(key) % 2 == 1)) == (question.truth == "yes")
        assert {question.truth for question in made if question.kind == "people"} == {"yes" if int(key) % 2 else "no"}
        assert sorted(question.truth for question in made if question.kind == "yes or no") == ["no", "no", "yes", "yes"]
        assert len([question for question in made if question.kind == "choice"]) == 2


@pytest.mark.parametrize(
    ("kind", "truth", "reply", "right"),
    [
        ("thing", "yes", "Yes, at 0s.", True),
        ("thing", "no", "Yes, at 0s.", False),
        ("people", "no", "No. That did not happen.", True),
        ("count", "2", "There are two people.", True),
        ("count", "11", "I see 5 people.", True),
        ("count", "0", "Nobody is there.", True),
        ("count", "1", "I can't tell.", False),
        ("short", "Two white dogs.", "They are white dogs, two of them.", True),
        ("short", "Red.", "It is blue.", False),
        ("yes or no", "yes", "Yes.", True),
        ("yes or no", "yes", "Red.", False),
        ("choice", "red", "Red.", True),
        ("choice", "red", "Blue.", False),
        ("choice", "red", "Red or blue.", False),
        ("description", "", "A dog runs on grass.", True),
        ("description", "", "A car.", False),
    ],
)
def test_replies_about_pictures_are_graded(kind, truth, reply, right):
    assert is_right(PictureQuestion(kind, "?", truth), reply, {"dog"}, 0) == right


def test_scores_are_balanced_over_yes_and_no():
    rows = [{"kind": "thing", "truth": truth, "correct": truth == "no"} for truth in ("yes", "no", "no", "no")]
    assert summary(rows)["thing"] == 0.5
    assert summary([{**row, "kind": "yes or no"} for row in rows])["yes or no"] == 0.5
    assert said_count("no one, then 3") == 0
    assert said_count("There is a person.") == 1
    assert said_count("A man and two dogs.") == 1
    assert said_count("A dog.") is None
    assert key_words("The two Dogs") == {"two", "dog"}
