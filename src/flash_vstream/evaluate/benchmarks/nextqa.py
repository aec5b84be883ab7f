"""NExT-QA, open-ended (Xiao et al., 2021): causal and temporal questions."""

from flash_vstream.evaluate.items import Benchmark, flat_open

BENCHMARKS = (
    Benchmark(
        name="nextqa",
        title="NExT-QA (open-ended)",
        metric="open",
        protocol="whole",
        files=("test_qa.json",),
        read=flat_open,
        source="github.com/doc-doc/NExT-OE, packed as one list",
        size="1,000 videos, 9,178 questions",
        licence="MIT; the videos are VidOR's",
        published={"Flash-VStream-7B, accuracy and score, judged by GPT-3.5, protocol whole": "61.6%, 3.4"},
    ),
)
