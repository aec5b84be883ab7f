"""What a source may reach: the one place that parses URLs, and the rules that every address must pass."""

import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import SplitResult, parse_qsl, urlsplit

import psutil

from flash_vstream.errors import UserError

SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "tcp", "srt"})
HOSTLESS = frozenset({"udp", "tcp", "srt"})
"""Schemes that can also wait for a sender, and so need no host."""
OPTIONS = {
    "tcp": frozenset({"timeout"}),
    "udp": frozenset({"timeout", "fifo_size", "buffer_size", "overrun_nonfatal", "pkt_size"}),
    "srt": frozenset({"latency", "streamid", "passphrase", "pbkeylen", "timeout", "connect_timeout", "transtype"}),
}
"""The options that a guarded URL may set; ``listen``, ``localaddr`` and the like would open ports."""
RTSP_WORDS = frozenset({"udp", "multicast", "http", "https", "filter_src", "listen"})
"""The query options of an RTSP URL that FFmpeg interprets itself; the rest goes to the camera."""
DISGUISED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")))
"""IPv6 addresses that stand for IPv4 ones: NAT64, 6to4, Teredo, IPv4-compatible."""


class ForbiddenSourceError(UserError):
    """The server's rules forbid this source."""


def is_url(name: str) -> bool:
    """Whether a source's name is a network URL."""
    scheme, colon, _ = name.partition("://")
    return bool(colon) and scheme.lower() in SCHEMES


def parse_url(url: str) -> SplitResult:
    """The parts of a URL; raises ``UserError`` that says what is wrong without repeating possible secrets."""
    check_name(url, "the URL")
    if " " in url:
        raise UserError("the URL holds a space; write it as %20")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"the URL's host is malformed ({error})") from None
    try:
        _ = parts.port
    except ValueError:
        raise UserError(
            "the URL's port is not a number up to 65535 (write /, ? and # in a password as %2F, %3F and %23)"
        ) from None
    host = parts.hostname
    if not host:
        if parts.scheme.lower() in HOSTLESS:
            return parts
        raise UserError("the URL names no host")
    try:
        host.encode("ascii" if ":" in host else "idna")
    except UnicodeError:
        raise UserError("the URL's host is not a name that can be looked up") from None
    if not re.fullmatch(r"[^\s/\\?#@<>\"^`{|}]+", host):
        raise UserError("the URL's host holds a character that no host has")
    return parts


def check_name(name: str, what: str) -> None:
    """Raise ``UserError`` for a name with control characters or an unpaired surrogate."""
    for character in name:
        if ord(character) < 32 or ord(character) == 127:
            raise UserError(f"{what} holds a control character (U+{ord(character):04X})")
        if 0xD800 <= ord(character) <= 0xDFFF:
            raise UserError(f"{what} holds half of a surrogate pair (U+{ord(character):04X})")


@dataclass(frozen=True)
class SourceRules:
    """What a guarded server's sources may reach: public addresses, ``hosts`` by name, files in ``folders``."""

    hosts: frozenset[str] = frozenset()
    folders: tuple[str, ...] = ()

    def check(self, name: str, transport: str = "tcp") -> None:
        """Raise ``ForbiddenSourceError`` for a forbidden source, ``UserError`` for a malformed URL or unknown host."""
        if not is_url(name):
            self.check_path(name)
            return
        parts = parse_url(name)
        self.check_options(parts, transport)
        if (parts.hostname or "") not in self.hosts:  # an allowed host need not be up yet
            self.addresses(parts.hostname or "")

    def check_options(self, parts: SplitResult, transport: str = "tcp") -> None:
        """Raise ``ForbiddenSourceError`` for a URL whose options open ports or redirect elsewhere."""
        scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
        given = {key.lower() for key, _ in parse_qsl(parts.query, keep_blank_values=True)}
        allowed = OPTIONS.get(scheme)
        wrong = given - allowed if allowed is not None else given & RTSP_WORDS if scheme.startswith("rtsp") else set()
        if wrong:
            raise ForbiddenSourceError(f"the option {min(wrong)[:40]!r} of a {scheme} URL is closed on this server")
        if host not in self.hosts and (scheme == "udp" or (scheme.startswith("rtsp") and transport == "udp")):
            raise ForbiddenSourceError(
                "UDP opens a port and is closed on this server; choose transport tcp, or let the server's operator"
                " allow the host with --allow-host"
            )

    def addresses(self, host: str, port: int | None = None) -> list[str]:
        """The addresses of ``host`` from a single lookup, all of them allowed.

        Raises ``ForbiddenSourceError`` if any is not allowed, and ``UserError`` for an unknown host.
        """
        try:
            addresses = list(
                dict.fromkeys(str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            )
        except (OSError, UnicodeError):
            raise UserError(f"no host is called {host[:80]!r}") from None
        if host.lower() in self.hosts:
            return addresses
        if not addresses or not all(map(is_public, addresses)):
            raise ForbiddenSourceError(
                f"{host[:80]} is a private address; the server's operator can allow it with --allow-host"
            )
        return addresses

    def check_path(self, name: str) -> None:
        """Raise ``ForbiddenSourceError`` for a file outside the allowed folders, after resolving links."""
        check_name(name, "the path")
        path = os.path.realpath(name)
        roots = [os.path.realpath(folder) for folder in self.folders]
        if not any(os.path.commonpath([path, root]) == root for root in roots):
            raise ForbiddenSourceError(
                "files and devices of the server are closed; its operator can open a folder with --allow-folder"
            )


def is_public(address: str) -> bool:
    """Whether an address is on the public internet and not this machine's own, as far as the address shows."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.is_site_local or any(ip in network for network in DISGUISED):
            return False
    return ip.is_global and not ip.is_multicast and str(ip) not in own_addresses()


@lru_cache(maxsize=1)
def own_addresses() -> frozenset[str]:
    """The addresses of this machine's interfaces."""
    found = set()
    for interface in psutil.net_if_addrs().values():
        for address in interface:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                found.add(str(ipaddress.ip_address(address.address.partition("%")[0])))
    return frozenset(found)
