"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated

import typer

from flash_vstream.errors import UserError
from flash_vstream.timecode import parse_time

Model = Annotated[
    str, typer.Option("--model", help="A model's name, a model folder or a hub id: ORG/MODEL or ORG/MODEL@REVISION.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1.  \\[default: a GPU if there is one]")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.  \\[default: the device's fastest]")
]
Attn = Annotated[
    str | None, typer.Option("--attn", help="sdpa, flash_attention_2 or eager; only eager shows evidence.")
]
Bits = Annotated[int | None, typer.Option("--bits", help="4 or 8: quantized weights, by bitsandbytes or torchao.")]
Memory = Annotated[str, typer.Option("--memory", help="star (the model's own), recent:N, uniform:N or all.")]
Pair = Annotated[
    str | None, typer.Option("--pair", help="SigLIP or CLIP that finds what a question asks for: a folder or hub id.")
]
LanguageEngine = Annotated[
    str | None, typer.Option("--language-engine", help="vllm=http://HOST:PORT/v1: vLLM runs the language model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Fps = Annotated[float, typer.Option("--fps", help="Frames per second of stream time to look at.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder with the annotations and media.")]
Describe = Annotated[
    str | None, typer.Option("--describe", help="Describe changes, at most once per this interval, such as 10s.")
]


Record = Annotated[
    str | None,
    typer.Option("--record", help="Keep the newest frames of every stream in --state, up to this size, such as 2GB."),
]


def record_bytes(text: str | None) -> int | None:
    """The bytes in ``--record``; raises ``UserError`` for what is no size, or too small."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])B", text.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"--record {text} is not a size; write it as 500MB or 2GB")
    from flash_vstream.serve.recordings import LEAST_BYTES

    size = round(float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2].upper()])
    if size < LEAST_BYTES:
        raise UserError(f"--record {text} is too little; give it at least {LEAST_BYTES / 1e6:.0f}MB")
    return size


def describe_seconds(text: str | None) -> float | None:
    """The seconds in ``--describe``; raises ``UserError`` for what is no duration above 0."""
    if text is None:
        return None
    seconds = parse_time(text)
    if seconds <= 0:
        raise UserError(f"--describe {text} must be above 0; say how often, such as 10s")
    return seconds
