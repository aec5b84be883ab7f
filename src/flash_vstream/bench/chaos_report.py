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
from flash_vstream.bench.chaos_world import Slowness

if TYPE_CHECKING:
    from flash_vstream.bench.chaos import Chaos, Holdings

GAP_SECONDS = {"nothing": 3.0, "reader": 6.0, "frame worker": 10.0, "server": 30.0}
"""How long a witness may be without frames when nothing that concerns it was struck, and after a kill; on a machine
that is slow because of others, so many times longer."""
MORE_DESCRIPTORS = 4
"""Descriptors that may come and go: an answer being closed, a database file being opened."""
MOST_SHOWN = 20


def judge(
    chaos: "Chaos",
    before: "Holdings",
    after: "Holdings",
    left: dict[str, Any],
    slowness: list[Slowness],
    seconds: float,
) -> dict[str, Any]:
    """The report as plain values; ``broken`` lists the promises that were not kept."""
    blows, tally = chaos.blows, chaos.tally
    broken = [*tally.broken, *blows.broken, *chaos.witnesses.broken, *chaos.server.tracebacks]
    witnesses = {}
    for name, witness in chaos.witnesses.streams.items():
        gaps, late = judge_gaps(witness, blows.dealt, slowness)
        witnesses[name] = {"frames": witness.frames, "longest_gap_seconds": gaps}
        broken += witness.broken + late
        if not witness.frames:
            broken.append(f"{name} had no frame")
    broken += leaks(before, after) + left_behind(left)
    seconds_by_kind: dict[str, list[float]] = defaultdict(list)
    for blow in blows.dealt:
        seconds_by_kind[blow.kind].append(blow.seconds)
    health = sorted(chaos.witnesses.status_seconds)
    factors = [factor for _, factor in slowness] or [1.0]
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
        "slowness": {"median": statistics.median(factors), "longest": max(factors)},
        "status_request_seconds": {"median": statistics.median(health), "longest": health[-1]},
        "before": vars(before),
        "after": vars(after),
        "left": left,
        "broken": broken,
    }


def judge_gaps(witness: Witness, dealt: list[Blow], slowness: list[Slowness]) -> tuple[dict[str, float], list[str]]:
    """A witness's longest gap by what explains it (``nothing``, or which kill), and those that were too long."""
    longest, broken = dict.fromkeys(GAP_SECONDS, 0.0), []
    for gap in witness.gaps:
        causes = [blow.kind for blow in dealt if blow.explains(witness.name, gap)]
        cause = max(causes, key=list(GAP_SECONDS).index, default="nothing")
        longest[cause] = max(longest[cause], round(gap.seconds, 2))
        factors = [factor for at, factor in slowness if gap.start - 1 <= at <= gap.end]
        factor = max(1.0, statistics.mean(factors)) if factors else 1.0
        if gap.seconds > factor * GAP_SECONDS[cause]:
            why = "no blow explains it" if cause == "nothing" else f"after a kill ({cause})"
            broken.append(f"{witness.name} was without frames for {gap.seconds:.1f} s, {why}")
    return longest, broken


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
    title = f"Witnesses; everything took {report['slowness']['median']:.1f} times as long as on an idle machine"
    kills = [f"{kind} killed" for kind in GAP_SECONDS if kind != "nothing"]
    table = Table("witness", "frames", "longest gap", *kills, title=title)
    for name, row in report["witnesses"].items():
        table.add_row(name, str(row["frames"]), *(f"{row['longest_gap_seconds'][kind]:.1f} s" for kind in GAP_SECONDS))
    return table
