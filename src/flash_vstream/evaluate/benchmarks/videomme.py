"""Video-MME (Fu et al., 2024), with and without subtitles: short, medium and long videos."""

from flash_vstream.evaluate.items import Benchmark, options_in_text


def _benchmark(name: str, title: str, subtitles: bool, published: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        metric="choice",
        protocol="whole",
        files=("test_qa.json", "videomme/test_qa.json"),
        read=options_in_text("duration"),
        source="Hugging Face dataset lmms-lab/Video-MME",
        size="900 videos, 2,700 questions",
        licence="for research; the videos are YouTube's",
        media=("videos", "data", "."),
        published={"Flash-VStream (Qwen2-VL-7B)": published},
        subtitles=subtitles,
    )


BENCHMARKS = (
    _benchmark("videomme", "Video-MME (without subtitles)", False, "61.2%"),
    _benchmark("videomme-subtitles", "Video-MME (with subtitles)", True, "67.0%"),
)
