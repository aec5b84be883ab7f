"""Replies to multiple-choice questions: cases that real options make hard, plus 300 generated ones."""

import random

import pytest

from flash_vstream.evaluate.choices import LONG, read_choice
from flash_vstream.synthetic.texts import words

# Options in the style of EgoSchema, where the camera wearer is called C.
WEARER = [
    (
        "C's main activities are eating and operating a laptop.",
        "C's main activities are watching a movie and operating a laptop.",
        "C's main activities are eating, watching a movie, and operating a laptop.",
        "C's main activity is eating.",
        "C's main activities are eating and watching a movie.",
    ),
    (
        "C's actions are efficient and effective.",
        "C's actions are inefficient and ineffective.",
        "C's actions are neither efficient nor effective.",
        "C's actions are efficient but ineffective.",
        "C's actions are effective but inefficient.",
    ),
    (
        "C's overarching goal is to paint the wooden furniture.",
        "C's predominant, overarching goal and objective is to efficiently clean the wooden furniture surfaces.",
        "The principal overarching goal of c is to effectively repair and restore the damaged wooden furniture.",
        "C's overarching goal is to decorate the wooden furniture.",
        "C's primary overarching goal is to efficiently sell the high-quality wooden furniture to customers.",
    ),
    (
        "C's key recurring steps are washing, rinsing, and drying.",
        "C's key recurring steps are rinsing, washing, and putting in the dishwasher.",
        "C's key recurring steps are washing, rinsing, and putting in the oven.",
        "C's key recurring steps are rinsing, washing, and putting in the freezer.",
        "C's key recurring steps are rinsing, washing, and rinsing again.",
    ),
    (
        "C is trying to clean her laptop.",
        "C is trying to organize her supplies.",
        "C is trying to make a cup of tea.",
        "C is trying to create a painting.",
        "C is trying to answer a phone call.",
    ),
    (
        "C's main objective is to clean the truck.",
        "C's main objective is to fix the hose.",
        "C's main objective is to water the lawn.",
        "C's main objective is to take a picture of the lawn.",
        "C's main objective is to get in the truck.",
    ),
    (
        "C is preparing a meal.",
        "C is washing the dishes, and then C dries them.",
        "C puts away the card that a man picked.",
        "C is not doing anything.",
        "C is talking to D.",
    ),
]
# Options in the style of the other benchmarks.
OTHERS = [
    ("Black.", "Red.", "White.", "Blue."),
    ("3", "5", "4", "2"),
    ("Yes, but it was accidental.", "Yes.", "No, the monitor screen is off.", "I'm not sure, I didn't see."),
    ("In the kitchen", "Next to the red ottoman", "In the living room", "(E)On the kitchen island"),
    ('"WE SELL ART".', '"BUY & SELL ART".', '"WE BUY & SELL LUXURY".', '"ART FOR SALE".'),
    ("(c)(a)(d)(e)(b).", "(c)(e)(a)(b)(d).", "(a)(c)(e)(b)(d).", "(a)(e)(b)(c)(d)."),
    ("blue", "dark blue", "not blue", "none of these"),
    ("The man in front of the door", "The man behind the door", "A dog", "Nobody"),
    ("猫が寝ている", "犬が走っている", "鳥が飛んでいる", "人が歩いている"),
]
EVERY = [*WEARER, *OTHERS]
RIGHT = (
    "{text}",
    " {text}\n",
    "{upper}",
    '"{text}"',
    "({letter}) {text}",
    "{letter}. {text}",
    "{letter}: {text}",
    "The answer is {letter}: {text}",
    "The answer is ({letter}) {text}",
    "Answer: {letter}",
    "**{letter}**\n\n{text}",
    "{letter}) because the video shows it",
    "The correct option is ({letter}).",
    "({letter}), not ({other})",
    "I would go with {letter}.",
)
UNREADABLE = (
    "not {text}",
    "It is not {text}",
    "({letter}) or ({other})",
    "Either {letter} or {other}.",
    "It is not ({letter})",
    "({letter}) {other_text}",
    "The man picked a card",
    "C cooks while a woman waits",
    "A person in a striped shirt",
    "Plan B did not work for D",
)


def generated(forms: tuple[str, ...], count: int, seed: int):
    """Replies in the given forms about options drawn with ``seed``."""
    rng = random.Random(seed)
    made = []
    while len(made) < count:
        choices = rng.choice(EVERY)
        index, other = rng.sample(range(len(choices)), 2)
        parts = {"text": choices[index], "other_text": choices[other], "upper": choices[index].upper()}
        reply = rng.choice(forms).format(**parts, letter="ABCDE"[index], other="ABCDE"[other])
        made.append((reply, choices, index))
    return made


@pytest.mark.parametrize("choices", EVERY)
def test_every_option_is_read_as_itself(choices):
    assert [read_choice(choice, choices).index for choice in choices] == list(range(len(choices)))


def test_two_hundred_ugly_replies_are_read():
    for reply, choices, index in generated(RIGHT, 200, seed=1):
        assert read_choice(reply, choices).index == index, (reply, choices)


def test_a_hundred_unreadable_replies_are_abstentions():
    for reply, choices, _ in generated(UNREADABLE, 100, seed=2):
        assert read_choice(reply, choices).index is None, (reply, choices)


@pytest.mark.parametrize("choices", WEARER)
def test_options_cut_short_by_the_token_limit_are_read(choices):
    for index, choice in enumerate(choices):
        others = [words(other, frozenset()) for other in choices if other != choice]
        for length in range(len(choice) // 2, len(choice)):
            beginning = " ".join(words(choice[:length], frozenset()))
            shared = any(" ".join(other).startswith(beginning) for other in others)
            if len(beginning.split()) >= LONG:
                assert read_choice(choice[:length], choices).index == (None if shared else index), choice[:length]


@pytest.mark.parametrize(
    ("reply", "choices", "index"),
    [
        ("C, a woman, moves her hand", WEARER[0], None),
        ("a man in a black shirt", OTHERS[0], None),
        ("It is black.", OTHERS[0], 0),
        ("The shirt is black", OTHERS[0], 0),
        ("It is not red", OTHERS[0], None),
        ("It is not red but blue", OTHERS[0], 3),
        ("red and blue", OTHERS[0], None),
        ("A man in black", OTHERS[0], None),
        ("The answer is A man", OTHERS[0], None),
        ("The answer is A because it is dark", OTHERS[0], 0),
        ("The answer is A, not B", OTHERS[0], 0),
        ("A is wrong, the answer is D", OTHERS[0], 3),
        ("There are 3 people", OTHERS[1], 0),
        ("three", OTHERS[1], 0),
        ('A "stop" sign', OTHERS[0], None),
        ("No one is there", ("Yes", "No"), None),
        ("No, it is dark", ("Yes", "No"), 1),
        ("A. Black\nB. Red\nC. White\nD. Blue", OTHERS[0], None),
        ("(a) Black. (b) Red.", OTHERS[0], None),
        ("(A) 3 (B) 5 (C) 4 (D) 2", OTHERS[1], None),
        ("(A) No (B) Yes", ("No", "Yes"), None),
        ("A: no, B: yes, C: no", OTHERS[0], None),
        ("A. Black\nB. Red\nThe answer is B.", OTHERS[0], 1),
        ("B. It is red, e.g. at the door", OTHERS[0], 1),
        ("I don't think it is A", OTHERS[0], None),
        ("I cannot say it is (A)", OTHERS[0], None),
        ("It is not clear, but I think it is A", OTHERS[0], 0),
        ("I do not see it, so I choose A", OTHERS[0], 0),
        ("c", ("c", "a", "t"), None),
        ("(C)", ("c", "a", "t"), 2),
        ("(A) Blue", ("Blue", "Red", "Blue"), 0),
        ("Blue", ("Blue", "Red", "Blue"), None),
    ],
)
def test_what_stands_in_a_phrase_or_is_denied_is_not_chosen(reply, choices, index):
    assert read_choice(reply, choices).index == index


@pytest.mark.parametrize(
    ("reply", "rule"),
    [("(B)", "letter"), ("The answer is B.", "named"), ("It is red.", "text"), ("perhaps", "none")],
)
def test_the_rule_that_read_a_reply_is_told(reply, rule):
    assert read_choice(reply, OTHERS[0]).rule == rule
