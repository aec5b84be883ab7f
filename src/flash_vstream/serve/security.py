"""Who may call the server, and which sources they may name.

On loopback, a server belongs to its user and may watch anything that user can. Beyond loopback,
callers need the token, and sources may not reach private addresses, local files or devices unless
these are explicitly allowed.
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
    """A refused request, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class AccessRules:
    """The access rules of one server.

    If ``token`` is set, every caller must present it. ``origins`` are the web origins, besides the
    server's own, whose pages may call. ``hosts`` and ``folders`` are the private hosts and the folders
    that sources may name when the server is not ``local``. Raises ``UserError`` for a server beyond
    loopback without a token.
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
        """Whether the server can be reached only from its own machine."""
        return is_loopback(self.host)

    def check_caller(self, headers: Mapping[str, str], query_token: str | None = None) -> None:
        """Raise ``ApiError`` for callers without the token, pages of other origins and DNS-rebound hosts.

        ``query_token`` is for WebSockets, on which a browser cannot set headers.
        """
        named = _host_of(headers.get("host", ""))
        if self.local and not is_loopback(named):
            raise ApiError(403, f"this server answers only to localhost, not to {named[:80] or 'a missing Host'}")
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
        """The rules for opening sources; None on loopback, where sources may reach anything."""
        return None if self.local else SourceRules(self.hosts, tuple(map(str, self.folders)))

    def check_source(self, name: str, transport: str = "tcp") -> None:
        """Check whether a source may be watched.

        Raises ``ApiError`` (403) if it is forbidden, ``UserError`` if it is malformed.
        """
        if self.rules is None or name == PUSH:
            return
        try:
            self.rules.check(name, transport)
        except ForbiddenSourceError as error:
            raise ApiError(403, str(error)) from None


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback name or address, reachable only from this machine."""
    try:
        return host in LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    """The host of a Host header without its port; raises ``ApiError`` (400) if the header is malformed."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        raise ApiError(400, "the Host header cannot be read") from None


def _netloc_of(origin: str) -> str | None:
    """The host and port of an origin; None if it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
