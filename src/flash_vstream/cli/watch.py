"""``watch``: a live source with a status line and a prompt; watching continues while an answer is printed.

With ``--tell`` or ``--describe`` there is no prompt: ``tell`` prints alerts and captions.
"""

import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from flash_vstream.cli.options import (
    Attn,
    Bits,
    Describe,
    Device,
    Dtype,
    Fps,
    Json,
    LanguageEngine,
    Memory,
    Model,
    Pair,
    describe_seconds,
)
from flash_vstream.cli.tell import Tell, dry_run, tell_live
from flash_vstream.cli.terminal import clean_end_on_signals, describe_evidence, interrupts_wait, load_pipeline
from flash_vstream.errors import UserError
from flash_vstream.models.choice import ModelChoice
from flash_vstream.timecode import format_time

if TYPE_CHECKING:
    from flash_vstream.live.streams import LiveStreams
    from flash_vstream.pipeline import FlashVStream

STREAM = "watch"
FIRST_FRAME_SECONDS = 30.0


def watch(
    source: Annotated[str, typer.Argument(help="A file, rtsp://…, http(s)://…, /dev/video0, a folder, or -.")],
    fps: Fps = 1.0,
    model: Model = "nano",
    loop: Annotated[bool, typer.Option("--loop", help="Restart a file at its end.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Read a file as fast as possible, not at its own pace.")] = False,
    transport: Annotated[str, typer.Option("--transport", help="RTSP over tcp or udp.")] = "tcp",
    memory: Memory = "star",
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    bits: Bits = None,
    pair: Pair = None,
    language_engine: LanguageEngine = None,
    tell: Annotated[
        list[str] | None,
        typer.Option("--tell", help="Alert when this happens, instead of taking questions (repeatable)."),
    ] = None,
    when: Annotated[str, typer.Option("--when", help="When to alert: starts, ends, every (both) or lasts.")] = (
        "starts"
    ),
    min_seconds: Annotated[float, typer.Option("--min-seconds", help="How long it must last.")] = 2.0,
    cooldown: Annotated[float, typer.Option("--cooldown", help="Minimum seconds between alerts.")] = 60.0,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Confidence above which the event counts as present.")
    ] = 0.5,
    describe: Describe = None,
    rehearse: Annotated[
        bool,
        typer.Option("--dry-run", help="Read a recording at full speed and print the alerts it would have raised."),
    ] = False,
    expect: Annotated[
        list[str] | None,
        typer.Option("--expect", help="When it really happens, such as 12s-1:05 (repeatable), to score --dry-run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch a live source: answer questions as you type them, or print alerts and descriptions."""
    choice = ModelChoice(model, device, dtype, attn, bits, memory, pair=pair, language_engine=language_engine)
    told = None
    if tell or describe:
        told = Tell(
            tuple(tell or ()), when, min_seconds, cooldown, threshold, tuple(expect or ()), as_json,
            describe_seconds(describe),
        )  # fmt: skip
    if told is None and as_json:
        raise UserError('--json prints alerts and descriptions; add --tell, such as --tell "a dog", or --describe 10s')
    if told is None and rehearse:
        raise UserError('--dry-run belongs to --tell and --describe; say what to look out for, such as --tell "a dog"')
    if expect and not (rehearse and tell):
        raise UserError('--expect scores the --dry-run of a --tell; add both, such as --tell "a dog" --dry-run')
    if told is not None:
        told.rule(fps)  # fail before anything is loaded
        told.intervals()
    if rehearse and told is not None:
        from flash_vstream.video import probe

        probe(source)
        dry_run(source, fps, load_pipeline(choice), told)
        return
    watch_source(source, fps, choice, loop, fast, transport, told)


def watch_source(
    source_name: str,
    fps: float,
    model: str | ModelChoice,
    loop: bool,
    fast: bool,
    transport: str,
    tell: Tell | None = None,
) -> None:
    """Watch ``source_name`` and answer questions from the prompt (or from lines on standard input), or ``tell``.

    Ctrl-C ends it at any time: as soon as the model is loaded, before the first frame, at the prompt, or during an
    answer. So do SIGTERM and SIGHUP, with the exit code that shells expect. Either way, processes end and shared
    memory is released.
    """
    from flash_vstream.live.fork_server import ensure_fork_server
    from flash_vstream.video.sources import Source

    with clean_end_on_signals(), suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        piped = source_name == "-"
        path = _pump_stdin(Path(folder)) if piped else source_name
        source = Source(path, fps, pace="fast" if fast else "real", loop=loop, transport=transport).checked()
        with interrupts_wait():  # a library that is interrupted while it is imported may abort the process
            ensure_fork_server(ModelChoice.of(model))
            from flash_vstream.live.streams import LiveStreams

            pipeline = load_pipeline(model)
        with LiveStreams(model) as live:
            live.add(STREAM, source)
            _wait_for_frame(live)
            if tell is not None:
                tell_live(live, STREAM, fps, pipeline, tell)
                return
            console = Console(highlight=False, emoji=False)
            for question in _questions(live, piped):
                try:
                    _answer(live, pipeline, question, console)
                except UserError as error:  # the next question may do better
                    Console(stderr=True).print(str(error), markup=False)


def _pump_stdin(folder: Path) -> str:
    """Copy standard input to a named pipe, so that another process can read it; returns the pipe's path."""
    path = folder / "stdin"
    os.mkfifo(path)

    def pump() -> None:
        with open(path, "wb") as pipe:
            try:
                while chunk := os.read(sys.stdin.fileno(), 65536):
                    pipe.write(chunk)
                    pipe.flush()
            except BrokenPipeError:
                pass  # the reader is gone

    threading.Thread(target=pump, daemon=True).start()
    return str(path)


def _wait_for_frame(live: "LiveStreams") -> None:
    deadline = time.monotonic() + FIRST_FRAME_SECONDS
    with Console(stderr=True).status("waiting for the first frame"):
        while live.status(STREAM).time is None:
            status = live.status(STREAM)
            if status.state == "failed":
                raise UserError(status.error or f"{status.source} cannot be watched")
            if time.monotonic() > deadline:
                why = status.error or "nothing came"
                raise UserError(f"no frame of {status.source} within {FIRST_FRAME_SECONDS:.0f} s ({why})")
            time.sleep(0.05)


class StatusLine:
    """One line about the stream: state, time, frame rates, lag and memory slots.

    Rates cover about the last five seconds.
    """

    def __init__(self, live: "LiveStreams"):
        self._live = live
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=10)

    def __call__(self) -> str:
        from flash_vstream.live.published import read_memory_table

        status, shared = self._live.status(STREAM), self._live.shared_state(STREAM)
        self._marks.append((time.monotonic(), status.came, status.kept))
        parts = [status.source, status.state, format_time(status.time or 0.0)]
        (start, came, kept), (now, *_) = self._marks[0], self._marks[-1]
        if now > start:
            rates = [count / (now - start) for count in (status.came - came, status.kept - kept)]
            parts.append("{:.1f} frames/s in, {:.1f} kept".format(*rates))
        if status.skipped:
            parts.append(f"{status.skipped} skipped")
        if status.state == "live" and status.lag is not None:
            parts.append(f"lag {status.lag:.1f} s")
        parts.append(f"{len(read_memory_table(shared).slots)} memory slots")
        if status.restarts:
            parts.append(f"{status.restarts} restarts")
        return " · ".join(parts)


def _questions(live: "LiveStreams", piped: bool) -> Iterator[str]:
    """Questions as the user types them, until Ctrl-D or Ctrl-C."""
    if piped:
        try:
            with open("/dev/tty") as terminal:
                yield from _lines(terminal)
        except OSError:
            raise UserError("with - as the source, questions are typed at a terminal, and there is none") from None
        return
    if not sys.stdin.isatty():
        yield from _lines(sys.stdin)
        return
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("ask> ", bottom_toolbar=StatusLine(live), refresh_interval=0.5)
    while True:
        try:
            question = session.prompt().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question:
            yield question


def _lines(file: TextIO) -> Iterator[str]:
    yield from (line.strip() for line in file if line.strip())


def _answer(live: "LiveStreams", pipeline: "FlashVStream", question: str, console: Console) -> None:
    snapshot = live.snapshot(STREAM, pipeline)
    assert snapshot is not None  # the first frame has arrived
    answer = pipeline.ask(snapshot, question)
    console.print(f"[bold]{format_time(snapshot.time)}[/bold]  ", end="")
    for piece in answer:
        console.print(piece, end="", markup=False, soft_wrap=True)
    console.print(f"\n  [dim]{describe_evidence(answer)}[/dim]", soft_wrap=True)
