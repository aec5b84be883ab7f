"""A gateway on loopback: FFmpeg's only route to the network when its connections must be checked.

FFmpeg follows redirects and playlists on its own, resolves each host name again, and verifies certificates for the
first connection at most. So http(s) goes through a proxy in this process that checks every request against the rules,
connects only to the addresses it has checked, and verifies certificates itself. RTSP and RTMP go through a relay to the
checked address, which does not forward redirects.
"""

import contextlib
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import httpx
from av.error import FFmpegError

from flash_vstream import __version__
from flash_vstream.errors import UserError
from flash_vstream.video.network import SourceRules, parse_url

USER_AGENT = f"flash-vstream/{__version__}"
CONNECT_SECONDS = 10.0
READ_SECONDS = 120.0
MARK = ".https.invalid"
"""Marks a host that FFmpeg requests over plain HTTP and the proxy fetches over HTTPS. No real host has this suffix."""
MOST_PLAYLIST_BYTES = 4 * 2**20
CONTAINERS = "mov,matroska,webm,mpegts,mpeg,flv,avi,ogg,gif,asf,h264,hevc,av1,mjpeg,mpjpeg,jpeg_pipe,aac,mp3,webvtt"
"""Formats that contain media and never refer to another location."""
PASSED_ON = ("range", "authorization", "cookie", "referer", "icy-metadata", "accept")
PASSED_BACK = (
    "content-type",
    "content-length",
    "content-range",
    "accept-ranges",
    "www-authenticate",
    "set-cookie",
    "icy-metaint",
)
FAULTS = (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError, RuntimeError)
"""What forwarding a request raises, also for headers that cannot be encoded and after the client was closed."""


@contextmanager
def reach(url: str, rules: SourceRules | None, transport: str = "tcp") -> Iterator[tuple[str, dict[str, str]]]:
    """Context that yields the URL and options with which FFmpeg can open ``url``.

    With ``rules`` (on a server reachable beyond loopback) every connection is checked. Certificates are always verified
    (``SSL_CERT_FILE`` names others to trust). Raises ``UserError`` for a URL that is malformed or forbidden.
    """
    parts = parse_url(url)
    scheme = parts.scheme.lower()
    if rules is None and scheme not in ("https", "rtsps", "rtmps"):
        yield url, {"user_agent": USER_AGENT} if scheme == "http" else {}
        return
    if rules is not None:
        rules.check_options(parts, transport)
    if scheme in ("http", "https"):
        with _proxy(rules) as proxy:
            # Without httpproxy, which would let a playlist choose a proxy of its own.
            options = {"http_proxy": proxy, "protocol_whitelist": "http,tcp,crypto,data"}
            yield marked(url), options | {"format_whitelist": f"hls,{CONTAINERS}", "user_agent": USER_AGENT}
    elif scheme == "rtsps" and transport == "udp":
        raise UserError("rtsps sends everything over one TLS connection; choose transport tcp")
    elif scheme in PORTS and (scheme, transport) != ("rtsp", "udp"):
        with _relay(parts, rules) as port:
            plain = scheme.removesuffix("s")
            options = {"protocol_whitelist": f"{plain},tcp", "format_whitelist": "rtsp,flv,live_flv,mpegts"}
            yield parts._replace(scheme=plain, netloc=_netloc(parts, "127.0.0.1", port)).geturl(), options
    else:  # tcp, srt, and UDP from a host allowed by name
        assert rules is not None
        address = rules.addresses(parts.hostname or "", parts.port)[0]
        pinned = parts._replace(netloc=_netloc(parts, address, parts.port)).geturl()
        # RTSP over UDP opens a port for each of the camera's tracks; nothing else may open one.
        protocols, formats = ("rtsp,rtp,tcp,udp", "rtsp") if scheme == "rtsp" else (scheme, CONTAINERS)
        yield pinned, {"protocol_whitelist": protocols, "format_whitelist": formats}


def _netloc(parts: SplitResult, host: str, port: int | None) -> str:
    user = parts.netloc.rpartition("@")[0]
    shown = f"[{host}]" if ":" in host else host
    return (f"{user}@" if user else "") + shown + (f":{port}" if port else "")


# --- http(s)


def marked(url: str) -> str:
    """An https URL rewritten as an http URL that only the proxy can fetch; other URLs unchanged."""
    parts = urlsplit(url)
    if parts.scheme.lower() != "https":
        return url
    host = parts.hostname or ""
    named = f"{host.replace(':', '-')}.v6" if ":" in host else host
    return parts._replace(scheme="http", netloc=_netloc(parts, named + MARK, parts.port)).geturl()


def unmarked(url: str) -> str:
    """The original of a URL returned by ``marked``."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not host.endswith(MARK):
        return url
    host = host.removesuffix(MARK)
    if host.endswith(".v6"):
        host = host.removesuffix(".v6").replace("-", ":")
    return parts._replace(scheme="https", netloc=_netloc(parts, host, parts.port)).geturl()


def pinned_request(
    url: str, rules: SourceRules | None, headers: dict[str, str], method: str = "GET", content: bytes | None = None
) -> httpx.Request:
    """A request for ``url`` pinned to an address that the rules allow, even if the host name later resolves to another.

    Raises ``UserError`` for a URL that is malformed or forbidden.
    """
    parts = parse_url(url)
    if parts.scheme.lower() not in ("http", "https"):
        raise UserError("the address leads away from http(s)")
    host = parts.hostname or ""
    sent = {"user-agent": USER_AGENT, "accept-encoding": "identity", **headers}
    if rules is None:
        return httpx.Request(method, url, headers=sent, content=content)
    rules.check_options(parts)
    address = rules.addresses(host, parts.port)[0]
    host = host.encode("ascii" if ":" in host else "idna").decode()
    sent["host"] = _netloc(parts, host, parts.port).rpartition("@")[2]
    if parts.username is not None and "authorization" not in {name.lower() for name in headers}:
        request = httpx.Request("GET", url)
        sent["authorization"] = next(
            httpx.BasicAuth(request.url.username, request.url.password).auth_flow(request)
        ).headers["authorization"]
    pinned = parts._replace(netloc=_netloc(parts, address, parts.port).rpartition("@")[2]).geturl()
    return httpx.Request(method, pinned, headers=sent, content=content, extensions={"sni_hostname": host})


def open_client(rules: SourceRules | None) -> httpx.Client:
    """A client for ``pinned_request``: verifies certificates, and leaves redirects for the caller to check."""
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    return httpx.Client(timeout=timeout, trust_env=rules is None, verify=tls_context())


class NamedContext(ssl.SSLContext):
    """A TLS context that asks for the certificate of the host ``name``, whatever address is connected to."""

    name = ""

    def wrap_socket(self, sock: socket.socket, *_: Any, **options: Any) -> ssl.SSLSocket:
        return super().wrap_socket(sock, **(options | {"server_hostname": self.name}))


def tls_context(name: str | None = None) -> ssl.SSLContext:
    """A TLS context that trusts the system's certificates and certifi's, or those that ``SSL_CERT_FILE`` names.

    With ``name``, it verifies that host's certificate at whatever address.
    """
    if name is None:
        context = ssl.create_default_context()
    else:
        context = NamedContext(ssl.PROTOCOL_TLS_CLIENT)
        context.name = name
        context.load_default_certs()
    if "SSL_CERT_FILE" not in os.environ and "SSL_CERT_DIR" not in os.environ:
        import certifi

        context.load_verify_locations(certifi.where())
    return context


@contextmanager
def _proxy(rules: SourceRules | None) -> Iterator[str]:
    """An HTTP proxy on a free loopback port; yields its URL."""
    with open_client(rules) as client:
        # FFmpeg would bypass the proxy for the hosts that this lists.
        os.environ.pop("no_proxy", None)

        class Handler(_Forward):
            pass

        Handler.client, Handler.rules, Handler.refusals = client, rules, []
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads, server.block_on_close = True, False
            threading.Thread(target=server.serve_forever, args=(0.05,), name="gateway", daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            except FFmpegError:
                if Handler.refusals:  # FFmpeg only knows the HTTP status
                    raise UserError(f"it cannot be reached: {Handler.refusals[-1]}") from None
                raise
            finally:
                server.shutdown()


class _Forward(BaseHTTPRequestHandler):
    """Forwards one of FFmpeg's requests."""

    client: httpx.Client
    rules: SourceRules | None
    refusals: list[str]

    @property
    def url(self) -> str:
        """The requested URL; FFmpeg has escaped a host that is not ASCII."""
        parts = urlsplit(self.path)
        return unmarked(parts._replace(netloc=_netloc(parts, unquote(parts.hostname or ""), parts.port)).geturl())

    def do_GET(self) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() in PASSED_ON}
        try:
            request = pinned_request(self.url, self.rules, headers)
            response = self.client.send(request, stream=True)
        except UserError as error:
            self._refuse(403, str(error))
            return
        except FAULTS as error:
            self._refuse(502, str(error))
            return
        with contextlib.closing(response), contextlib.suppress(*FAULTS):
            self._pass_back(response)

    def _refuse(self, status: int, reason: str) -> None:
        self.refusals[:] = [reason]
        with contextlib.suppress(OSError):
            self.send_response(status, "Refused")
            self.end_headers()
            self.wfile.write(reason.encode("utf-8", "replace"))

    def _pass_back(self, response: httpx.Response) -> None:
        chunks = response.iter_raw()
        first = next(chunks, b"")
        playlist = first.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"#EXTM3U")
        if playlist:
            for chunk in chunks:
                first += chunk
                if len(first) > MOST_PLAYLIST_BYTES:
                    self._refuse(502, "the playlist is too long")
                    return
            first = re.sub(
                rb"https://[^\s\"'<>]+", lambda match: marked(match[0].decode("latin-1")).encode("latin-1"), first
            )
        self.send_response(response.status_code)
        for name, value in response.headers.multi_items():
            if name.lower() in PASSED_BACK and not (playlist and name.lower() == "content-length"):
                self.send_header(name, value)
        if playlist:  # FFmpeg takes a body without a length for one that broke off
            self.send_header("content-length", str(len(first)))
        if "location" in response.headers:
            location = httpx.URL(self.url).join(response.headers["location"])
            self.send_header("location", marked(str(location)))
        self.end_headers()
        self.wfile.write(first)
        for chunk in chunks if not playlist else ():
            self.wfile.write(chunk)

    def log_message(self, *_: Any) -> None:
        """Log nothing: URLs may contain secrets."""


# --- RTSP and RTMP

PORTS = {"rtsp": 554, "rtsps": 322, "rtmp": 1935, "rtmps": 443}


@contextmanager
def _relay(parts: SplitResult, rules: SourceRules | None) -> Iterator[int]:
    """Relay a loopback port to the remote host; yields the port.

    The host's address is checked and pinned, and TLS is terminated and verified here.
    """
    scheme, host = parts.scheme.lower(), parts.hostname or ""
    port = parts.port or PORTS[scheme]
    address = rules.addresses(host, port)[0] if rules is not None else host
    context = tls_context() if scheme.endswith("s") else None
    if context is not None:  # report an invalid certificate now, with a readable reason
        try:
            _connect(address, port, host, context).close()
        except OSError as error:
            raise UserError(f"{host} cannot be reached over TLS ({getattr(error, 'verify_message', error)})") from None
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return  # closed
                threading.Thread(target=serve, args=(near,), daemon=True).start()

        def serve(near: socket.socket) -> None:
            with near, contextlib.suppress(OSError), _connect(address, port, host, context) as far:
                threading.Thread(target=_pump, args=(near, far), daemon=True).start()
                if scheme.startswith("rtsp"):
                    _pump_rtsp(far, near)
                else:
                    _pump(far, near)

        threading.Thread(target=accept, name="relay", daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def _connect(address: str, port: int, host: str, context: ssl.SSLContext | None) -> socket.socket:
    plain = socket.create_connection((address, port), CONNECT_SECONDS)
    plain.settimeout(READ_SECONDS)
    try:
        return plain if context is None else context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Forward bytes until either side closes."""
    with contextlib.suppress(OSError, ValueError):
        while data := source.recv(65536):
            sink.sendall(data)
    for side in (source, sink):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


def _pump_rtsp(far: socket.socket, near: socket.socket) -> None:
    """Forward a camera's replies and packets, but stop at a redirect, which FFmpeg would follow anywhere."""
    with far.makefile("rb") as replies, contextlib.suppress(OSError, ValueError):
        while first := replies.read(1):
            if first == b"$":  # an interleaved packet: channel, length, data
                head = replies.read(3)
                near.sendall(first + head + replies.read(int.from_bytes(head[1:], "big")))
                continue
            head = first + replies.readline(65536)
            if re.match(rb"RTSP/\S+ 3\d\d", head):
                break
            length = 0
            while (line := replies.readline(65536)) not in (b"\r\n", b"\n", b""):
                head += line
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            near.sendall(head + line + replies.read(length))
    with contextlib.suppress(OSError):
        near.shutdown(socket.SHUT_RDWR)
