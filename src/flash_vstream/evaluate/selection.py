"""Resolve command-line names to a benchmark, its data folder and a judge."""

import os
from pathlib import Path

from rich.console import Console

from flash_vstream.errors import UserError
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.endpoint import ChatEndpoint
from flash_vstream.evaluate.items import Benchmark
from flash_vstream.evaluate.judges import EndpointJudge, Judge, OfflineJudge

DEFAULT_FPS = {"vstream-qa-mini": 2.0, "clips": 2.0}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark called ``name``. Raises ``UserError`` listing the available names."""
    if name not in BENCHMARKS:
        raise UserError(
            f"no benchmark is called {name!r}; choose from {', '.join(BENCHMARKS)} (eval list explains each)"
        )
    return BENCHMARKS[name]


def find_judge(benchmark: Benchmark, judge: str, judge_model: str | None, folder: Path | None = None) -> Judge:
    """The judge for ``offline``, ``similarity``, or an endpoint URL together with ``judge_model``.

    ``folder`` is the benchmark's data; the offline judge of ``clips`` compares with all its captions.
    """
    if judge == "offline":
        if benchmark.name == "vstream-qa-mini":
            from flash_vstream.evaluate.mini import MiniJudge

            return MiniJudge()
        if benchmark.name == "clips":
            from flash_vstream.evaluate.clips import ClipJudge

            return ClipJudge(data_folder(benchmark, folder))
        return OfflineJudge()
    if judge == "similarity":
        from flash_vstream.evaluate.similarity import SimilarityJudge

        return SimilarityJudge()
    if not judge.startswith(("http://", "https://")):
        raise UserError(f"--judge {judge!r} must be offline, similarity, or the URL of an OpenAI-compatible endpoint")
    if not judge_model:
        raise UserError("--judge with a URL needs --judge-model, the model to ask there")
    return EndpointJudge(ChatEndpoint(judge, judge_model, os.environ.get("OPENAI_API_KEY")))


def data_folder(benchmark: Benchmark, data: Path | None) -> Path:
    """The benchmark's data folder; without one, the mini benchmark is built, and that of clips from its clips."""
    if data is not None and benchmark.name == "clips" and not (data / benchmark.files[0]).exists():
        from flash_vstream.evaluate.clips import build_clips

        with Console(stderr=True).status("joining clips") as status:
            return build_clips(data, status.update)
    if data is not None:
        return data
    if benchmark.name != "vstream-qa-mini":
        raise UserError(f"--data is needed: the folder with {benchmark.title} ({benchmark.source})")
    from flash_vstream.evaluate.mini import build_mini

    with Console(stderr=True).status("building VStream-QA-mini") as status:
        return build_mini(report=status.update)


def file_name(*parts: str | None) -> str:
    """Join parts into one file name, replacing unsafe characters with dashes."""
    text = "-".join(part for part in parts if part)
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)
