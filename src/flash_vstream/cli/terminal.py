"""Terminal helpers shared by several commands."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from flash_vstream.imports import no_garbage
from flash_vstream.timecode import format_time

if TYPE_CHECKING:
    from flash_vstream.models.answer import Answer
    from flash_vstream.models.choice import ModelChoice
    from flash_vstream.pipeline import FlashVStream

SHOWN_EVIDENCE = 4


def load_pipeline(model: "str | ModelChoice") -> "FlashVStream":
    """Load a pipeline by model name, folder or hub id, with a status line on stderr meanwhile."""
    with Console(stderr=True).status(f"loading {model}") as status, no_garbage():
        from flash_vstream.models.choice import ModelChoice
        from flash_vstream.models.kept import kept_folder
        from flash_vstream.pipeline import FlashVStream

        if kept_folder(ModelChoice.of(model)) is None:
            from flash_vstream.models.hub import fetch_model, silence_transformers

            silence_transformers()  # the status line is enough
            fetch_model(str(model), status.update)
        pipeline = FlashVStream.for_answers(model)
        pipeline.prepare_answers()
        return pipeline


def describe_evidence(answer: "Answer") -> str:
    """The evidence for an answer in words, as rich markup.

    Lists the slots with the largest shares of attention (``looked at 0 s-4 s (temporal, 31%), …``),
    preceded by the events named in the question (``found "a dog" at 12 s, …``).
    """
    ranked = sorted(answer.evidence, key=lambda slot: -(slot.share or 0.0))[:SHOWN_EVIDENCE]
    slots = []
    for slot in ranked:
        span = "-".join(dict.fromkeys((format_time(slot.start), format_time(slot.end))))
        share = f", {slot.share:.0%}" if slot.share is not None else ""
        slots.append(f"{span} ({slot.part}{share})")
    named = [
        f'"{escape(mention.text)}" at {format_time(mention.time)}' if mention.seen else f'no "{escape(mention.text)}"'
        for mention in answer.mentions
    ]
    found = f"found {', '.join(named)}; " if named else ""
    return f"{found}looked at {', '.join(slots)}"


@contextmanager
def clean_end_on_signals() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP end the program like Ctrl-C, running every ``with`` and ``finally``.

    A signal that is ignored (SIGHUP under nohup) stays ignored. The exit code is 128 plus the signal's
    number, as shells expect.
    """

    def end(number: int, _: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a closing terminal sends several
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Within the block, Ctrl-C does nothing yet; ``KeyboardInterrupt`` is raised when the block ends."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
