"""``bench compare``: nano beside llama.cpp on the GGUF that nano is made of, in turns, as ratios with their targets.

Two programs on one machine are only comparable while both feel the same neighbours, so they take turns and the medians
of the ratios of neighbouring turns are reported. llama.cpp comes from node-llama-cpp, which picks the fastest of the
builds that it brings for the processor.
"""

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from flash_vstream.bench.agreement import measure_agreement
from flash_vstream.bench.crowds import MOST_TOGETHER, TOGETHER, measure_questions, measure_streams
from flash_vstream.bench.live import long_question, workers
from flash_vstream.bench.offline import Work, bench_memory, count_work, longterm_milliseconds, matrix_rate
from flash_vstream.bench.starts import first_word_seconds, help_seconds, ready_seconds
from flash_vstream.errors import UserError
from flash_vstream.pipeline import FlashVStream, Stream
from flash_vstream.sample_clips import STREET
from flash_vstream.video import read_frames
from flash_vstream.wheels import fetch

ROUNDS = 5
TOKENS = 48
"""Tokens that each side generates in a turn."""
MEMORY_FRAMES = 10_000
STREAM_SECONDS = 20.0
"""How long each number of streams is watched."""
PEER = Path("node_modules") / "node-llama-cpp"
_LLAMA_CPP = Path(__file__).with_name("llama_cpp.mjs")


@dataclass(frozen=True)
class Figure:
    """A measured ``value`` and its ``target``, which it should reach, or stay below if ``at_most``; None for none."""

    name: str
    value: float
    target: float | None = None
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the target is met."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        if self.target is None:
            return f"{self.name}: {self.value:.3g}"
        bound = f"at {'most' if self.at_most else 'least'} {self.target:g}"
        return f"{self.name}: {self.value:.3g} ({bound}: {'met' if self.met else 'missed'})"


def run_compare(rounds: int = ROUNDS) -> None:
    """Measure nano and llama.cpp in turns, then what else of nano has a target.

    Prints each figure as it is found, and JSON as the last line on stdout. Raises ``UserError`` if node-llama-cpp is
    not installed in the current folder.
    """
    from flash_vstream.models.hub import pull, silence_transformers

    node = find_peer(Path.cwd())
    silence_transformers()
    work = count_work(pull("nano"))
    pipeline = FlashVStream.from_pretrained("nano")
    console = Console(stderr=True)
    engine, threads = pipeline.generator.engine.name, torch.get_num_threads()
    console.print(f"engine {engine}, {threads} threads, medians of {rounds} rounds")
    figures = []
    parts: tuple[Callable[[], Iterable[Figure]], ...] = (
        lambda: _beside_llama_cpp(pipeline, work, node, rounds),
        lambda: _alone(pipeline, work),
        _memory,
        _starts,
        _crowds,
    )
    for part in parts:
        for figure in part():
            console.print(f"  {figure}")
            figures.append(asdict(figure) | {"met": figure.met})
    agreement = measure_agreement(pipeline)
    lost = Figure("differing answers lose (nats a token)", agreement["lost"], 0.05)
    console.print(f"  {lost}; {agreement['equal']:.0%} of {agreement['answers']} answers are PyTorch's in float32")
    figures.append(asdict(lost) | {"met": lost.met})
    report = {"engine": engine, "threads": threads, "rounds": rounds, "agreement": agreement, "figures": figures}
    print(json.dumps(report))


def _beside_llama_cpp(pipeline: FlashVStream, work: Work, node: str, rounds: int) -> Iterator[Figure]:
    from flash_vstream.models.nano import LANGUAGE

    (gguf,) = fetch([LANGUAGE], lambda _: None)
    stream, threads = _filled_stream(pipeline), torch.get_num_threads()
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(rounds):
        ours = _answer(pipeline, stream)
        pairs.append((ours, run_peer(node, gguf, threads, int(ours["prompt_tokens"]), TOKENS)))
    yield Figure("tokens/s, of llama.cpp's", _median(a["rate"] / b["rate"] for a, b in pairs), 0.6, at_most=False)
    yield Figure("cold first token, of llama.cpp's", _median(a["first"] / b["first"] for a, b in pairs), 1.2)
    for side, name in ((0, "nano"), (1, "llama.cpp")):
        yield Figure(f"tokens/s, {name}", _median(pair[side]["rate"] for pair in pairs))
        yield Figure(f"cold first token, {name} (s)", _median(pair[side]["first"] for pair in pairs))
    token_seconds = 2 * work.language / matrix_rate(torch.float32)
    share = _median(token_seconds * ours["prompt_tokens"] / ours["first"] for ours, _ in pairs)
    yield Figure("reading a cold prompt, of the operations limit", share)


def _alone(pipeline: FlashVStream, work: Work) -> Iterator[Figure]:
    warm = _warm_first_token(pipeline, _filled_stream(pipeline))
    yield Figure("first token when the memory was read ahead (s)", warm, 0.05)
    single, batch = _encoding(pipeline, 1), _encoding(pipeline, 16)
    yield Figure("encoding, one frame at a time (frames/s)", single, 100, at_most=False)
    yield Figure("encoding, 16 frames at a time (frames/s)", batch, 200, at_most=False)
    limit = matrix_rate(torch.float32) / work.encoding
    yield Figure("encoding, 16 frames at a time, of the operations limit", batch / limit)
    yield Figure("decoding, scaling and cropping a frame, of encoding one", _preparing(pipeline) * single, 1.0)


def _memory() -> Iterator[Figure]:
    found = bench_memory(MEMORY_FRAMES)
    newest = list(found["ms_per_frame_at"].values())[-1]
    yield Figure("memory update, of the bytes limit", newest / found["limit_ms_bytes_moved_over_bandwidth"], 1.2)
    yield Figure(f"memory update at frame {MEMORY_FRAMES:,}, of frame 300", found["late_over_early"], 1.1)
    yield Figure("long-term memory of 512 (ms/frame)", longterm_milliseconds(), 1.0)


def _starts() -> Iterator[Figure]:
    clip = fetch([STREET])[0]
    first_word_seconds(clip)  # what is compiled once
    yield Figure("flash-vstream --help (s)", _median(help_seconds() for _ in range(ROUNDS)), 0.3)
    yield Figure("flash-vstream ask, to the first word (s)", _median(first_word_seconds(clip) for _ in range(3)), 3.0)
    yield Figure("flash-vstream serve, until it is ready (s)", _median(ready_seconds() for _ in range(3)), 3.0)


def _crowds() -> Iterator[Figure]:
    with workers("nano") as (live, client):
        found = measure_questions(live, client)
        yield Figure("first token right after a new frame (s)", found["fresh_first_token_seconds"], 0.05)
        yield Figure(f"{TOGETHER} questions at once, of one after another", found["together"], 0.35)
        yield Figure("first token of a late-comer (s)", found["late_first_token_seconds"], 0.5)
        yield Figure(f"answered of {MOST_TOGETHER} at once", found["answered"], MOST_TOGETHER, at_most=False)
        yield Figure("slowest of them, of the median", found["unfair"])
        streams = measure_streams(live, client, STREAM_SECONDS)
        yield Figure("most streams at 1 frame/s with lag p95 of at most 1 s", streams["most"])


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
    answer = pipeline.ask(stream.snapshot(), long_question(), max_new_tokens=TOKENS).finish()
    first, rate = answer.first_token_seconds or 0.0, answer.tokens_per_second or 0.0
    return {"first": first, "rate": rate, "prompt_tokens": answer.prompt_tokens}


def _warm_first_token(pipeline: FlashVStream, stream: Stream) -> float:
    prefix = pipeline.generator.read(stream.snapshot())
    answers = [pipeline.ask(prefix, long_question(), max_new_tokens=1).finish() for _ in range(ROUNDS)]
    return _median(answer.first_token_seconds or 0.0 for answer in answers)


def _encoding(pipeline: FlashVStream, batch: int) -> float:
    """Frames per second through the vision tower, without what prepares their pixels."""
    size = pipeline.processor.image_processor.size
    frames = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    pixels = pipeline.processor.image_processor.pixels(frames)
    pipeline.model.encode(pixels)
    return batch / _median(_seconds(lambda: pipeline.model.encode(pixels)) for _ in range(20))


def _preparing(pipeline: FlashVStream) -> float:
    """Seconds to decode a frame of a clip, to scale and to crop it, and to make it pixels."""
    processor = pipeline.processor.image_processor
    clip = fetch([STREET])[0]

    def prepare() -> int:
        frames = [processor.pixels(frame.image[None]) for frame in read_frames(clip, None, processor.size)]
        return len(frames)

    count = prepare()
    return _median(_seconds(prepare) for _ in range(3)) / count


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
