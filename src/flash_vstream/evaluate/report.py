"""Turn predictions into numbers: judge, count, and report with intervals and failures."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flash_vstream.errors import UserError
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.choices import letter_bias
from flash_vstream.evaluate.items import Benchmark
from flash_vstream.evaluate.judges import Judge, OfflineJudge
from flash_vstream.evaluate.records import JUDGEMENT, read_records
from flash_vstream.evaluate.scoring import is_right
from flash_vstream.evaluate.statistics import (
    FEWEST_GROUPS,
    bootstrap_interval,
    format_interval,
    kind_weights,
    paired_difference,
    weighted_kinds,
)
from flash_vstream.files import write_text_atomically

Rows = Sequence[dict[str, Any]]
_JUDGED = ("question", "answer", "prediction")
"""What a judge reads of a row."""


def judged(rows: Rows, judge: Judge, store: Path | None = None, workers: int = 8) -> list[dict[str, Any]]:
    """Rows with ``correct`` and, for open questions, the ``judgement``; a failed answer is wrong.

    Any judge other than the offline rules is called from up to ``workers`` threads. Its judgements are
    appended to ``store`` (JSONL) as they arrive, so an interrupted or failed run can resume.
    """
    slow = not isinstance(judge, OfflineJudge)
    judgements = _known_judgements(store, judge) if store is not None and slow else {}
    open_rows = [row for row in rows if _needs_judge(row) and row["error"] is None]
    missing = [row for row in open_rows if not _is_about(judgements.get(row["id"], {}), row)]
    for entry in _judge_all(missing, judge, workers if slow else 1):
        judgements[entry["id"]] = entry
        if store is not None and slow:
            with store.open("a") as file:
                file.write(json.dumps(entry) + "\n")
    results = []
    for row in rows:
        if row["choices"]:
            results.append({**row, "correct": row.get("chosen") == row["correct"] and row["error"] is None})
        elif not _needs_judge(row):
            results.append({**row, "correct": row["error"] is None and is_right(row)})
        elif row["error"] is not None:
            results.append({**row, "correct": False, "judgement": None})
        else:
            entry = judgements[row["id"]]
            results.append({**row, "correct": entry["correct"], "judgement": entry})
    return results


def _needs_judge(row: dict[str, Any]) -> bool:
    """Whether a row is an open answer that no rule of its benchmark scores."""
    return not row["choices"] and not row.get("scoring")


def _known_judgements(store: Path, judge: Judge) -> dict[str, dict[str, Any]]:
    """Earlier judgements of the same judge, by question id; a line cut short by a kill is dropped from the file."""
    if not store.exists():
        return {}
    entries = read_records(store, JUDGEMENT, "judgements", "move it away, or name another --output")
    write_text_atomically(store, "".join(json.dumps(entry) + "\n" for entry in entries))
    return {entry["id"]: entry for entry in entries if entry["judge"] == judge.name}


def _is_about(entry: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a judgement is of this prediction, question and answer."""
    return all(name in entry and entry[name] == row[name] for name in _JUDGED)


def _judge_all(rows: Rows, judge: Judge, workers: int) -> Iterator[dict[str, Any]]:
    """Yield judgements as they arrive, in any order; after the first error, start no more and raise it."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        said = judge.judge(row["question"], row["answer"], row["prediction"])
        return {"id": row["id"], "judge": judge.name, **{name: row[name] for name in _JUDGED}, **said.to_dict()}

    if workers == 1:
        yield from map(one, rows)
        return
    error: UserError | None = None
    waiting = iter(rows)
    with ThreadPoolExecutor(workers) as pool, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"judging by {judge.name}", total=len(rows))
        running = {pool.submit(one, row) for row in islice(waiting, workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    yield future.result()
                except UserError as failed:
                    error = error or failed
                progress.advance(task)
            if error is None:
                running |= {pool.submit(one, row) for row in islice(waiting, len(done))}
    if error is not None:
        raise error


def summary(rows: Rows, judge: Judge, benchmark: Benchmark) -> dict[str, Any]:
    """The report on judged rows, as plain values."""
    videos = [row["video"] for row in rows]
    kinds: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        kinds[row["kind"]].append(i)
    failed: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["error"] is not None:
            failed[row["error"]] += 1
    report: dict[str, Any] = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "run": rows[0]["run"],
        "questions": len(rows),
        "videos": len(set(videos)),
        "failed": sum(failed.values()),
        "failures": dict(sorted(failed.items(), key=lambda item: -item[1])[:20]),
        **_total(rows, benchmark),
        "kinds": {kind: _part([rows[i] for i in where]) for kind, where in sorted(kinds.items())},
        "categories": _categories(rows, benchmark),
        "published": dict(benchmark.published),
    }
    open_rows = [row for row in rows if _needs_judge(row)]
    if open_rows:
        report["judge"] = judge.name
        report["score"] = _score(open_rows)
        report["judge_tokens"] = sum(row["judgement"].get("tokens", 0) for row in open_rows if row["judgement"])
        report["unparsed"] = sum(1 for row in open_rows if row["judgement"] and not row["judgement"]["parsed"])
    chosen = [row for row in rows if row["choices"]]
    if chosen:
        report["read_by"] = dict(Counter(row.get("rule") or "none" for row in chosen if row["error"] is None))
        report["abstained"] = sum(1 for row in chosen if row["error"] is None and row["chosen"] is None)
        report["letters"] = letter_bias([row["chosen"] for row in chosen], [_truth(row) for row in chosen])
    return report


def _total(rows: Rows, benchmark: Benchmark) -> dict[str, Any]:
    """The headline as the benchmark defines it, and the plain share of right answers beside it."""
    correct, videos = [float(row["correct"]) for row in rows], [row["video"] for row in rows]
    share = sum(correct) / len(correct)
    if benchmark.total == "questions":
        return {"total": benchmark.total, "accuracy": share, "interval": bootstrap_interval(correct, videos)}
    kinds = [row["kind"] for row in rows]
    category_of = benchmark.categories if benchmark.total == "categories" else dict.fromkeys(kinds, "all")
    weights = kind_weights([(kind, category_of.get(kind, kind)) for kind in sorted(set(kinds))])
    accuracy, interval = weighted_kinds(correct, videos, kinds, weights)
    return {"total": benchmark.total, "accuracy": accuracy, "interval": interval, "of_questions": share}


def _categories(rows: Rows, benchmark: Benchmark) -> dict[str, Any]:
    """Each category's accuracy, as the benchmark defines it; empty where it has none."""
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["kind"] in benchmark.categories:
            parts[benchmark.categories[row["kind"]]].append(row)
    return {name: {"questions": len(part), **_total(part, benchmark)} for name, part in sorted(parts.items())}


def _truth(row: dict[str, Any]) -> int:
    return int(row["choices"].index(row["answer"]))


def _part(rows: Rows) -> dict[str, Any]:
    correct = [float(row["correct"]) for row in rows]
    part: dict[str, Any] = {"questions": len(rows), "accuracy": sum(correct) / len(rows)}
    part["interval"] = bootstrap_interval(correct, [row["video"] for row in rows])
    if _needs_judge(rows[0]):
        part["score"] = _score(rows)
    return part


def _score(rows: Rows) -> float:
    return sum(row["judgement"]["score"] if row["judgement"] else 0.0 for row in rows) / len(rows)


def headline(report: dict[str, Any]) -> str:
    """One line that says what was measured, including how many questions failed."""
    run = report["run"]
    text = (
        f"{report['title']} · {run['model']} · memory {run['memory']} · protocol {run['protocol']} · {run['fps']:g} fps"
    )
    if run.get("choice_by", "reply") != "reply":
        text += f" · choices by {run['choice_by']}"
    if report["failed"]:
        text += f" · INCOMPLETE: {report['failed']} of {report['questions']} questions failed and count as wrong"
    return text


def print_report(report: dict[str, Any]) -> None:
    """Print the report as a table, with judge, published results and failures below it."""
    console = Console(highlight=False)
    console.print(headline(report), style="bold", soft_wrap=True)
    table = Table("kind", "questions", "accuracy", "95% interval", *(["score"] if "score" in report else []))
    kinds = report["kinds"] if len(report["kinds"]) > 1 else {}
    for kind, part in {**kinds, **report["categories"], total_name(report): report}.items():
        cells = [kind, str(part["questions"]), f"{part['accuracy']:.1%}", format_interval(part["interval"])]
        table.add_row(*cells, *([f"{part['score']:.2f}"] if "score" in part else []), end_section=_ends(kind, report))
    console.print(table)
    _print_notes(console, [report])


def _print_notes(console: Console, reports: Sequence[dict[str, Any]]) -> None:
    """Print what a table of reports on the same questions leaves out: judge, replies, published results, failures."""
    first = reports[0]
    for report in reports:
        of = f" ({report['run']['memory']})" if len(reports) > 1 else ""
        if "judge" in report:
            cost = f", {report['judge_tokens']:,} tokens" if report["judge_tokens"] else ""
            console.print(
                f"judge{of}: {report['judge']}, {report['unparsed']} unreadable replies{cost}", soft_wrap=True
            )
        if "letters" in report:
            letters = ", ".join(
                f"{x}: {v['chosen']:.0%} chosen, {v['right']:.0%} right" for x, v in report["letters"].items()
            )
            rules = ", ".join(f"{rule} {count}" for rule, count in sorted(report["read_by"].items()))
            console.print(f"abstentions{of}: {report['abstained']}; replies read by: {rules}", soft_wrap=True)
            console.print(letters, soft_wrap=True)
    if first.get("judge") == OfflineJudge.name:
        console.print("The offline judge's numbers do not compare with published ones.", style="yellow")
    for name, value in first["published"].items():
        console.print(f"published: {name}: {value}", style="dim", soft_wrap=True)
    for report in reports:
        of = f" ({report['run']['memory']})" if len(reports) > 1 else ""
        for error, count in report["failures"].items():
            console.print(f"{count} x {error}{of}", style="red", soft_wrap=True, markup=False)


def total_name(report: dict[str, Any]) -> str:
    """What a table calls the headline figure."""
    return {"questions": "all", "kinds": "all (mean of kinds)", "categories": "all (mean of categories)"}[
        report["total"]
    ]


def _ends(name: str, report: dict[str, Any]) -> bool:
    """Whether a line follows a row of a table: after the last kind and the last category."""
    return name in (list(report["kinds"])[-1], *list(report["categories"])[-1:])


def compare(first: Rows, second: Rows) -> dict[str, Any]:
    """Compare two runs on the same questions: the paired difference, and which questions flipped.

    Both arguments are judged rows. Raises ``UserError`` when they have no question in common: other files of
    annotations may use the same ids.
    """

    def question(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["id"], row["question"], row["answer"]

    of_second = {question(row): row for row in second}
    pairs = [(row, of_second[question(row)]) for row in first if question(row) in of_second]
    if not pairs:
        raise UserError("the two files share no question; are they of the same benchmark?")
    a, b = ([float(row["correct"]) for row in side] for side in zip(*pairs, strict=True))
    difference, interval, p = paired_difference(a, b, [row["video"] for row, _ in pairs])
    gained = [y["id"] for x, y in pairs if y["correct"] and not x["correct"]]
    lost = [y["id"] for x, y in pairs if x["correct"] and not y["correct"]]
    return {
        "questions": len(pairs),
        "only_in_first": len(first) - len(pairs),
        "only_in_second": len(second) - len(pairs),
        "accuracy": [sum(a) / len(a), sum(b) / len(b)],
        "difference": difference,
        "interval": interval,
        "p_value": p,
        "gained": gained,
        "lost": lost,
    }


def print_comparison(result: dict[str, Any], names: tuple[str, str]) -> None:
    """Print a comparison."""
    console = Console(highlight=False)
    first, second = result["accuracy"]
    console.print(f"{names[0]}: {first:.1%}   {names[1]}: {second:.1%}   on {result['questions']} shared questions")
    text = f"difference {result['difference']:+.1%}"
    if result["interval"] is None:
        text += f" (no interval: fewer than {FEWEST_GROUPS} videos)"
    else:
        text += " (95% {:+.1%} to {:+.1%}, p = {:.3f})".format(*result["interval"], result["p_value"])
    console.print(text)
    for what in ("gained", "lost"):
        shown = ", ".join(result[what][:20]) + (" …" if len(result[what]) > 20 else "")
        console.print(f"{what} {len(result[what])}: {shown}", soft_wrap=True, markup=False)
    if result["only_in_first"] or result["only_in_second"]:
        console.print(f"not shared: {result['only_in_first']} and {result['only_in_second']} questions", style="yellow")


def print_side_by_side(reports: list[dict[str, Any]]) -> None:
    """Print reports on several memories as one table."""
    console = Console(highlight=False)
    for report in reports:
        console.print(headline(report), soft_wrap=True)
    table = Table("kind", "questions", *(report["run"]["memory"] for report in reports))
    first = reports[0]
    for group in ("kinds", "categories"):
        for name, part in first[group].items():
            cells = (f"{report[group][name]['accuracy']:.1%}" for report in reports)
            table.add_row(name, str(part["questions"]), *cells, end_section=_ends(name, first))
    spans = (f"{report['accuracy']:.1%} ({format_interval(report['interval'])})" for report in reports)
    table.add_row(f"{total_name(first)}, 95%", str(first["questions"]), *spans)
    console.print(table)
    _print_notes(console, reports)


def print_benchmarks(as_json: bool) -> None:
    """Print the available benchmarks: source, size and scoring."""
    if as_json:
        rows = [
            {
                "name": b.name,
                "title": b.title,
                "metric": b.metric,
                "protocol": b.protocol,
                "files": list(b.files),
                "media": list(b.media),
                "source": b.source,
                "size": b.size,
                "licence": b.licence,
                "published": dict(b.published),
            }
            for b in BENCHMARKS.values()
        ]
        print(json.dumps(rows, indent=2))
        return
    console = Console(highlight=False)
    for b in BENCHMARKS.values():
        console.print(f"[bold]{b.name}[/bold]  {b.title}: {b.size}; {b.metric} questions, {b.protocol} by default")
        console.print(f"    from {b.source}; {b.licence}", soft_wrap=True)
        console.print(f"    in --data: {' or '.join(b.files)}; media in {' or '.join(b.media)}", soft_wrap=True)
        for who, value in b.published.items():
            console.print(f"    published: {who}: {value}", style="dim", soft_wrap=True)
