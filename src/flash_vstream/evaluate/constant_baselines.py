"""Scores of constant answers, judged like a model's answers: the baseline for using no model at all."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flash_vstream.errors import UserError
from flash_vstream.evaluate.items import LETTERS, Benchmark, Item
from flash_vstream.evaluate.judges import OfflineJudge
from flash_vstream.evaluate.statistics import bootstrap_interval, format_interval


def constant_baselines(benchmark: Benchmark, items: Sequence[Item]) -> dict[str, Any]:
    """Accuracy of answers that ignore both video and question.

    For multiple choice: always the same letter, the most frequent correct letter, and a uniform guess.
    For open questions: "Yes.", "No." and the most frequent answer, judged by the offline judge. Questions
    that a benchmark scores by a rule of its own are left out; ``UserError`` when there are no others.
    """
    items = [item for item in items if not item.scoring]
    if not items:
        raise UserError(f"{benchmark.title} scores its answers by a rule of its own; no constant answer suits it")
    videos = [item.video for item in items]
    scored: dict[str, Any] = {}
    if items[0].choices:
        right = [item.correct for item in items]
        for i in range(max(len(item.choices) for item in items)):
            scored[f"always {LETTERS[i]}"] = _scored([float(truth == i) for truth in right], videos)
        most = Counter(right).most_common(1)[0][0]
        assert most is not None
        scored[f"majority ({LETTERS[most]})"] = scored[f"always {LETTERS[most]}"]
        scored["uniform guess"] = {"accuracy": sum(1 / len(item.choices) for item in items) / len(items)}
    else:
        judge = OfflineJudge()
        frequent = Counter(item.answer.strip(" .") + "." for item in items).most_common(1)[0][0]
        for said in dict.fromkeys(("Yes.", "No.", frequent)):
            verdicts = [judge.judge(item.question, item.answer, said) for item in items]
            part = _scored([float(verdict.correct) for verdict in verdicts], videos)
            scored[f"always {said!r}"] = {**part, "score": sum(verdict.score for verdict in verdicts) / len(items)}
    counts = {"questions": len(items), "videos": len(set(videos))}
    return {"benchmark": benchmark.name, "title": benchmark.title, **counts, "baselines": scored}


def _scored(correct: list[float], videos: list[str]) -> dict[str, Any]:
    return {"accuracy": sum(correct) / len(correct), "interval": bootstrap_interval(correct, videos)}


def print_constant_baselines(report: dict[str, Any]) -> None:
    """Print the baselines as a table."""
    table = Table("answer", "accuracy", "95% interval", title=f"{report['title']}: {report['questions']} questions")
    for name, part in report["baselines"].items():
        interval = format_interval(part.get("interval"))
        table.add_row(name, f"{part['accuracy']:.1%}", interval)
    Console().print(table)
