"""A short ``bench chaos`` against a real server: no promise of docs/reliability.md may break."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from flash_vstream.bench.chaos import LOWER_PRIORITY, Chaos, Holdings
from flash_vstream.bench.chaos_blows import KILLS, KINDS, Blow
from flash_vstream.bench.chaos_clock import SteppedClock
from flash_vstream.bench.chaos_fuzz import check_installed
from flash_vstream.bench.chaos_report import judge_gaps, leaks, left_behind
from flash_vstream.bench.chaos_witnesses import Gap, Witness
from flash_vstream.bench.chaos_world import Slowness
from flash_vstream.errors import UserError

MINUTES = 0.8


@pytest.fixture
def folder():
    """A folder with a short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="fs", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.mark.slow  # its length on a quiet machine has not been measured yet
def test_every_process_may_be_killed(tiny_folder, folder):
    """One kill of each, and nothing else: no promise breaks.

    How long a witness is without frames is for the benchmark to judge, on a machine with nothing else to do.
    """
    shared = folder / "shared"
    shared.mkdir()
    chaos = Chaos(str(tiny_folder), 3, folder, shared, Console(stderr=True), KILLS, callers=0)
    report = chaos.run(0)
    assert [line for line in report["broken"] if " was without frames for " not in line] == []
    assert set(report["blows"]) == set(KILLS)
    assert report["answered"] >= len(KILLS)


# --- all at once: under a minute of trouble, but two to four with all that is waited for


@pytest.fixture(scope="module")
def done(tiny_folder):
    """One run as a user starts it."""
    command = [sys.executable, "-m", "flash_vstream", "bench", "chaos", "--model", str(tiny_folder)]
    return subprocess.run(
        [*command, "--minutes", str(MINUTES), "--seed", "3"], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def report(done):
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_promise_is_broken(done, report):
    assert report["broken"] == []
    assert done.returncode == 0
    assert "No promise was broken." in done.stderr


@pytest.mark.slow
def test_everything_was_tried(report):
    """Otherwise nothing would be shown by it."""
    assert set(report["blows"]) == set(KINDS)
    assert all(report["statuses"].get(status, 0) > 0 for status in ("200", "201", "204", "400", "404", "422", "left"))
    assert report["requests"] > 100
    assert report["answered"] > 0
    assert all(witness["frames"] > 60 for witness in report["witnesses"].values())


# --- the benchmark notices what it is there for


def status(kept: int, lag: float = 0.0, time: float | None = None) -> dict:
    return {"kept": kept, "time": kept / 2 if time is None else time, "lag": lag}


def test_a_witness_s_gap_is_known_however_late_a_status_is():
    witness = Witness("w", fps=2.0)
    witness.see(status(1), 100.0, 1, 0)
    witness.see(status(2), 100.5, 1, 0)
    witness.see(status(12, lag=0.5), 106.0, 1, 0)  # asked for late: ten frames in five seconds are no gap
    witness.see(status(13), 113.5, 1, 0)
    assert [gap.seconds for gap in witness.gaps] == pytest.approx([0.5, 0.5, 8.0])
    assert (witness.frames, witness.broken) == (13, [])


def test_a_witness_that_goes_back_or_forgets_is_noticed():
    witness = Witness("w", fps=2.0)
    witness.see(status(10), 100.0, 1, 0)
    witness.see(status(11, time=4.0), 100.5, 1, 0)
    witness.see(status(3), 130.0, 2, kept_at_least=4)
    witness.see(status(4), 130.5, 2, kept_at_least=4)
    assert ["went back" in line for line in witness.broken] == [True, False]
    assert "4 had been saved" in witness.broken[1]


@pytest.mark.parametrize(
    ("kind", "stream", "explained"),
    [("reader", "w", True), ("reader", "other", False), ("frame worker", None, True), ("fork server", None, False)],
)
def test_only_what_was_struck_may_pause(kind, stream, explained):
    blow = Blow(kind, at=100.0, stream=stream, seconds=2.0)
    assert blow.explains("w", Gap(99.8, 103.0, 3.2)) == explained
    assert not blow.explains("w", Gap(90.0, 99.0, 9.0))
    assert not blow.explains("w", Gap(103.0, 110.0, 7.0))


@pytest.mark.parametrize(("kind", "seconds", "factor", "late"), [
    ("fork server", 4.0, 1.0, True),
    ("fork server", 4.0, 2.0, False),  # the machine was busy with other programs
    ("frame worker", 4.0, 1.0, False),
    ("frame worker", 14.0, 1.0, True),
])  # fmt: skip
def test_a_witness_may_pause_no_longer_than_the_machine_needs(kind, seconds, factor, late):
    witness = Witness("w", fps=2.0)
    witness.gaps = [Gap(100.0, 100.0 + seconds, seconds)]
    slowness = [Slowness(90.0, 50.0), Slowness(101.0, factor)]
    longest, broken = judge_gaps(witness, [Blow(kind, 100.5, None, 1.0)], slowness)
    assert bool(broken) == late
    assert longest["frame worker" if kind == "frame worker" else "nothing"] == seconds


def holdings(**changed) -> Holdings:
    held = {"processes": {"server": 1}, "descriptors": {"server": 30}, "shared_files": 4}
    return Holdings(**{**held, "temporary_files": [], "questions": 0, "clips": 0, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"questions": 1},
        {"clips": 1},
        {"processes": {"server": 1, "readers": 1}},
        {"descriptors": {"server": 90}},
        {"shared_files": 5},
        {"temporary_files": ["clip"]},
    ],
)
def test_what_is_left_behind_is_a_leak(changed):
    assert leaks(holdings(), holdings()) == []
    assert len(leaks(holdings(), holdings(**changed))) == 1


@pytest.mark.parametrize("left", [{"exit_code": -9}, {"processes": ["reader"]}, {"temporary_files": ["pymp-1"]}])
def test_what_a_stopped_server_leaves_is_noticed(left):
    clean = {"exit_code": 0, "processes": [], "shared_files": [], "temporary_files": []}
    assert left_behind(clean) == []
    assert len(left_behind(clean | left)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_callers_give_way_and_a_server_that_is_started_again_does_not(monkeypatch, tmp_path):
    priorities = {}

    def note(who):
        return lambda *_: priorities.setdefault(who, os.getpriority(os.PRIO_PROCESS, 0))

    chaos = object.__new__(Chaos)
    chaos.seed, chaos.folder, chaos.callers, chaos.tally = 0, tmp_path, 1, SimpleNamespace(statuses={})
    chaos.blows = SimpleNamespace(run=note("blows"), rounds=1, dealt=[])  # these start the server again
    chaos._caller = lambda name: SimpleNamespace(run=note("callers"))
    monkeypatch.setattr("flash_vstream.bench.chaos.fuzz", note("fuzz"))
    chaos._disturb(0, lambda text: None)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    lower = min(19, usual + LOWER_PRIORITY)
    assert priorities == {"callers": lower, "fuzz": lower, "blows": usual}


def test_the_stepped_clock_is_followed_by_children(tmp_path):
    clock = SteppedClock(tmp_path)
    code = "import time, sys; print(time.time(), flush=True); sys.stdin.readline(); print(time.time(), time.time_ns())"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | clock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        before = float(child.stdout.readline())
        clock.offset = -86400.0
        after, nanoseconds = child.communicate("\n")[0].split()
    assert float(after) - before == pytest.approx(-86400, abs=600)
    assert float(after) == pytest.approx(int(nanoseconds) / 1e9, abs=600)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "schemathesis", None)
    with pytest.raises(UserError, match="pip install schemathesis"):
        check_installed()
