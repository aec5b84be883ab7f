"""Guidance: which words a description leans towards, and which questions ask for one."""

from types import SimpleNamespace

import pytest
import torch

from flash_vstream.memory import StarConfig, StarMemory
from flash_vstream.models.grounding import Grounder, Grounding, Words
from flash_vstream.models.guidance import MOST, SHARE, Guide, Guided
from flash_vstream.models.hints import Hinter

WORDS = {" dog": 3, " man": 5, " grass": 6, " red": 9}


class WholeWords:
    """A tokenizer that has a token for each of ``WORDS``, and for letters."""

    def __call__(self, texts, return_offsets_mapping=False, **_):
        rows = [[WORDS[text]] if text in WORDS else [10 + ord(letter) % 50 for letter in text] for text in texts]
        return SimpleNamespace(input_ids=rows, offset_mapping=[[(i, i + 1) for i in range(len(row))] for row in rows])


@pytest.fixture
def grounder() -> Grounder:
    torch.manual_seed(0)
    grounding = Grounding(6, 8, width=8, heads=2, members=2, common=4).eval()
    torch.nn.init.constant_(grounding.each()[0].mark.bias, -100.0)  # no event anywhere
    torch.nn.init.constant_(grounding.each()[1].mark.bias, -100.0)
    return Grounder(grounding, Words(WholeWords(), torch.randn(64, 8)))


def test_words_that_fit_gain_what_others_lose():
    logits = torch.randn(12)
    guided = Guided(torch.tensor([3, 5, 6]), torch.tensor([1.0, -1.0, 0.0]))
    leaning = guided.lean(logits, [])
    rest = [i for i in range(12) if i not in (3, 5, 6)]
    torch.testing.assert_close(leaning[rest], logits[rest])
    torch.testing.assert_close(leaning.softmax(0)[rest], logits.softmax(0)[rest])
    gained = leaning - logits
    torch.testing.assert_close(gained[3] - gained[5], torch.tensor(2.0))
    assert gained[3] > gained[6] > gained[5]


def test_a_word_that_was_said_gains_no_more_but_may_lose():
    logits = torch.zeros(12)
    guided = Guided(torch.tensor([3, 5, 6]), torch.tensor([1.0, -1.0, 0.0]))
    leaning = guided.lean(logits, [3, 5])
    torch.testing.assert_close(leaning[3], leaning[6])
    torch.testing.assert_close(leaning[3] - leaning[5], torch.tensor(1.0))


@pytest.mark.parametrize("token", [5, 8])
def test_a_token_that_is_certain_stays_so(token):
    logits = torch.full((12,), -torch.inf)
    logits[token] = 0.0
    torch.testing.assert_close(Guided(torch.tensor([3, 5]), torch.tensor([1.0, -1.0])).lean(logits, []), logits)


def test_a_word_gains_by_fitting_a_frame_better_than_common_pictures(grounder):
    grounding = grounder.grounding
    frame, common = torch.randn(1, 4, 6) * 3, torch.randn(1, 4, 6) * 3
    grounding.choose_common(common, grounder.words, ["dog", "man", "skateboards", "grass", "red"])
    guide = Guide(grounder)
    assert guide.tokens.tolist() == [3, 5, 6, 9]  # skateboards has more tokens than one
    added = guide.about(frame).lean(torch.zeros(64), [])[guide.tokens]
    vocabulary = grounding.read_vocabulary(grounder.words.embed_words(["dog", "man", "grass", "red"]))
    better = [grounding.word_fits(vocabulary, grounding.sights(shown))[:, 0] for shown in (frame, common)]
    wanted = SHARE * (better[0] - better[1]).clamp(-MOST, MOST)
    torch.testing.assert_close(added - added[0], wanted - wanted[0], atol=2e-3, rtol=0)
    assert wanted.max() - wanted.min() > 0.1
    usual = guide.about(common).lean(torch.zeros(64), [])[guide.tokens]
    torch.testing.assert_close(usual, torch.zeros(4), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("question", "time"),
    [
        ("What is happening now?", 20.0),
        ("Describe the scene.", 20.0),
        ("What do you see?", 20.0),
        ("What happened last?", 20.0),
        ("What happened at 9s?", 9.0),
        ("What happened 11 seconds ago?", 9.0),
        ("How did it begin?", 0.0),
        ("What was the first thing that you saw?", 0.0),
        ("What happened between 4s and 9s?", None),  # two frames
        ("What happened after that?", None),
        ("Did you see a dog?", None),
        ("When did a dog run?", None),
        ("Who are you?", None),
        ("Hello!", None),
    ],
)
def test_questions_that_ask_for_the_description_of_one_frame(grounder, question, time):
    times = torch.tensor([0.0, 4.0, 9.0, 13.0, 20.0])
    config = StarConfig(
        spatial_size=2, temporal_size=2, temporal_length=3, abstract_length=0, longterm_length=8, longterm_size=2
    )
    memory = StarMemory(config, 6)
    frames = torch.randn(5, 4, 6)
    memory.write(frames, times)
    (hints,) = Hinter(grounder).hints([question], memory.read())
    if time is None:
        assert hints.frame is None
    else:
        torch.testing.assert_close(hints.frame.float(), frames[times.tolist().index(time)][None], atol=2e-3, rtol=2e-3)
