"""LVBench (Wang et al., 2024): hour-long videos, four choices."""

from flash_vstream.evaluate.items import Benchmark, options_in_text

BENCHMARKS = (
    Benchmark(
        name="lvbench",
        title="LVBench",
        metric="choice",
        protocol="whole",
        files=("test_qa.json", "lvbench/test_qa.json"),
        read=options_in_text("type"),
        source="Hugging Face dataset THUDM/LVBench; videos from YouTube",
        size="103 videos, 1,549 questions (1,508 here)",
        licence="CC-BY-NC-SA-4.0",
        published={"Flash-VStream (Qwen2-VL-7B)": "42.0%"},
    ),
)
