"""Streams joined from real clips of a folder in UCF101's layout (``evaluate/clips.py``)."""

from flash_vstream.evaluate.items import Benchmark, packed_open
from flash_vstream.evaluate.mini import CATEGORIES

BENCHMARKS = (
    Benchmark(
        name="clips",
        title="Real clips, joined",
        metric="open",
        protocol="causal",
        files=("clips.json",),
        read=packed_open,
        source="built by a seed from --data, a folder with annotations.jsonl and clips named as in UCF101",
        size="24 streams, 360 questions",
        licence="that of the clips",
        categories=CATEGORIES,
    ),
)
