"""Comparing texts in any script: words, word overlap, yes and no, and the judge built on them."""

import pytest

from flash_vstream.evaluate.judges import OfflineJudge
from flash_vstream.synthetic.texts import word_f1, words, yes_or_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red car!", ["red", "car"]),
        ("Three dogs", ["3", "dogs"]),
        ("Straße", ["strasse"]),
        ("ＡＢＣ １２", ["abc", "12"]),  # noqa: RUF001 - full-width letters
        ("man’s hat", ["man's", "hat"]),  # noqa: RUF001 - a typographic apostrophe
        ("一只猫", ["一", "只", "猫"]),
        ("เล่น", ["เ", "ล่", "น"]),
        ("سَيَّارة", ["سيارة"]),
        ("कुत्ता दौड़ता है", ["कुत्ता", "दौड़ता", "है"]),
        ("собака бежит", ["собака", "бежит"]),
        ("A", ["a"]),
        ("…!", []),
        ("", []),
    ],
)
def test_words_of_every_script(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("answer", "prediction"),
    [("猫", "犬"), ("猫", '"…"'), ("سيارة", "كلب"), ("A", "The"), ("猫", ""), ("…", "…"), ("собака", "кошка")],
)
def test_different_answers_in_other_scripts_are_wrong(answer, prediction):
    judgement = OfflineJudge().judge("?", answer, prediction)
    assert (judgement.correct, judgement.score) == (False, 0.0)


@pytest.mark.parametrize(
    ("answer", "prediction"),
    [
        ("猫", "猫。"),
        ("一只黑色的猫", "黑色的猫"),
        ("سيارة", "سَيَّارة"),
        ("Собака", "собака"),
        ("Café", "cafe\u0301"),
        ("A", "a."),
        ("No parking.", "no parking"),
    ],
)
def test_the_same_answer_in_other_scripts_is_right(answer, prediction):
    assert OfflineJudge().judge("?", answer, prediction).correct


def test_one_answer_for_all_does_not_score():
    answers = ["犬", "سيارة", "собака", "कुत्ता", "개", "A", "No parking."]
    assert not any(OfflineJudge().judge("?", answer, "猫").correct for answer in answers)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(("No.", "no"), ("no", "no"), ("No, it is dark", "no"), ("No it is not", "no"), ("NO!", "no"), ("(No)", "no")),
        *(("No parking.", None), ("No one", None), ("Nobody", None), ("Not now", None), ("None", None)),
        *(("Yes.", "yes"), ("yes there is", "yes"), ("Yeah!", "yes"), ("Yesterday", None)),
        *(("是的。", "yes"), ("不是", "no"), ("不，没有", "no"), ("نعم", "yes"), ("لا", "no"), ("Да.", "yes")),  # noqa: RUF001
        ("", None),
    ],
)
def test_yes_and_no(text, said):
    assert yes_or_no(text) == said


@pytest.mark.parametrize(("answer", "right"), [("No.", False), ("No parking.", True)])
def test_no_parking_is_not_a_no(answer, right):
    assert OfflineJudge().judge("?", answer, "No parking.").correct is right


def test_shared_words_count_in_every_script():
    assert word_f1("黑猫", "白猫") == pytest.approx(0.5)
    assert word_f1("سيارة حمراء", "سيارة زرقاء") == pytest.approx(0.5)
    assert word_f1("猫", "犬") == 0.0
