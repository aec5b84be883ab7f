"""Indirect questions in their direct form."""

import pytest

from flash_vstream.models.direct_question import asks_about_model, direct_question, in_present


@pytest.mark.parametrize(
    ("asked", "direct"),
    [
        ("Can you tell me how many people there are?", "How many people are there?"),
        ("Could you please tell me what the man is doing?", "What is the man doing?"),
        ("tell me what color the car is", "What color is the car?"),
        ("Do you know where the dog is?", "Where is the dog?"),
        ("I want to know whether anyone is sitting.", "Is anyone sitting?"),
        ("Please tell me if there is a person", "Is there a person?"),
        ("Can you tell me which came first, the dog or the cat?", "Which came first, the dog or the cat?"),
        ("Tell me who is in the room.", "Who is in the room?"),
        ("Could you let me know when the man was riding a bike?", "When was the man riding a bike?"),
        ("Tell me what the woman in the red coat is holding", "What is the woman in the red coat holding?"),
        ("Can you tell me what has happened so far?", "Tell me what has happened so far."),
        ("Describe the scene in detail.", "What is happening now?"),
        ("Could you describe what you see?", "What is happening now?"),
        ("Do you know if the dog barks?", "Tell me if the dog barks."),
        ("Was this picture taken inside?", "Is this inside?"),
        ("Does this happen indoors or outdoors?", "Is this indoors or outdoors?"),
        ("Is the dog running outside?", "Is the dog running outside?"),
        ("Can you count the people?", "How many people are there?"),
        ("Count the red cars.", "How many red cars are there?"),
        ("What time of day is it?", "Is it day or night?"),
        ("What time is it?", "What time is it?"),
        ("Count to ten.", "Count to ten."),
    ],
)
def test_a_polite_frame_is_taken_off(asked, direct):
    assert direct_question(asked) == direct


@pytest.mark.parametrize(
    ("asked", "whole"),
    [
        ("Indoors or outdoors?", "Is it indoors or outdoors?"),
        ("a red bus or a blue one", "Is it a red bus or a blue one?"),
        ("Any dogs?", "Are there any dogs?"),
        ("A man with a hat?", "Is there a man with a hat?"),
    ],
)
def test_half_a_question_becomes_a_whole_one(asked, whole):
    assert direct_question(asked) == whole


@pytest.mark.parametrize(
    ("asked", "present"),
    [
        ("What color was the bus?", "What color is the bus?"),
        ("How many people did you see?", "How many people are there?"),
        ("How many dogs have you seen in the snow?", "How many dogs are there in the snow?"),
        ("How many people were there?", "How many people are there?"),
        ("What is he holding?", "What is he holding?"),
    ],
)
def test_one_frame_is_asked_about_in_the_present(asked, present):
    assert in_present(asked) == present


@pytest.mark.parametrize(
    "asked",
    [
        "How many people are there?",
        "Yes or no?",
        "Which came first, the dog or the cat?",
        "Is it day or night?",
        "Can you describe it?",
        "Can you see a dog?",
        "Tell me everything that you have seen.",
        "Tell me about the people.",
        "Tell me a joke.",
        "What did you tell me?",
        "Tell me what has happened so far.",
        "Tell me when you saw a dog.",
        "",
    ],
)
def test_other_questions_stay_as_they_are(asked):
    assert direct_question(asked) == asked


@pytest.mark.parametrize(
    "asked", ["Who are you?", "so, what's your name", "What can you do?", "hello, can you hear me?"]
)
def test_questions_about_whom_they_ask(asked):
    assert asks_about_model(asked)


@pytest.mark.parametrize(
    "asked", ["Who is she?", "What can you do with a fork?", "Can you hear the dog?", "What do you see?"]
)
def test_questions_about_what_is_seen(asked):
    assert not asks_about_model(asked)
