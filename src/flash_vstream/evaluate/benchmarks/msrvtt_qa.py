"""MSRVTT-QA (Xu et al., 2017): short clips, short answers."""

from flash_vstream.evaluate.items import Benchmark, flat_open

BENCHMARKS = (
    Benchmark(
        name="msrvtt-qa",
        title="MSRVTT-QA",
        metric="open",
        protocol="whole",
        files=("test_qa.json",),
        read=flat_open,
        source="github.com/xudejing/video-question-answering, packed as one list",
        size="2,990 videos, 72,821 questions",
        licence="MIT; the videos are YouTube's",
        published={"Flash-VStream-7B, accuracy and score, judged by GPT-3.5, protocol whole": "72.4%, 3.4"},
    ),
)
