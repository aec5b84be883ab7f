"""Fetches clips from URLs under the server's rules: every redirect is checked, and time and size are limited."""

import anyio
import anyio.to_thread
import httpx

from flash_vstream.errors import UserError
from flash_vstream.serve.security import ApiError
from flash_vstream.video.gateway import CONNECT_SECONDS, pinned_request, tls_context
from flash_vstream.video.network import ForbiddenSourceError, SourceRules

FETCH_SECONDS = 30.0
"""How long fetching a clip may take, redirects included."""
MOST_HOPS = 5
FETCHES_AT_ONCE = 16
"""Each may hold a whole clip in memory; further fetches wait, within their time limit."""


class Fetcher:
    """Fetches clips for chat requests; cancelling a fetch closes its connection."""

    def __init__(self, rules: SourceRules | None, most_bytes: int):
        self._rules, self._most_bytes = rules, most_bytes
        self._tls = tls_context()
        # An unresponsive name server must not use up the threads that answers need.
        self._lookups = anyio.CapacityLimiter(FETCHES_AT_ONCE)
        self._places = anyio.Semaphore(FETCHES_AT_ONCE)

    async def fetch(self, url: str) -> bytes:
        """The bytes at ``url``; raises ``ApiError`` if it is malformed, forbidden, unresponsive or too large."""
        try:
            with anyio.fail_after(FETCH_SECONDS):
                async with self._places:
                    return await self._follow(url)
        except TimeoutError:
            raise ApiError(422, f"the clip could not be fetched within {FETCH_SECONDS:.0f} s") from None
        except ForbiddenSourceError as error:
            raise ApiError(403, str(error)) from None
        except UserError as error:
            raise ApiError(422, f"the clip's URL cannot be fetched: {error}") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise ApiError(422, f"the clip could not be fetched ({reason[:120]})") from None

    async def _follow(self, url: str) -> bytes:
        async with httpx.AsyncClient(
            timeout=CONNECT_SECONDS, trust_env=self._rules is None, verify=self._tls
        ) as client:
            for _ in range(MOST_HOPS + 1):
                request = await anyio.to_thread.run_sync(
                    pinned_request, url, self._rules, {}, abandon_on_cancel=True, limiter=self._lookups
                )
                response = await client.send(request, stream=True)
                try:
                    if not response.has_redirect_location:
                        return await self._body(response)
                    url = str(httpx.URL(url).join(response.headers["location"]))
                finally:
                    await response.aclose()
        raise ApiError(422, f"the clip's URL is redirected more than {MOST_HOPS} times")

    async def _body(self, response: httpx.Response) -> bytes:
        if response.status_code != 200:
            raise ApiError(422, f"the clip could not be fetched (HTTP {response.status_code} {response.reason_phrase})")
        too_large = ApiError(413, f"the clip is longer than {self._most_bytes:,} bytes, the limit here")
        length = response.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._most_bytes:
            raise too_large
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > self._most_bytes:
                raise too_large
        if length.isdigit() and 0 < len(data) < int(length):
            raise ApiError(422, f"the clip broke off after {len(data):,} of {int(length):,} bytes")
        return bytes(data)
