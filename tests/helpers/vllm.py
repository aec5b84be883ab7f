"""A small stand-in for vLLM, with its status codes and its streams.

``StandIn`` has its completions endpoint for prompt embeddings, ``StandInForWhole`` its chat endpoint for pictures'
tokens.
"""

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flash_vstream.models.interface import VIDEO_TOKEN


class StandIn:
    """Generates greedily with ``language_model``.

    ``status`` is a refusal of everything; ``cut`` ends streams early, ``endless`` ones know no stop, and each token
    takes one of ``pace``. ``prompts`` are the embeddings that came, ``left`` counts the callers who left early.
    """

    def __init__(self, language_model: Any):
        self.language_model = language_model
        self.url, self.key, self.name, self.longest = "", "", "language", 2048
        self.status: int | None = None
        self.cut: int | None = None
        self.endless = False
        self.pace: threading.Semaphore | None = None
        self.prompts: list[torch.Tensor] = []
        self.bodies: list[dict[str, Any]] = []
        self.left = 0

    def accept(self, path: str, body: dict[str, Any]) -> torch.Tensor | tuple[int, str]:
        """A request's embeddings, or the status and message with which vLLM refuses it."""
        if path != "/v1/completions":
            return 404, "Not Found"
        if self.status is not None:
            return self.status, "it was told to"
        if body["model"] != self.name:
            return 404, f"The model `{body['model']}` does not exist."
        if "prompt_embeds" not in body or not body["stream"]:
            return 400, "Either prompt or prompt_embeds must be provided and non-empty."
        embeds = loaded(body["prompt_embeds"])
        if embeds.ndim != 2 or embeds.shape[1] != self.language_model.config.hidden_size:
            return 400, "prompt_embeds must be of shape (seq_len, hidden_size)."
        if len(embeds) + body["max_tokens"] > self.longest:
            return 400, f"This model's maximum context length is {self.longest} tokens."
        self.prompts.append(embeds)
        self.bodies.append(body)
        return embeds

    @torch.inference_mode()
    def chunks(self, embeds: torch.Tensor, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a completion, one for each token; the token that stops is not told."""
        embeds = embeds[None]
        for count in range(1, body["max_tokens"] + 1):
            logs = self.language_model(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)
            token = int(logs.argmax())
            if token in body["stop_token_ids"] and not self.endless:
                yield {"choices": [{"index": 0, "token_ids": [], "finish_reason": "stop", "stop_reason": token}]}
                return
            choice: dict[str, Any] = {"index": 0, "token_ids": [token], "logprobs": None}
            if best := body.get("logprobs"):
                values, ids = logs.topk(best)
                named = {f"token_id:{i}": float(value) for i, value in zip(ids.tolist(), values.tolist(), strict=True)}
                choice["logprobs"] = {"top_logprobs": [named]}
            choice["finish_reason"] = "length" if count == body["max_tokens"] else None
            yield {"choices": [choice]}
            embedded = self.language_model.get_input_embeddings()(torch.tensor([[token]]))
            embeds = torch.cat([embeds, embedded], 1)


class StandInForWhole:
    """Generates greedily with ``model``, a ``TransformersVlm``, from text and pictures' tokens.

    ``prompts`` are the tokens that were read, ``grids`` the pictures' grids. Without ``trusting`` it refuses templates,
    as vLLM does without ``--trust-request-chat-template``.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.url, self.key, self.name, self.longest = "", "", "whole", 4096
        self.trusting = True
        self.cut, self.pace, self.left = None, None, 0
        self.prompts: list[list[int]] = []
        self.grids: list[list[list[int]]] = []
        self.bodies: list[dict[str, Any]] = []

    def accept(self, path: str, body: dict[str, Any]) -> Any:
        """A request's tokens and those of its pictures, or the status and message with which vLLM refuses it."""
        if path != "/v1/chat/completions":
            return 404, "Not Found"
        if not self.trusting:
            return 400, "Chat template is passed with request, but --trust-request-chat-template is not set."
        (message,) = body["messages"]
        shown = [part["image_embeds"] for part in message["content"] if part["type"] == "image_embeds"]
        pictures = [loaded(fields["image_embeds"]) for fields in shown]
        grids = [loaded(fields["image_grid_thw"]) for fields in shown]
        parts = [{"type": "image"} if part["type"] == "image_embeds" else part for part in message["content"]]
        text = self.tokenizer.apply_chat_template(
            [{"role": message["role"], "content": parts}],
            chat_template=body["chat_template"],
            add_generation_prompt=body["add_generation_prompt"],
            tokenize=False,
        )
        config, ids = self.model.network.config, []
        sizes = [int(grid.prod()) // config.vision_config.spatial_merge_size**2 for grid in grids]
        if sizes != [len(picture) for picture in pictures]:
            return 400, "a picture has another number of tokens than its grid"
        waiting = iter(sizes)
        for token in self.tokenizer(text, add_special_tokens=False).input_ids:
            ids += [token] * (next(waiting, 0) if token == config.image_token_id else 1)
        self.prompts.append(ids)
        self.grids.append([grid.tolist() for grid in grids])
        self.bodies.append(body)
        return [ids, pictures]

    @torch.inference_mode()
    def chunks(self, accepted: Any, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a completion: the prompt's tokens, then one for each token."""
        ids, pictures = accepted
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield {"choices": [first], "prompt_token_ids": ids}
        read = [VIDEO_TOKEN if i == self.model.network.config.image_token_id else i for i in ids]
        for count in range(1, body["max_tokens"] + 1):
            logs = self.model(torch.tensor([read]), pictures).logits[0, -1].log_softmax(-1)
            token = int(logs.argmax())
            stopped = token in body["stop_token_ids"]
            choice: dict[str, Any] = {"index": 0, "delta": {"content": "?"}, "token_ids": [] if stopped else [token]}
            if best := body.get("top_logprobs"):
                top = [{"token": f"token_id:{i}", "logprob": float(logs[i])} for i in logs.topk(best).indices.tolist()]
                choice["logprobs"] = {"content": [{"token": f"token_id:{token}", "top_logprobs": top}]}
            choice["finish_reason"] = "stop" if stopped else "length" if count == body["max_tokens"] else None
            yield {"choices": [choice]}
            if stopped:
                return
            read.append(token)


def loaded(text: str) -> torch.Tensor:
    """A tensor that came in base64."""
    tensor: torch.Tensor = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return tensor


@contextmanager
def standing_in(served: Any) -> Iterator[Any]:
    """Serve on a free port of loopback."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refused(self) -> bool:
            if served.key and self.headers["authorization"] != f"Bearer {served.key}":
                self.answer(401, {"error": "Unauthorized"})
                return True
            return False

        def do_GET(self) -> None:
            if not self.refused():
                self.answer(200, {"data": [{"id": served.name, "max_model_len": served.longest}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.refused():
                return
            if isinstance(accepted := served.accept(self.path, body), tuple):
                self.answer(accepted[0], {"error": {"message": accepted[1], "code": accepted[0]}})
                return
            self.send_response(200)
            self.end_headers()
            try:
                for count, chunk in enumerate(served.chunks(accepted, body)):
                    if served.pace is not None:
                        served.pace.acquire()
                    if count == served.cut:
                        return
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                served.left += 1

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        served.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield served
        server.shutdown()
