"""Who may call, and what a source may name.

On loopback a server is its user's own and may watch whatever that user may. Beyond it, callers need
the token, and sources are closed for private addresses, local files and devices unless they are
allowed by name.
"""

import hmac
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flash_vstream.errors import UserError
from flash_vstream.video.sources import NETWORK, PUSH

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
        if origin and origin not in self.origins and urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, "pages of other origins may not call this server; allow one with --allow-origin")
        if self.token:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given if scheme.lower() == "bearer" else (query_token or "")
            if not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                raise ApiError(401, "a bearer token is needed: Authorization: Bearer TOKEN")

    def check_source(self, name: str) -> None:
        """See whether a source may be watched; raises ``ApiError``."""
        if self.local or name == PUSH:
            return
        parts = urlsplit(name)
        if parts.scheme.lower() in NETWORK:
            self._check_address(parts.hostname or "")
            return
        path = Path(os.path.realpath(name))
        if not any(path.is_relative_to(os.path.realpath(folder)) for folder in self.folders):
            raise ApiError(
                403, "files and devices of the server are closed; its keeper can open a folder with --allow-folder"
            )

    def _check_address(self, host: str) -> None:
        if host.lower() in self.hosts:
            return
        try:
            found = {str(item[4][0]) for item in socket.getaddrinfo(host, None)}
        except (OSError, UnicodeError):
            raise ApiError(422, f"no host is called {host[:80]!r}") from None
        if not found or any(not _is_public(address) for address in found):
            raise ApiError(403, f"{host[:80]} is a private address; the server's keeper can allow it with --allow-host")


def is_loopback(host: str) -> bool:
    """Whether binding to ``host`` is reachable from this machine alone."""
    try:
        return host in LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_global


def _host_of(header: str) -> str:
    """The host of a Host header, without its port."""
    return (urlsplit(f"//{header}").hostname or "") if header else ""
