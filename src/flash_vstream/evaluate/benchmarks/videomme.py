"""Video-MME (Fu et al., 2024), without subtitles: short, medium and long videos."""

from flash_vstream.evaluate.items import Benchmark, options_in_text

BENCHMARKS = (
    Benchmark(
        name="videomme",
        title="Video-MME (without subtitles)",
        metric="choice",
        protocol="whole",
        files=("test_qa.json", "videomme/test_qa.json"),
        read=options_in_text("duration"),
        source="Hugging Face dataset lmms-lab/Video-MME",
        size="900 videos, 2,700 questions",
        licence="for research; the videos are YouTube's",
        published={"Flash-VStream (Qwen2-VL-7B)": "61.2%"},
    ),
)
