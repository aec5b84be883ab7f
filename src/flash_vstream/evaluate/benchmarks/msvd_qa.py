"""MSVD-QA (Xu et al., 2017): short clips, short answers."""

from flash_vstream.evaluate.items import Benchmark, flat_open

BENCHMARKS = (
    Benchmark(
        name="msvd-qa",
        title="MSVD-QA",
        metric="open",
        protocol="whole",
        files=("test_qa.json",),
        read=flat_open,
        source="github.com/xudejing/video-question-answering, packed as one list",
        size="520 videos, 13,157 questions",
        licence="MIT; the videos are YouTube's",
        published={"Flash-VStream-7B, accuracy and score, judged by GPT-3.5, protocol whole": "80.3%, 3.9"},
    ),
)
