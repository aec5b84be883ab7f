"""``bench compare`` and ``bench agreement``: how figures and differences are told."""

import math

from flash_vstream.bench.agreement import compared
from flash_vstream.bench.compare import Figure
from flash_vstream.bench.offline import count_work
from flash_vstream.models import FlashVStreamForConditionalGeneration
from helpers.cli import run


def test_a_figure_says_whether_its_target_is_met():
    assert str(Figure("start (s)", 2.5, 3.0)) == "start (s): 2.5 (at most 3: met)"
    assert str(Figure("rate", 0.5, 0.6, at_most=False)) == "rate: 0.5 (at least 0.6: missed)"
    assert str(Figure("streams", 12)) == "streams: 12"
    assert Figure("streams", 12).met is None


def test_the_work_of_a_model_is_counted_whichever_engine_runs_it(tiny_folder):
    model = FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder)
    work = count_work(tiny_folder)
    assert work.language == sum(parameter.numel() for parameter in model.language_model.parameters())
    assert work.encoding > 2 * sum(p.numel() for p in model.vision_tower.parameters() if p.ndim > 1)


def row(kind: str, truth: str, reply: str, correct: bool) -> dict:
    return {"kind": kind, "truth": truth, "reply": reply, "correct": correct}


def test_what_quantisation_changes_is_counted_both_ways():
    reference = [row("count", "1", "one", True), row("count", "2", "two", True), row("short", "red", "blue", False)]
    ours = [row("count", "1", "one", True), row("count", "2", "three", False), row("short", "red", "green", False)]
    found = compared(ours, reference)
    assert (found["gained"], found["lost"], found["questions"]) == (0, 1, 3)
    assert math.isclose(found["points"], -100 / 3)
    assert math.isclose(found["equal"], 1 / 3)
    assert found["scores"]["count"] == {"ours": 0.5, "reference": 1.0}


def test_agreement_needs_pictures(tmp_path):
    done = run("bench", "agreement")
    assert (done.returncode, "needs --data" in done.stderr) == (2, True)
    done = run("bench", "agreement", "--data", tmp_path)
    assert (done.returncode, "cannot read" in done.stderr) == (2, True)
