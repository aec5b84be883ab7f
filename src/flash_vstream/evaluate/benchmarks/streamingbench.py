"""StreamingBench (Lin et al., 2024), real-time visual understanding at given times."""

from flash_vstream.evaluate.items import Benchmark, packed_choice

BENCHMARKS = (
    Benchmark(
        name="streamingbench",
        title="StreamingBench (real-time)",
        metric="choice",
        protocol="causal",
        files=("realtime.json", "streamingbench/realtime.json"),
        read=packed_choice,
        source="Hugging Face dataset mjuicem/StreamingBench",
        size="498 videos, 2,495 questions",
        licence="for research; the videos are YouTube's",
        published={},
    ),
)
