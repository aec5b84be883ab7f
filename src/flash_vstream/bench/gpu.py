"""``bench gpu``: first-token latency and peak memory at the real models' sizes, with random weights.

This is the first paper's headline figure, and it needs no checkpoint: neither depends on what the weights say. Frames
are random features in changing scenes, written to this project's memory and to the released code's, which keeps
every frame; what encoding a frame costs is measured apart. Nothing here needs FFmpeg, OpenVINO or a server.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from flash_vstream.errors import UserError
from flash_vstream.evaluate.plots import check_plot, pyplot
from flash_vstream.memory import StarConfig
from flash_vstream.models import FlashVStreamConfig, FlashVStreamForConditionalGeneration, FlashVStreamProcessor
from flash_vstream.models.flash_qwen import SIDE, FlashQwenFamily, FlashQwenProcessor, FlashVStreamQwen, flash_star
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.interface import Memory
from flash_vstream.models.vlm import TransformersVlm
from flash_vstream.models.vlm_families import Qwen3Vl
from flash_vstream.models.vlm_processing import VlmProcessor
from flash_vstream.pipeline import FlashVStream

COUNTS = (1, 10, 100, 1000, 10_000)
QUESTION = "What is happening now?"
TOKENS = 4
"""The first is what is measured."""
CELL_SECONDS = 120.0
"""A memory that takes longer than this from one count of frames to the next is given up."""
CLIP = 100
"""Frames in a write while a memory grows; the last of them come one by one."""
TIMED_WRITES = 5
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'][0]['text'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]


@dataclass(frozen=True)
class Sizes:
    """How to build a model of certain sizes with random weights, and the memory of the released code, if it has one."""

    build: Callable[[], tuple[Any, FlashVStreamProcessor]]
    released: bool


def run_gpu_bench(model: str, most: int, device: str | None, output: Path | None = None) -> None:
    """Measure the models named by ``model`` (or all, or tiny), print a table, and JSON on the last line of stdout.

    Each row is printed on stderr as it is measured, so that a run that is cut off leaves what it has. With ``output``,
    also plots them.
    """
    if device is None and not torch.cuda.is_available():
        raise UserError("there is no GPU here; to try it on a CPU: bench gpu --model tiny --device cpu")
    tiny = [name for name in SIZES if name.startswith("tiny")]
    chosen = {"all": [name for name in SIZES if name not in tiny], "tiny": tiny}.get(model, [model])
    if unknown := [name for name in chosen if name not in SIZES]:
        raise UserError(f"bench gpu has no sizes called {unknown[0]!r}; choose from {', '.join(SIZES)}, tiny or all")
    check_plot(output)
    device = device or "cuda"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = [row for name in chosen for row in bench_sizes(name, most, device, dtype)]
    _print_table(rows)
    print(json.dumps({"gpu": rows, "device": _device_name(device), "question_tokens": TOKENS}), flush=True)
    if output is not None:
        plot(rows, output)


def bench_sizes(name: str, most: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of figures for one model: for each memory and number of frames up to ``most``."""
    pipeline = _built(SIZES[name], device, dtype)
    encode = _encode_seconds(pipeline)
    pipeline.ask(None, QUESTION, max_new_tokens=2).finish()  # warm
    rows = []
    for memory in ("star", "release") if SIZES[name].released else ("star",):
        for row in _grown(pipeline, memory, most):
            rows.append({"model": name, "encode_ms": 1000 * encode, **row})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    del pipeline
    gc.collect()  # so that the next model finds the space
    return rows


def _built(sizes: Sizes, device: str, dtype: torch.dtype) -> FlashVStream:
    """The model on ``device``, made there, so that it never takes space on the CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model, processor = sizes.build()
    finally:
        torch.set_default_dtype(before)
    return FlashVStream(model.train(False), processor)


def _encode_seconds(pipeline: FlashVStream) -> float:
    """Seconds to encode a frame alone: the median of five, after one to warm up."""
    size, seconds = pipeline.processor.image_processor.size, []
    for _ in range(6):
        started = time.perf_counter()
        pipeline.encode(np.zeros((1, size, size, 3), np.uint8))
        _wait(pipeline)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def _new_memory(pipeline: FlashVStream, kind: str) -> Memory:
    star: StarConfig = pipeline.model.config.star
    if kind == "release":
        star = StarConfig.from_dict({**star.to_dict(), "compat": "release", "longterm_length": 0})
    memory: Memory = pipeline.model.new_memory(star=star)
    return memory


def _grown(pipeline: FlashVStream, kind: str, most: int) -> Iterator[dict[str, Any]]:
    """Figures for one memory as it grows; those that do not fit or take too long are not measured."""
    device, (tokens, channels) = pipeline.model.device, pipeline.model.feature_shape
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(16, tokens, channels, generator=generator).to(device, pipeline.model.dtype)
    memory, given_up = _new_memory(pipeline, kind), False
    for count in (count for count in COUNTS if count <= most):
        row: dict[str, Any] = {"memory": kind, "frames": count, "measured": False}
        if not given_up:
            try:
                _reset_peak(pipeline)
                writing = _fill(pipeline, memory, count, scenes)
                given_up = writing is None
                if writing is not None:
                    row |= _asked(pipeline, memory) | {"write_ms": 1000 * writing, "measured": True}
            except torch.OutOfMemoryError:
                given_up = True
        yield row


def _fill(pipeline: FlashVStream, memory: Memory, count: int, scenes: torch.Tensor) -> float | None:
    """Write frames until there are ``count``; the median seconds of a single frame, or None if it takes too long.

    Frames of a scene differ by a third of what scenes differ by.
    """
    begun, alone = time.perf_counter(), []
    while memory.frames < count:
        left = count - memory.frames
        size = min(CLIP, left - TIMED_WRITES) if left > TIMED_WRITES and memory.frames else 1
        numbers = range(memory.frames, memory.frames + size)
        clip = scenes[torch.tensor(numbers) // 5 % len(scenes)]
        clip = clip + torch.randn_like(clip) / 3
        _wait(pipeline)
        started = time.perf_counter()
        memory.write(clip, [float(number) for number in numbers])
        _wait(pipeline)
        if size == 1:
            alone.append(time.perf_counter() - started)
        if time.perf_counter() - begun > CELL_SECONDS:
            return None
    return float(np.median(alone[-TIMED_WRITES:]))


def _asked(pipeline: FlashVStream, memory: Memory) -> dict[str, Any]:
    """Latency of a question that reads the memory itself, and of one after it was read; peak memory of all that."""
    cold = [pipeline.ask(memory.read(), QUESTION, max_new_tokens=TOKENS).finish() for _ in range(3)]
    prefix = pipeline.generator.read(memory.read())
    warm = [pipeline.ask(prefix, QUESTION, max_new_tokens=TOKENS).finish() for _ in range(3)]
    return {
        "first_token_seconds": float(np.median([answer.first_token_seconds or 0.0 for answer in cold])),
        "warm_first_token_seconds": float(np.median([answer.first_token_seconds or 0.0 for answer in warm])),
        "prompt_tokens": cold[0].prompt_tokens,
        "memory_bytes": memory.nbytes,
        "peak_bytes": _peak(pipeline),
    }


def _wait(pipeline: FlashVStream) -> None:
    if pipeline.model.device.type == "cuda":
        torch.cuda.synchronize(pipeline.model.device)


def _reset_peak(pipeline: FlashVStream) -> None:
    if pipeline.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipeline.model.device)


def _peak(pipeline: FlashVStream) -> int:
    """The most memory that tensors took on the GPU since ``_reset_peak``; on a CPU, what the process takes now."""
    if pipeline.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(pipeline.model.device)
    return int(psutil.Process().memory_info().rss)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("model", "memory", "frames", "encode", "write", "first token", "read ahead", "memory", "peak")
    for row in rows:
        cells = [row["model"], row["memory"], f"{row['frames']:,}", f"{row['encode_ms']:.1f} ms"]
        if row["measured"]:
            cells += [f"{row['write_ms']:.2f} ms", f"{row['first_token_seconds']:.3f} s"]
            cells += [f"{row['warm_first_token_seconds']:.3f} s", f"{row['memory_bytes'] / 2**20:,.0f} MiB"]
            cells.append(f"{row['peak_bytes'] / 2**30:.2f} GiB")
        else:
            cells.append("not measured: too long or too large")
        table.add_row(*cells)
    Console(stderr=True).print(table)


def plot(rows: list[dict[str, Any]], output: Path) -> None:
    """Plot first token and peak memory against the number of frames, each model's memories beside each other."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    values = {"first token, s": ("first_token_seconds", 1), "peak memory, GiB": ("peak_bytes", 2**30)}
    for axis, (title, (name, unit)) in zip(axes, values.items(), strict=True):
        for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            for memory, style in (("star", "-"), ("release", "--")):
                own = [r for r in rows if (r["model"], r["memory"], r["measured"]) == (model, memory, True)]
                label = f"{model}, {'this project' if memory == 'star' else 'released code'}"
                places = [row["frames"] for row in own], [row[name] / unit for row in own]
                if own:
                    axis.plot(*places, style, marker="o", color=f"C{number}", label=label)
        axis.set(xscale="log", xlabel="frames seen", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)


# --- the models


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and the chat marks, for models whose weights mean nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": MARKS})
    fast.chat_template = CHATML
    return fast


def _llava(vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, FlashVStreamProcessor]:
    config = FlashVStreamConfig(CLIPVisionConfig(patch_size=14, **vision), LlamaConfig(**text))
    model = FlashVStreamForConditionalGeneration(config)
    return model, FlashVStreamProcessor(FrameProcessor(config.vision_config.image_size), byte_tokenizer())


def _flash_qwen(
    vision: dict[str, Any], text: dict[str, Any], sections: list[int], side: int = SIDE
) -> tuple[Any, FlashVStreamProcessor]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    family = FlashQwenFamily(config, side)
    model = FlashVStreamQwen(Qwen2VLForConditionalGeneration(config), family, flash_star({}, side))
    return model, FlashQwenProcessor(FrameProcessor(family.pixels), byte_tokenizer(), family)


def _qwen3(
    vision: dict[str, Any], text: dict[str, Any], sections: list[int], side: int | None = None
) -> tuple[Any, FlashVStreamProcessor]:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
    config = Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    family = Qwen3Vl(config, side)
    model = TransformersVlm(Qwen3VLForConditionalGeneration(config), family)
    return model, VlmProcessor(FrameProcessor(family.pixels), byte_tokenizer(), family)


_VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_VICUNA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16}
_QWEN2 = {
    **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
    **{"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768},
}
_QWEN3_VISION = {
    **{"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560},
    "deepstack_visual_indexes": [5, 11, 17],
}
_QWEN3 = {
    **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144},
}
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_TINY_LANGUAGE = {**_TINY, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512}
_TINY_QWEN2_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
_TINY_QWEN3_VISION = {
    **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32},
    "deepstack_visual_indexes": [0],
}
SIZES = {
    "flash-vstream-7b": Sizes(lambda: _llava({**_VIT_L, "image_size": 224}, {**_VICUNA, "vocab_size": 32000}), True),
    "flash-vstream-qwen-7b": Sizes(lambda: _flash_qwen(_QWEN2_VISION, _QWEN2, [16, 24, 24]), True),
    "qwen3-vl-4b": Sizes(lambda: _qwen3(_QWEN3_VISION, _QWEN3, [24, 20, 20]), False),
    "tiny": Sizes(lambda: _llava({**_TINY, "image_size": 112}, {**_TINY, "vocab_size": 512}), True),
    "tiny-qwen": Sizes(lambda: _flash_qwen(_TINY_QWEN2_VISION, _TINY_LANGUAGE, [2, 1, 1], 4), True),
    "tiny-qwen3-vl": Sizes(lambda: _qwen3(_TINY_QWEN3_VISION, _TINY_LANGUAGE, [2, 1, 1], 4), False),
}
