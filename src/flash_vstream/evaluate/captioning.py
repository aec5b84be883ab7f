"""Score how well a model captions single pictures: the metric of stage 1."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.captions import PictureSet

QUESTION = "What is happening now?"
BATCH = 32


def bleu4(predictions: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4 (0 to 1), in lower case and without punctuation, as is usual for captions.

    Tokenization is sacrebleu's 13a with exponential smoothing off.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise UserError("scoring needs sacrebleu; install flash-vstream[train]") from None

    def plain(text: str) -> str:
        return "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower())

    most = max(len(group) for group in references)
    streams: Any = [[plain(group[i]) if i < len(group) else None for group in references] for i in range(most)]
    score: float = BLEU(smooth_method="none").corpus_score([plain(text) for text in predictions], streams).score
    return score / 100


def caption_features(pipeline: FlashVStream, features: list[Tensor], beams: int = 1) -> list[str]:
    """Captions for pictures, each a stream of one frame ``[1, P², D]``, generated together."""
    snapshots = []
    for frame in features:
        memory = pipeline.model.new_memory(torch.float32)
        memory.write(frame.float(), [0.0])
        snapshots.append(memory.read())
    return pipeline.ask_batch(snapshots, [QUESTION] * len(snapshots), max_new_tokens=40, beams=beams)


def score_captions(data: Path, model_name: str, split: str, limit: int | None, beams: int = 1) -> dict[str, Any]:
    """Caption every picture of a split and compute BLEU-4 against all of its captions.

    One beam gives the answers that users get. More beams decode as papers do that score captions, and the answers are
    not guided (``FlashVStream.ask_batch``).
    """
    pictures = PictureSet.load(data, split)
    pipeline = FlashVStream.from_pretrained(model_name)
    keys = sorted(pictures.captions)[:limit]
    predictions: list[str] = []
    for begin in track(range(0, len(keys), BATCH), "captioning", console=Console(stderr=True)):
        batch = keys[begin : begin + BATCH]
        predictions += caption_features(pipeline, [pictures.features(key)[:1] for key in batch], beams)
    references = [pictures.captions[key] for key in keys]
    return {
        "bleu4": round(bleu4(predictions, references), 4),
        "beams": beams,
        "pictures": len(keys),
        "split": split,
        "model": model_name,
        "examples": dict(list(zip(keys, predictions, strict=True))[:8]),
    }
