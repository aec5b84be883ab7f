"""MVBench (Li et al., 2023): twenty temporal skills on short clips."""

from flash_vstream.evaluate.items import Benchmark, options_in_text

BENCHMARKS = (
    Benchmark(
        name="mvbench",
        title="MVBench",
        metric="choice",
        protocol="whole",
        files=("test_qa.json", "mvbench/test_qa.json"),
        read=options_in_text("task_type"),
        source="Hugging Face dataset OpenGVLab/MVBench",
        size="4,000 questions",
        licence="MIT; the videos under their own terms",
        published={"Flash-VStream (Qwen2-VL-7B)": "65.4%"},
    ),
)
