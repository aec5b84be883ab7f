"""Questions about things that are not there."""

import pytest
import torch

from flash_vstream.models.presupposition import SURE, absence, doubt, kind_logits, means_people, presupposed
from flash_vstream.models.sight import Sight
from flash_vstream.synthetic.annotations import wordings

THINGS = ["person", "car", "dog", "animal", "man", "traffic light", "hand", "top"]


@pytest.fixture(scope="module")
def sight() -> Sight:
    return Sight(8, THINGS, wordings(THINGS), hidden=4).eval()


@pytest.mark.parametrize(
    ("question", "things"),
    [
        ("What color is the car?", {"car": "car"}),
        ("What is the man in the red car doing?", {"man": "man", "car": "car"}),
        ("What is next to the big traffic light?", {"traffic light": "traffic light"}),
        ("What animals do you see?", {"animal": "animals"}),
        ("What kind of dog can you see?", {"dog": "dog"}),
        ("How many red cars are there?", {"car": "cars"}),
        ("How many people are there?", {}),
        ("What color is the top of the car?", {"car": "car"}),
        ("What kind of animal is that?", {"animal": "animal"}),
        ("What is he wearing?", {"person": "person"}),
        ("Who is there?", {"person": "person"}),
        ("Whose car is this?", {}),
        ("What is in his hand?", {"person": "person"}),
        ("What are they doing?", {}),
        ("What is the hand holding?", {}),
        ("What is a dog?", {}),
        ("Where is this?", {}),
    ],
)
def test_things_that_a_question_takes_for_granted(sight, question, things):
    assert {sight.names[number]: noun for number, noun in presupposed(question, sight)} == things


def test_an_animal_is_there_where_a_dog_is_and_a_man_where_anybody_is(sight):
    logits = torch.full((2, len(THINGS)), -5.0)
    logits[0, THINGS.index("dog")] = 1.0
    logits[1, THINGS.index("person")] = 2.0
    for thing, expected in (("animal", [1.0, -5.0]), ("man", [-5.0, 2.0]), ("car", [-5.0, -5.0])):
        assert kind_logits(logits, THINGS.index(thing), sight).tolist() == expected


@pytest.mark.parametrize(
    ("answer", "means"), [("man", True), ("young man", True), ("crowd", True), ("car", False), ("man's car", False)]
)
def test_what_means_people(sight, answer, means):
    assert means_people(answer, sight) is means


def test_sight_is_surer_of_people_and_animals(sight):
    doubts = {name: doubt(THINGS.index(name), sight) for name in THINGS}
    assert {name for name, own in doubts.items() if own == 0} == {"person", "man", "animal", "dog"}
    assert {own for own in doubts.values() if own} == {SURE}


@pytest.mark.parametrize(
    ("noun", "said"),
    [
        ("car", "There is no car."),
        ("Animals", "There are no animals."),
        ("glass", "There is no glass."),
        ("bus", "There is no bus."),
        ("buses", "There are no buses."),
        ("people", "There is nobody."),
        ("men", "There are no men."),
    ],
)
def test_absence_is_said_of_the_noun_as_it_was_asked(noun, said):
    assert absence(noun) == said
