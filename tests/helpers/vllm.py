"""A small stand-in for vLLM: its completions endpoint for prompt embeddings, with its status codes and its stream."""

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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

    def accept(self, body: dict[str, Any]) -> torch.Tensor | tuple[int, str]:
        """A request's embeddings, or the status and message with which vLLM refuses it."""
        if self.status is not None:
            return self.status, "it was told to"
        if body["model"] != self.name:
            return 404, f"The model `{body['model']}` does not exist."
        if "prompt_embeds" not in body or not body["stream"]:
            return 400, "Either prompt or prompt_embeds must be provided and non-empty."
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
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


@contextmanager
def standing_in(language_model: Any) -> Iterator[StandIn]:
    """Serve on a free port of loopback."""
    served = StandIn(language_model)

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
            if isinstance(accepted := served.accept(body), tuple):
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
