"""OVO-Bench (Li et al., 2025): backward tracing and real-time perception at given times."""

from flash_vstream.evaluate.items import Benchmark, packed_choice

BENCHMARKS = (
    Benchmark(
        name="ovobench",
        title="OVO-Bench (backward, real-time)",
        metric="choice",
        protocol="causal",
        files=("realtime_backward.json", "ovobench/realtime_backward.json"),
        read=packed_choice,
        source="Hugging Face dataset JoeLeelyf/OVO-Bench",
        size="1,468 questions",
        licence="CC-BY-NC-SA-4.0",
        published={},
    ),
)
