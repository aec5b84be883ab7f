"""Any OpenAI-compatible chat endpoint, asked at temperature 0."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

from flash_vstream.errors import UserError


class ChatEndpoint:
    """A model at a URL. Busy and broken answers are tried again, ``tries`` times in all."""

    def __init__(self, url: str, model: str, key: str | None = None, tries: int = 3, seconds: float = 120.0):
        self.url = url.rstrip("/") + ("" if url.rstrip("/").endswith("/v1") else "/v1")
        self.model, self.key, self.tries, self.seconds = model, key, tries, seconds

    def complete(self, system: str, user: str | list[dict[str, Any]], most: int = 256) -> tuple[str, dict[str, int]]:
        """The model's reply to an instruction and what the user says, and the tokens that it cost.

        Raises ``UserError`` when there is no reply.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": most}
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        why = "no try was left"
        for attempt in range(self.tries):
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    told = json.load(response)
                usage = {
                    name: int(count) for name, count in (told.get("usage") or {}).items() if isinstance(count, int)
                }
                return str(told["choices"][0]["message"]["content"] or ""), usage
            except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
                why = _reason(error)
                if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429:
                    break
                time.sleep(min(8.0, 0.5 * 2**attempt))
        raise UserError(f"the model {self.model} at {self.url} did not answer ({why}); check URL, model and key")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
    return str(getattr(error, "reason", None) or error)[:200]
