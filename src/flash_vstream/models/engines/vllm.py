"""A language model that vLLM serves, over HTTP.

What the model reads goes to vLLM as embeddings, or as text with its pictures' tokens (``vllm_prompts``); vLLM has the
layers. A prompt that begins like an earlier one is read from there only (prefix caching), so the questions about one
memory share its reading. For nano and flash-vstream-7b it serves the language model alone (``flash-vstream pull
--language-to``), for a Qwen model the whole.
"""

import json
import logging
import os
import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from flash_vstream.errors import UserError
from flash_vstream.models.engines.base import Feed, Row
from flash_vstream.models.engines.vllm_prompts import Prompts, prompts_for
from flash_vstream.models.interface import StreamModel, StreamProcessor
from flash_vstream.models.modeling import FlashVStreamForConditionalGeneration

KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable from which vLLM itself reads its API key."""
CONNECT_SECONDS, READ_SECONDS = 5.0, 120.0
log = logging.getLogger("flash_vstream.models")


class VllmSequence:
    """What has been read, in parts as ``Prompts`` makes them, and the tokens that vLLM generates after them."""

    def __init__(self, parts: Sequence[Any] = ()):
        self.parts = list(parts)
        self.last: int | None = None
        self.generating: _Generating | None = None

    def follow(self, generating: "_Generating") -> None:
        """Take the tokens of ``generating``, which ends when nobody has this sequence any more."""
        self.generating = generating
        weakref.finalize(self, generating.left.set).atexit = False


@dataclass(frozen=True)
class _Token:
    """A token that vLLM generated, with the logarithms of the likeliest tokens' probabilities if they were wanted."""

    id: int
    logs: dict[int, float]


class _Generating:
    """A completion under way, read in a thread of its own; ``left`` ends it.

    ``read_as`` are the tokens that vLLM must have read.
    """

    def __init__(
        self, client: httpx.Client, prompts: Prompts, body: dict[str, Any], read_as: list[int] | None, stop: int
    ):
        self.left = threading.Event()
        self._tokens: queue.SimpleQueue[_Token | UserError] = queue.SimpleQueue()
        self._prompts, self._read_as, self._stop = prompts, read_as, stop
        threading.Thread(target=self._read, args=(client, body), name="vllm", daemon=True).start()

    def next(self) -> _Token:
        """The next token, as soon as it is there; raises ``UserError``."""
        token = self._tokens.get()
        if isinstance(token, UserError):
            self._tokens.put(token)  # for whoever asks again
            raise token
        return token

    def _read(self, client: httpx.Client, body: dict[str, Any]) -> None:
        try:
            with client.stream("POST", self._prompts.path, json=body) as response:
                if response.is_error:
                    response.read()
                    raise refusal(response)
                for line in response.iter_lines():
                    if self.left.is_set():
                        return
                    if line.startswith("data:") and line != "data: [DONE]":
                        self._take(json.loads(line.removeprefix("data:")))
            self._tokens.put(UserError("the language engine stopped before the answer was complete; ask again"))
        except UserError as error:
            self._tokens.put(error)
        except httpx.HTTPError as error:
            self._tokens.put(UserError(f"the language engine cannot be reached ({_cause(error)}); ask again later"))
        except Exception as error:
            log.error("vLLM's answer cannot be understood", exc_info=error)
            self._tokens.put(UserError(f"the language engine's answer cannot be understood ({_cause(error)})"))

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise UserError(f"the language engine failed ({chunk['error'].get('message', chunk['error'])}); ask again")
        if self._read_as is not None and chunk.get("prompt_token_ids") not in (None, self._read_as):
            raise UserError(
                "the language engine reads this question as other tokens than the model; ask in other words, and see"
                " that vLLM serves the same model"
            )
        for choice in chunk["choices"]:
            ids = choice.get("token_ids")
            if ids is None and choice.get("delta", {}).get("role") is None:
                raise UserError("the language engine tells no token ids (return_token_ids); use a newer vLLM")
            told = self._prompts.told(choice)
            for number, top in zip(ids or (), told or [{}] * len(ids or ()), strict=False):
                logs = {int(name.removeprefix("token_id:")): value for name, value in top.items() if value is not None}
                if len(logs) < len(top):  # what somebody else's NaN left in vLLM's cache
                    raise UserError("the language engine computes with numbers that are not finite; restart vLLM")
                self._tokens.put(_Token(number, logs))
            if choice.get("finish_reason") == "stop":  # vLLM knows when an answer ends, and may not tell by which token
                self._tokens.put(_Token(self._stop, {}))


class VllmEngine:
    """The language model that vLLM serves at ``url``, such as ``http://host:8000/v1``; ``url#NAME`` picks one of many.

    Raises ``UserError`` if vLLM does not answer or cannot read the model.
    """

    name, together = "vllm", True

    def __init__(self, model: StreamModel, processor: StreamProcessor, url: str):
        self._prompts = prompts_for(model, processor)
        size = model.config.text_config.vocab_size  # vLLM refuses ids beyond it, which Transformers' defaults may name
        self.model, self._stops = model, sorted(i for i in processor.stop_ids if i < size)
        self._url, _, self._name = url.partition("#")
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx.Client(
            base_url=self._url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
        )
        self._name = self._served()

    def _served(self) -> str:
        """The name of the model to ask."""
        try:
            response = self._client.get("models")
            if response.is_error:
                raise refusal(response)
            served = {str(entry["id"]): entry for entry in response.json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"no vLLM answers at {self._url} ({_cause(error)}); start `vllm serve FOLDER {self._prompts.options}`"
            ) from None
        name = self._name or next(iter(served), "")
        if name not in served:
            raise UserError(f"vLLM at {self._url} serves {', '.join(served) or 'nothing'}, and no model {name!r}")
        longest, own = served[name].get("max_model_len"), self.model.config.text_config.max_position_embeddings
        if longest is not None and longest < own:
            log.warning("vLLM takes %d tokens, this model %d: long conversations will be refused", longest, own)
        return name

    def new_sequence(self) -> VllmSequence:
        """An empty sequence."""
        return VllmSequence()

    def fork(self, sequence: VllmSequence) -> VllmSequence:
        """A sequence with the same parts, which are never changed."""
        return VllmSequence(sequence.parts)

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed]) -> list[Row]:
        """See ``Engine.step``. All feeds are on their way before the first token is waited for."""
        return [self._row(feed, error) for feed, error in [(feed, self._send(feed)) for feed in feeds]]

    def _send(self, feed: Feed) -> UserError | None:
        """See that ``feed``'s token is generated; returns why it cannot be."""
        sequence = feed.sequence
        if feed.keep > 1:
            return UserError("vLLM tells what may follow a prompt, and not what may follow each of its tokens")
        sequence.parts.append(self._prompts.part(feed))
        if sequence.generating is not None and list(feed.ids) == [sequence.last]:
            return None  # it is on its way
        try:
            body = self._body(sequence.parts, feed.ahead)
        except UserError as error:
            return error
        read_as = self._prompts.read_as(sequence.parts)
        sequence.follow(_Generating(self._client, self._prompts, body, read_as, self._stops[0]))
        return None

    def _body(self, parts: Sequence[Any], ahead: int) -> dict[str, Any]:
        body = self._prompts.body(parts) | {
            "model": self._name,
            "max_tokens": ahead + 1,
            "temperature": 0,
            "repetition_penalty": 1.0,  # otherwise that of the model's own settings
            "stream": True,
            "return_token_ids": True,
            "stop_token_ids": self._stops,
        }
        # Whoever asks for no further token wants to know how likely each is.
        return body if ahead else body | self._prompts.logprobs() | {"return_tokens_as_token_ids": True}

    def _row(self, feed: Feed, error: UserError | None) -> Row:
        """The next token as logits: one-hot, or as far down as vLLM has told; the others share the rest evenly."""
        size = self.model.config.text_config.vocab_size
        logits = torch.full((1, size), -torch.inf)
        try:
            if error is not None:
                raise error
            token = feed.sequence.generating.next()
        except UserError as failed:
            return Row(logits, error=failed)
        feed.sequence.last = token.id
        if token.logs:
            told = torch.tensor(list(token.logs.values()), dtype=torch.float64)
            rest = (1 - told.exp().sum()).clamp_min(1e-12) / max(1, size - len(told))
            logits.fill_(rest.log())
            logits[0, list(token.logs)] = told.float()
        else:
            logits[0, token.id] = 0.0
        return Row(logits)


def export_language(model: StreamModel, processor: StreamProcessor, folder: Path) -> None:
    """Write a model's language model alone to ``folder``, as Transformers and vLLM load it."""
    if not isinstance(model, FlashVStreamForConditionalGeneration):
        raise UserError("only nano and flash-vstream-7b have a language model of their own; vLLM serves others whole")
    model.language_model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def refusal(response: httpx.Response) -> UserError:
    """What a status says, with a remedy."""
    status = response.status_code
    try:
        body = response.json()
        said = body.get("error", body).get("message") or response.text
    except (ValueError, AttributeError):
        said = response.text
    said = f"status {status}: {' '.join(str(said).split())[:300]}"
    if status in (401, 403):
        return UserError(f"the language engine wants a key ({said}); put it into {KEY_VARIABLE}")
    if status == 404:
        return UserError(f"the language engine does not have this model any more ({said}); restart the server")
    if status in (408, 429, 503):
        return UserError(f"the language engine is busy ({said}); ask again in a moment")
    if status < 500:
        return UserError(f"the language engine refused the question ({said})")
    return UserError(f"the language engine failed ({said}); ask again")


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
