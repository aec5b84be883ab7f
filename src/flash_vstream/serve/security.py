"""Who may call, and what a source may name.

On loopback a server is its user's own and may watch whatever that user may. Beyond it, callers need
the token, and sources are closed for private addresses, local files and devices unless they are
allowed by name.
"""

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flash_vstream.errors import UserError
from flash_vstream.video.network import ForbiddenSourceError, SourceRules
from flash_vstream.video.sources import PUSH

LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class ApiError(Exception):
    """A request that is turned away, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class AccessRules:
    """The rules of one server.

    ``token`` is asked of every caller when it is set. ``origins`` are the web origins, beside the
    server's own, whose pages may call. ``hosts`` and ``folders`` are what sources may name when
    the server is not ``local``. Raises ``UserError`` for a server beyond loopback without a token.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.local and not self.token:
            raise UserError(
                f"a server on {self.host} can be reached by others and needs a token; set FLASH_VSTREAM_TOKEN"
                " (for instance to the output of: openssl rand -hex 24), or stay on 127.0.0.1"
            )

    @property
    def local(self) -> bool:
        """Whether the server can be reached from its own machine alone."""
        return is_loopback(self.host)

    def check_caller(self, headers: Mapping[str, str], query_token: str | None = None) -> None:
        """Turn away strangers, foreign pages and rebound names; raises ``ApiError``.

        ``query_token`` is for what a browser cannot send headers with (WebSockets, pictures).
        """
        named = _host_of(headers.get("host", ""))
        if self.local and not is_loopback(named):
            raise ApiError(403, f"this server answers to localhost alone, not to {named[:80] or 'a missing Host'}")
        origin = headers.get("origin")
        if origin and origin not in self.origins and _netloc_of(origin) != headers.get("host"):
            raise ApiError(403, "pages of other origins may not call this server; allow one with --allow-origin")
        if self.token:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given if scheme.lower() == "bearer" else (query_token or "")
            if not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                raise ApiError(401, "a bearer token is needed: Authorization: Bearer TOKEN")

    @property
    def rules(self) -> SourceRules | None:
        """What sources may reach, for whoever opens them; None on loopback, where they may reach anything."""
        return None if self.local else SourceRules(self.hosts, tuple(map(str, self.folders)))

    def check_source(self, name: str, transport: str = "tcp") -> None:
        """See whether a source may be watched.

        Raises ``ApiError`` (403) for one that is closed, ``UserError`` for one that is malformed.
        """
        if self.rules is None or name == PUSH:
            return
        try:
            self.rules.check(name, transport)
        except ForbiddenSourceError as error:
            raise ApiError(403, str(error)) from None


def is_loopback(host: str) -> bool:
    """Whether binding to ``host`` is reachable from this machine alone."""
    try:
        return host in LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    """The host of a Host header without its port; nothing for a malformed one."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _netloc_of(origin: str) -> str | None:
    """The host and port of an origin; None for a malformed one."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
