"""``bench compare``: nano beside llama.cpp on the GGUF that nano is made of, in turns, as ratios with their targets.

Two programs on one machine are only comparable while both feel the same neighbours, so they take turns and the medians
of the ratios of neighbouring turns are reported. llama.cpp comes from node-llama-cpp, which picks the fastest of the
builds that it brings for the processor.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from flash_vstream.bench.agreement import measure_agreement
from flash_vstream.errors import UserError
from flash_vstream.pipeline import FlashVStream, Stream

ROUNDS = 5
TOKENS = 48
"""Tokens that each side generates in a turn."""
TOGETHER = 20
"""Questions that are asked at once."""
QUESTION = "Tell me everything that you have seen so far, from the first scene to the last."
PEER = Path("node_modules") / "node-llama-cpp"
_LLAMA_CPP = Path(__file__).with_name("llama_cpp.mjs")


@dataclass(frozen=True)
class Figure:
    """A measured ``value`` and its ``target``, which it should reach, or stay below if ``at_most``."""

    name: str
    value: float
    target: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value <= self.target if self.at_most else self.value >= self.target


def run_compare(rounds: int = ROUNDS) -> None:
    """Measure nano and llama.cpp in turns; prints a table, and JSON as the last line on stdout.

    Raises ``UserError`` if node-llama-cpp is not installed in the current folder.
    """
    from flash_vstream.models.hub import pull
    from flash_vstream.models.nano import LANGUAGE
    from flash_vstream.wheels import fetch

    node = find_peer(Path.cwd())
    pull("nano")
    (gguf,) = fetch([LANGUAGE], lambda _: None)
    pipeline = FlashVStream.from_pretrained("nano")
    stream = _filled_stream(pipeline)
    threads = torch.get_num_threads()
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(rounds):
        ours.append(_answer(pipeline, stream))
        theirs.append(run_peer(node, gguf, threads, int(ours[-1]["prompt_tokens"]), TOKENS))
    pairs = list(zip(ours, theirs, strict=True))
    agreement = measure_agreement(pipeline)
    figures = [
        Figure("tokens/s, of llama.cpp's", _median(a["rate"] / b["rate"] for a, b in pairs), 0.6, False),
        Figure("cold first token, of llama.cpp's", _median(a["first"] / b["first"] for a, b in pairs), 1.2, True),
        Figure("first token when the memory was read ahead (s)", _warm_first_token(pipeline, stream), 0.05, True),
        Figure(f"{TOGETHER} questions at once, of one after another", _together(pipeline, stream), 0.35, True),
        Figure("encoding, one frame at a time (frames/s)", _encoding(pipeline, 1), 100, False),
        Figure("encoding, 16 frames at a time (frames/s)", _encoding(pipeline, 16), 200, False),
        Figure("differing answers lose (nats a token)", agreement["lost"], 0.05, True),
        Figure("flash-vstream --help (s)", _help_seconds(), 0.3, True),
    ]
    console = Console(stderr=True)
    console.print(f"engine {pipeline.generator.engine.name}, {threads} threads, medians of {rounds} rounds")
    for figure in figures:
        bound = f"at {'most' if figure.at_most else 'least'} {figure.target:g}"
        console.print(f"  {figure.name}: {figure.value:.3g} ({bound}: {'met' if figure.met else 'missed'})")
    console.print(f"  {agreement['equal']:.0%} of {agreement['answers']} answers are those of PyTorch in float32")
    report = {"engine": pipeline.generator.engine.name, "threads": threads, "rounds": rounds, "agreement": agreement}
    print(json.dumps(report | {"figures": [asdict(figure) | {"met": figure.met} for figure in figures]}))


def find_peer(folder: Path) -> str:
    """The ``node`` program, if node-llama-cpp is installed in ``folder``; raises ``UserError`` otherwise."""
    node = shutil.which("node")
    if node is None or not (folder / PEER).is_dir():
        raise UserError(
            "bench compare runs llama.cpp beside nano, and needs Node.js and node-llama-cpp; "
            "run `npm install node-llama-cpp` in this folder first"
        )
    return node


def run_peer(node: str, gguf: Path, threads: int, prompt: int, generated: int) -> dict[str, float]:
    """llama.cpp's seconds to the ``first`` token after ``prompt`` tokens, and its ``rate`` after it in tokens/s."""
    library = Path.cwd() / PEER / "dist" / "index.js"
    command = [str(word) for word in (node, _LLAMA_CPP, library, gguf, threads, prompt, generated)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"llama.cpp could not be run through node-llama-cpp: {last}") from None
    return values


def _filled_stream(pipeline: FlashVStream) -> Stream:
    """A stream whose memory is full, of frames that are all different."""
    size = pipeline.processor.image_processor.size
    random = np.random.default_rng(0)
    stream = pipeline.new_stream()
    for second in range(40):
        stream.write([random.integers(0, 256, (size, size, 3), dtype=np.uint8)], [float(second)])
    return stream


def _answer(pipeline: FlashVStream, stream: Stream) -> dict[str, float]:
    """The same of nano, and the number of its ``prompt_tokens``."""
    answer = pipeline.ask(stream.snapshot(), QUESTION, max_new_tokens=TOKENS).finish()
    first, rate = answer.first_token_seconds or 0.0, answer.tokens_per_second or 0.0
    return {"first": first, "rate": rate, "prompt_tokens": answer.prompt_tokens}


def _warm_first_token(pipeline: FlashVStream, stream: Stream) -> float:
    prefix = pipeline.generator.read(stream.snapshot())
    answers = [pipeline.ask(prefix, QUESTION, max_new_tokens=1).finish() for _ in range(ROUNDS)]
    return _median(answer.first_token_seconds or 0.0 for answer in answers)


def _together(pipeline: FlashVStream, stream: Stream) -> float:
    """The time of questions that are asked at once, as a share of their times one after another."""
    generator = pipeline.generator
    prefix = generator.read(stream.snapshot())
    questions = [f"{QUESTION} Begin with scene {number}." for number in range(TOGETHER)]

    def alone() -> None:
        for question in questions:
            generator.ask(prefix, question, max_new_tokens=TOKENS).finish()

    def at_once() -> None:
        answers = [generator.ask(prefix, question, max_new_tokens=TOKENS) for question in questions]
        for answer in answers:
            generator.begin(answer)
        while still := [answer for answer in answers if generator.is_open(answer)]:
            generator.advance(still)

    return _median(_seconds(at_once) / _seconds(alone) for _ in range(2))


def _encoding(pipeline: FlashVStream, batch: int) -> float:
    """Frames per second through the vision tower, without what prepares their pixels."""
    size = pipeline.processor.image_processor.size
    frames = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    pixels = pipeline.processor.image_processor.pixels(frames)
    pipeline.model.encode(pixels)
    return batch / _median(_seconds(lambda: pipeline.model.encode(pixels)) for _ in range(20))


def _help_seconds() -> float:
    command = [sys.executable, "-m", "flash_vstream", "--help"]
    return _median(_seconds(lambda: subprocess.run(command, capture_output=True, check=True)) for _ in range(ROUNDS))


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
