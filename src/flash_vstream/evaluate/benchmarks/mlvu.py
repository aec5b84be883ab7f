"""MLVU (Zhou et al., 2024): long videos of many kinds, four choices."""

from flash_vstream.evaluate.items import Benchmark, options_in_text

BENCHMARKS = (
    Benchmark(
        name="mlvu",
        title="MLVU (dev, multiple choice)",
        metric="choice",
        protocol="whole",
        files=("test_qa.json", "mlvu/test_qa.json"),
        read=options_in_text("type"),
        source="Hugging Face dataset MLVU/MVLU",
        size="2,175 questions",
        licence="CC-BY-NC-SA-4.0",
        total="kinds",
        published={"Flash-VStream (Qwen2-VL-7B)": "66.3%"},
    ),
)
