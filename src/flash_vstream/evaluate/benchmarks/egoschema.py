"""EgoSchema (Mangalam et al., 2023): three-minute Ego4D clips, five choices."""

from flash_vstream.evaluate.items import Benchmark, options_in_text

BENCHMARKS = (
    Benchmark(
        name="egoschema",
        title="EgoSchema (subset)",
        metric="choice",
        protocol="whole",
        files=("test_qa.json", "EgoSchema/test_qa.json"),
        read=options_in_text("type"),
        source="github.com/egoschema/EgoSchema",
        size="500 videos, 500 questions",
        licence="Ego4D's licence",
        published={"Flash-VStream (Qwen2-VL-7B), whole set": "68.2%"},
    ),
)
