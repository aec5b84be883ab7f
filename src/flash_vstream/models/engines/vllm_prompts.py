"""What vLLM is sent: a prompt as embeddings, or as text with the tokens of its pictures.

Embeddings are read as they are, at the positions of text. The Qwen families give pictures positions of their own
(M-RoPE), which vLLM computes where it is told which tokens are a picture's, and their grid. Both formats are those of
vLLM 0.32.
"""

import base64
import io
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.models.engines.base import Feed
from flash_vstream.models.interface import VIDEO_TOKEN, StreamModel, StreamProcessor
from flash_vstream.models.modeling import FlashVStreamForConditionalGeneration
from flash_vstream.models.vlm import TransformersVlm
from flash_vstream.models.vlm_families import AnySize, Qwen3Vl, Qwen25Vl

NOT_OURS = (
    "vLLM can read the memories of nano, flash-vstream-7b, Qwen3-VL, Qwen2.5-VL and Qwen2-VL alone; leave"
    " --language-engine out"
)
LOGPROBS = 20
"""How many of the likeliest tokens vLLM tells the likelihood of, unless it is run with ``--max-logprobs``."""


class Prompts(Protocol):
    """How prompts go to vLLM, and what its answers look like. A prompt is a sequence of parts, each made of a feed."""

    path: str
    """Where they go, below ``/v1``."""
    options: str
    """The options that ``vllm serve`` needs for them."""

    def part(self, feed: Feed) -> Any:
        """What is kept of a feed."""
        ...

    def body(self, parts: Sequence[Any]) -> dict[str, Any]:
        """A prompt as fields of the request; raises ``UserError`` for numbers that are not finite."""
        ...

    def read_as(self, parts: Sequence[Any]) -> list[int] | None:
        """The tokens as which vLLM must have read a prompt; None where it reads no tokens."""
        ...

    def logprobs(self) -> dict[str, Any]:
        """The fields that ask for the likelihoods of the ``LOGPROBS`` likeliest tokens."""
        ...

    def told(self, choice: dict[str, Any]) -> list[dict[str, float | None]]:
        """Those likelihoods' logarithms for each token of a choice by ``token_id:ID``."""
        ...


def prompts_for(model: StreamModel, processor: StreamProcessor) -> Prompts:
    """The way for a model's prompts; raises ``UserError`` if there is none."""
    if isinstance(model, FlashVStreamForConditionalGeneration):
        return EmbeddedPrompts(model)
    if isinstance(model, TransformersVlm) and isinstance(model.family, Qwen25Vl | Qwen3Vl):
        return PicturePrompts(model, model.family, processor)
    raise UserError(NOT_OURS)


class EmbeddedPrompts:
    """Prompts embedded with the model's own table and projector. A part is embeddings ``[L, width]``."""

    path, options = "completions", "--enable-prompt-embeds"

    def __init__(self, model: FlashVStreamForConditionalGeneration):
        self._model = model

    def part(self, feed: Feed) -> Tensor:
        """See ``Prompts``."""
        ids = torch.tensor([list(feed.ids)], device=self._model.device)
        return self._model.embed(ids, [] if feed.features is None else [feed.features])[0].cpu()

    def body(self, parts: Sequence[Tensor]) -> dict[str, Any]:
        """See ``Prompts``."""
        return {"prompt_embeds": encoded(finite(torch.cat(list(parts))))}

    def read_as(self, parts: Sequence[Tensor]) -> None:
        """See ``Prompts``."""
        return None

    def logprobs(self) -> dict[str, Any]:
        """See ``Prompts``."""
        return {"logprobs": LOGPROBS}

    def told(self, choice: dict[str, Any]) -> list[dict[str, float | None]]:
        """See ``Prompts``."""
        tops: list[dict[str, float | None] | None] = (choice.get("logprobs") or {}).get("top_logprobs") or []
        return [top or {} for top in tops]


class PicturePrompts:
    """Prompts as text and pictures, each with its tokens (DeepStack's included) and grid, in one message.

    A part is a feed's ids and features. A template of our own puts the message's pieces together as they are; what
    vLLM says it has read is compared with what it should, since a text may be split into other tokens there.
    """

    path, options = "chat/completions", "--enable-mm-embeds --trust-request-chat-template"

    def __init__(self, model: TransformersVlm, family: AnySize, processor: StreamProcessor):
        self._model, self._family, self._tokenizer = model, family, processor.tokenizer
        self._picture = int(model.network.config.image_token_id)
        mark = self._tokenizer.convert_ids_to_tokens(self._picture)
        # With two loops, as in most templates: by these vLLM knows that a message has pieces.
        self._template = (
            "{% for message in messages %}{% for part in message['content'] %}"
            f"{{% if part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% else %}}{mark}{{% endif %}}"
            "{% endfor %}{% endfor %}"
        )

    def part(self, feed: Feed) -> tuple[list[int], Tensor | None]:
        """See ``Prompts``."""
        return list(feed.ids), None if feed.features is None else feed.features.to("cpu", self._model.dtype)

    def body(self, parts: Sequence[tuple[list[int], Tensor | None]]) -> dict[str, Any]:
        """See ``Prompts``."""
        given = [features for _, features in parts if features is not None and len(features)]
        left = finite(torch.cat(given))[:, : self._family.channels] if given else torch.empty(0, 0)
        content: list[dict[str, Any]] = []
        for is_picture, run in groupby((i for ids, _ in parts for i in ids), VIDEO_TOKEN.__eq__):
            ids = list(run)
            if is_picture:
                content.append(self._shown(left[: len(ids)]))
                left = left[len(ids) :]
            else:
                text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                content.append({"type": "text", "text": text})
        return {
            "messages": [{"role": "user", "content": content}],
            "chat_template": self._template,
            "add_generation_prompt": False,
        }

    def _shown(self, tokens: Tensor) -> dict[str, Any]:
        side = math.isqrt(len(tokens)) * self._family.merge
        fields = {"image_embeds": encoded(tokens.clone()), "image_grid_thw": encoded(torch.tensor([1, side, side]))}
        return {"type": "image_embeds", "image_embeds": fields}

    def read_as(self, parts: Sequence[tuple[list[int], Tensor | None]]) -> list[int]:
        """See ``Prompts``."""
        return [self._picture if i == VIDEO_TOKEN else i for ids, _ in parts for i in ids]

    def logprobs(self) -> dict[str, Any]:
        """See ``Prompts``."""
        return {"logprobs": True, "top_logprobs": LOGPROBS}

    def told(self, choice: dict[str, Any]) -> list[dict[str, float | None]]:
        """See ``Prompts``."""
        content = (choice.get("logprobs") or {}).get("content") or []
        return [{top["token"]: top["logprob"] for top in token.get("top_logprobs") or ()} for token in content]


def finite(tensor: Tensor) -> Tensor:
    """The tensor itself; raises ``UserError`` unless all of it is finite: vLLM would read it, and answer nonsense."""
    if not tensor.isfinite().all():
        raise UserError("what the model saw is not made of finite numbers; try another --dtype")
    return tensor


def encoded(tensor: Tensor) -> str:
    """A tensor as vLLM takes it."""
    written = io.BytesIO()
    torch.save(tensor, written)
    return base64.b64encode(written.getvalue()).decode()
