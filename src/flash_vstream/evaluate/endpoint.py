"""Any OpenAI-compatible chat endpoint, called at temperature 0 through OpenAI's own client."""

from typing import Any
from urllib.parse import parse_qsl

from flash_vstream.errors import UserError

RETRIES = 4
TIMEOUT_SECONDS = 120.0


class ChatEndpoint:
    """A model at a URL.

    A URL without a path gets ``/v1``, like OpenAI's own. A URL with a path is used unchanged, because
    not every service uses ``/v1``. A query, such as Azure's ``?api-version=…``, goes with every request,
    and the key is then also sent as ``api-key``, where Azure looks for it. The client retries with
    increasing delays after lost connections and statuses 408, 409, 429 and 5xx; other statuses, such as
    401 for a wrong key, are final. Raises ``UserError`` when the ``openai`` package is missing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        retries: int = RETRIES,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ):
        address, _, query = url.partition("?")
        self.url, self.model = base_url(address), model
        try:
            from openai import OpenAI
        except ImportError:
            raise UserError("asking a model at a URL needs openai; install flash-vstream[eval]") from None
        self._client = OpenAI(
            base_url=self.url,
            api_key=key or "none",
            max_retries=retries,
            timeout=timeout_seconds,
            default_query=dict(parse_qsl(query)),
            default_headers={"api-key": key} if key and query else None,
        )

    def complete(
        self, system: str, user: str | list[dict[str, Any]], max_new_tokens: int = 256
    ) -> tuple[str, dict[str, int]]:
        """Return the model's reply to a system and a user message, and the token counts.

        Raises ``UserError`` when there is no reply.
        """
        from openai import OpenAIError

        messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=max_new_tokens
            )
            text = completion.choices[0].message.content or ""
        except (OpenAIError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"the model {self.model} at {self.url} did not answer ({_reason(error)}); check URL, model and key"
            ) from None
        counts = completion.usage.model_dump() if completion.usage else {}
        return text, {name: count for name, count in counts.items() if isinstance(count, int)}


def base_url(url: str) -> str:
    """The URL that ``/chat/completions`` is appended to."""
    scheme, _, rest = url.rstrip("/").removesuffix("/chat/completions").partition("://")
    return f"{scheme}://{rest}" if "/" in rest else f"{scheme}://{rest}/v1"


def _reason(error: Exception) -> str:
    """A one-line reason; for a lost connection, its underlying cause."""
    cause = error.__cause__ if error.__cause__ is not None and "onnection" in str(error) else error
    return " ".join(str(cause).split())[:300] or type(error).__name__
