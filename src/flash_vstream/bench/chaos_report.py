"""The report of ``bench chaos``: what came back, what recovered, what is left; and which promises were broken."""

import json
import signal
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flash_vstream.bench.chaos_blows import KINDS, Blow
from flash_vstream.bench.chaos_witnesses import Witness

if TYPE_CHECKING:
    from flash_vstream.bench.chaos import Chaos, Holdings

BYSTANDER_SECONDS = 6.0
"""How long a witness may be without frames when nothing that concerns it was struck, on a busy machine."""
KILLED_SECONDS = {"reader": 30.0, "frame worker": 30.0, "server": 120.0}
"""How long a witness may be without frames after a kill; an idle machine needs a tenth of it."""
MORE_DESCRIPTORS = 4
"""Descriptors that may come and go: an answer being closed, a database file being opened."""
MOST_SHOWN = 20


def judge(
    chaos: "Chaos", before: "Holdings", after: "Holdings", left: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The report as plain values; ``broken`` lists the promises that were not kept."""
    blows, tally = chaos.blows, chaos.tally
    witnesses = {name: _witness(witness, blows.dealt) for name, witness in chaos.witnesses.streams.items()}
    broken = [*tally.broken, *blows.broken, *chaos.witnesses.broken, *chaos.server.tracebacks]
    for name, witness in chaos.witnesses.streams.items():
        broken += witness.broken
        longest = witnesses[name]["longest_gap_seconds"]
        if longest > BYSTANDER_SECONDS:
            broken.append(f"{name} was without frames for {longest:.1f} s, and no blow explains it")
        for kind, gap in witnesses[name]["longest_gap_after_kill_seconds"].items():
            if gap > KILLED_SECONDS[kind]:
                broken.append(f"{name} was without frames for {gap:.1f} s after a kill ({kind})")
        if not witness.frames:
            broken.append(f"{name} had no frame")
    broken += leaks(before, after) + left_behind(left)
    seconds_by_kind: dict[str, list[float]] = defaultdict(list)
    for blow in blows.dealt:
        seconds_by_kind[blow.kind].append(blow.seconds)
    health = sorted(chaos.witnesses.health_seconds)
    return {
        "model": chaos.server.model,
        "seed": chaos.seed,
        "seconds": round(seconds, 1),
        "requests": sum(tally.statuses.values()),
        "statuses": dict(sorted(tally.statuses.items())),
        "answered": tally.answered,
        "blows": {
            kind: {"count": len(took), "median_seconds": statistics.median(took), "longest_seconds": max(took)}
            for kind in KINDS
            if (took := seconds_by_kind.get(kind))
        },
        "skipped": blows.skipped,
        "witnesses": witnesses,
        "status_request_seconds": {"median": statistics.median(health), "longest": health[-1]},
        "before": vars(before),
        "after": vars(after),
        "left": left,
        "broken": broken,
    }


def _witness(witness: Witness, dealt: list[Blow]) -> dict[str, Any]:
    """A witness's frames, its longest gap that no blow explains, and the longest that each kind of blow explains."""
    unexplained, explained = 0.0, dict.fromkeys(KILLED_SECONDS, 0.0)
    for gap in witness.gaps:
        causes = [blow.kind for blow in dealt if blow.explains(witness.name, gap)]
        if not causes:
            unexplained = max(unexplained, gap.seconds)
        else:
            cause = max(causes, key=list(explained).index)
            explained[cause] = max(explained[cause], gap.seconds)
    return {
        "frames": witness.frames,
        "longest_gap_seconds": round(unexplained, 2),
        "longest_gap_after_kill_seconds": {kind: round(seconds, 2) for kind, seconds in explained.items()},
    }


def leaks(before: "Holdings", after: "Holdings") -> list[str]:
    """What the server holds ``after`` everybody has left that it did not hold ``before``."""
    found = []
    for what in ("questions", "clips"):
        if getattr(after, what):
            found.append(f"{getattr(after, what)} {what} are still in progress, though nobody waits for them")
    for what in ("processes", "shared_files", "temporary_files"):
        if getattr(after, what) != getattr(before, what):
            found.append(f"{what.replace('_', ' ')}: {getattr(before, what)} before, {getattr(after, what)} after")
    for kind, count in after.descriptors.items():
        if count > before.descriptors.get(kind, 0) + MORE_DESCRIPTORS:
            found.append(f"descriptors of the {kind} process: {before.descriptors.get(kind)} before, {count} after")
    return found


def left_behind(left: dict[str, Any]) -> list[str]:
    """What a server that has stopped left behind."""
    found = []
    if left["exit_code"] not in (0, 128 + signal.SIGINT):
        found.append(f"the server did not stop cleanly: exit code {left['exit_code']}")
    for what in ("processes", "shared_files", "temporary_files"):
        if left[what]:
            found.append(f"{what.replace('_', ' ')} left by the stopped server: {', '.join(left[what][:MOST_SHOWN])}")
    return found


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print a table on ``console`` and the report as one line of JSON on stdout."""
    console.print(_requests(report), _blows(report), _streams(report))
    for kind, reason in report["skipped"].items():
        console.print(f"{kind} skipped: {reason}", style="yellow")
    for line in report["broken"][:MOST_SHOWN]:
        console.print(f"broken: {line}", style="red", markup=False)
    if len(report["broken"]) > MOST_SHOWN:
        console.print(f"and {len(report['broken']) - MOST_SHOWN} more, in the JSON", style="red")
    if not report["broken"]:
        console.print("No promise was broken.", style="green")
    print(json.dumps(report), flush=True)


def _requests(report: dict[str, Any]) -> Table:
    table = Table("response", "requests", title=f"{report['requests']:,} requests, seed {report['seed']}")
    for status, count in report["statuses"].items():
        table.add_row(status, f"{count:,}")
    return table


def _blows(report: dict[str, Any]) -> Table:
    table = Table("blow", "count", "all well again after (median)", "longest", title="Blows")
    for kind, row in report["blows"].items():
        table.add_row(kind, str(row["count"]), f"{row['median_seconds']:.1f} s", f"{row['longest_seconds']:.1f} s")
    return table


def _streams(report: dict[str, Any]) -> Table:
    kinds = tuple(KILLED_SECONDS)
    table = Table("witness", "frames", "longest gap", *(f"{kind} killed" for kind in kinds), title="Witnesses")
    for name, row in report["witnesses"].items():
        after = row["longest_gap_after_kill_seconds"]
        gaps = [f"{row['longest_gap_seconds']:.1f} s", *(f"{after[kind]:.1f} s" for kind in kinds)]
        table.add_row(name, str(row["frames"]), *gaps)
    return table
