"""VStream-QA (arXiv 2406.08085): open, timed questions about streams from Ego4D and MovieNet.

The official files have a separate video cut for each question's moment; ReKV's format keeps whole
videos and the times of the questions. Both formats are supported.
"""

from typing import Any

from flash_vstream.evaluate.items import Benchmark, Item, flat_open, packed_open
from flash_vstream.evaluate.mini import CATEGORIES

_HUB = "Hugging Face datasets IVGSZ/VStream-QA (official files) or Becomebright/RVS (whole videos)"


def read(rows: Any) -> list[Item]:
    """Read items in either format."""
    return packed_open(rows) if rows and isinstance(rows[0], dict) and "conversations" in rows[0] else flat_open(rows)


def _subset(name: str, title: str, files: tuple[str, ...], videos: str, accuracy: str, online: bool) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        metric="open",
        protocol="causal" if online else "whole",
        files=files,
        read=read,
        source=_HUB,
        size=videos,
        licence="CC-BY-NC-4.0; the videos under Ego4D's and MovieNet's own terms",
        media=("videos", "ego/videos", "movie/videos", "."),
        # Where annotations name their kinds; other files write them in capitals.
        categories={**CATEGORIES, **{kind.title(): category for kind, category in CATEGORIES.items()}},
        published={
            "Flash-VStream-7B, accuracy and score, judged by GPT-3.5, protocol "
            + ("causal" if online else "whole"): accuracy
        },
    )


BENCHMARKS = (
    _subset("vs-ego", "VS-Ego", ("vstream/test_qa_ego4d.json", "vs_ego.json"), "1,465 questions", "59.0%, 3.9", False),
    _subset(
        "vs-movie",
        "VS-Movie",
        ("vstream/test_qa_movienet.json", "vs_movie.json"),
        "1,905 questions",
        "56.1%, 3.4",
        False,
    ),
    _subset(
        "rvs-ego",
        "RVS-Ego",
        ("rvs_ego.json", "ego/ego4d_oe.json", "vstream-realtime/test_qa_ego4d.json"),
        "10 videos, 1,465 questions",
        "57.3%, 4.0",
        True,
    ),
    _subset(
        "rvs-movie",
        "RVS-Movie",
        ("rvs_movie.json", "movie/movienet_oe.json", "vstream-realtime/test_qa_movienet.json"),
        "22 videos, 1,905 questions",
        "53.1%, 3.3",
        True,
    ),
)
