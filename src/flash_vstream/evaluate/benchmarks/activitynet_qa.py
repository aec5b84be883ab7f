"""ActivityNet-QA (Yu et al., 2019): open questions about ActivityNet videos."""

from flash_vstream.evaluate.items import Benchmark, flat_open

BENCHMARKS = (
    Benchmark(
        name="activitynet-qa",
        title="ActivityNet-QA",
        metric="open",
        protocol="whole",
        files=("test_qa.json",),
        read=flat_open,
        source="videos: activity-net.org; questions: github.com/MILVLG/activitynet-qa, packed as one list",
        size="800 videos, 8,000 questions",
        licence="Apache-2.0; the videos are YouTube's",
        published={"Flash-VStream-7B, accuracy and score, judged by GPT-3.5, protocol whole": "51.9%, 3.4"},
    ),
)
