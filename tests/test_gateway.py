"""FFmpeg never reaches what the rules forbid: redirects, playlists, certificates, with real loopback servers."""

import http.server
import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import httpx
import pytest
import trustme
from av.error import ArgumentError, FFmpegError

from flash_vstream.errors import UserError
from flash_vstream.video.gateway import USER_AGENT, marked, reach, unmarked
from flash_vstream.video.network import SourceRules
from flash_vstream.video.sources import Source, watch_source
from helpers.videos import write_video

RULES = SourceRules(hosts=frozenset({"localhost"}))
"""localhost is allowed, 127.0.0.1 is not."""
REFUSED = (FFmpegError, UserError)


class Site:
    """A web server on loopback that maps paths to bodies or redirect targets."""

    def __init__(self, tls: ssl.SSLContext | None = None):
        self.pages: dict[str, bytes | str] = {}
        self.asked: list[str] = []
        self.agents: set[str] = set()
        self.hosts: set[str] = set()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                site.agents.add(self.headers["user-agent"])
                site.hosts.add(self.headers["host"])
                page = site.pages.get(self.path)
                self.send_response(404 if page is None else 200 if isinstance(page, bytes) else 302)
                if isinstance(page, str):
                    self.send_header("location", page)
                elif page is not None:
                    self.send_header("content-length", str(len(page)))
                    self.send_header("content-type", "application/x-mpegurl" if b"#EXTM3U" in page else "video/mp2t")
                self.end_headers()
                if isinstance(page, bytes):
                    self.wfile.write(page)

            def do_CONNECT(self):
                site.asked.append(self.path)
                self.send_error(403)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.server.handle_error = lambda *_: None
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def sites():
    made: list[Site] = []

    def make(tls: ssl.SSLContext | None = None) -> Site:
        made.append(Site(tls))
        return made[-1]

    yield make
    for site in made:
        site.server.shutdown()
        site.server.server_close()


@pytest.fixture(scope="module")
def segment(tmp_path_factory) -> bytes:
    return write_video(tmp_path_factory.mktemp("segments") / "a.ts", frames=20).read_bytes()


def playlist(*segments: str) -> bytes:
    lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:2", "#EXT-X-MEDIA-SEQUENCE:0"]
    for name in segments:
        lines += ["#EXTINF:2.0,", name]
    return "\n".join([*lines, "#EXT-X-ENDLIST", ""]).encode()


def frames(url: str, rules: SourceRules | None = RULES, **more) -> int:
    return sum(1 for _ in watch_source(Source(url, 30, size=32, rules=rules, **more)))


def test_what_is_allowed_is_watched(sites, segment):
    site = sites()
    site.pages |= {"/a.ts": segment, "/old": "/live/list.m3u8"}
    site.pages |= {"/live/list.m3u8": playlist("a.ts", "/a.ts"), "/live/a.ts": segment}
    assert frames(f"http://localhost:{site.port}/a.ts")
    assert frames(f"http://localhost:{site.port}/old")
    assert "/live/a.ts" in site.asked
    assert site.agents == {USER_AGENT}


def test_redirects_do_not_lead_to_closed_addresses(sites, segment):
    site, closed = sites(), sites()
    closed.pages["/a.ts"] = segment
    site.pages["/a.ts"] = f"http://127.0.0.1:{closed.port}/a.ts"
    with pytest.raises(UserError, match=r"127\.0\.0\.1 is a private address"):
        frames(f"http://localhost:{site.port}/a.ts")
    assert site.asked
    assert not closed.asked
    assert frames(f"http://localhost:{site.port}/a.ts", rules=None)  # without rules, loopback is allowed


@pytest.mark.parametrize(
    "lines",
    [
        ("http://127.0.0.1:{port}/a.ts", "tcp://127.0.0.1:{port}"),
        ("httpproxy://127.0.0.1:{port}/a.ts",),
        ('#EXT-X-KEY:METHOD=AES-128,URI="httpproxy://127.0.0.1:{port}/key"', "a.ts"),
        ('#EXT-X-MAP:URI="httpproxy://127.0.0.1:{port}/a.ts"', "a.ts"),
    ],
)
def test_playlists_do_not_lead_to_closed_addresses(sites, segment, lines):
    site, closed = sites(), sites()
    closed.pages["/a.ts"] = site.pages["/a.ts"] = segment
    site.pages["/list.m3u8"] = playlist(*(line.format(port=closed.port) for line in lines))
    with pytest.raises(REFUSED):
        frames(f"http://localhost:{site.port}/list.m3u8")
    assert "/list.m3u8" in site.asked
    assert not closed.asked


@pytest.mark.parametrize(
    "body",
    [
        "ffconcat version 1.0\nfile http://127.0.0.1:{port}/a.ts\n",
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video {port} RTP/AVP 26\r\n",
        "#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    ],
)
def test_lists_of_other_kinds_are_not_followed(sites, body):
    site, closed = sites(), sites()
    site.pages["/list"] = body.format(port=closed.port).encode()
    with pytest.raises(REFUSED):
        frames(f"http://localhost:{site.port}/list")
    assert not closed.asked


@contextmanager
def sending(data: bytes):
    """Sends the same to everyone who connects over TCP; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_what_a_tcp_sender_sends_opens_no_ports(segment):
    """Only media is taken, not a description of the ports on which FFmpeg should listen."""
    with sending(segment) as port:
        assert frames(f"tcp://localhost:{port}", pace="fast")
    description = (
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 26\r\n"
    )
    with sending(description) as port, reach(f"tcp://localhost:{port}", RULES) as (url, options):
        assert options["protocol_whitelist"] == "tcp"
        with pytest.raises(ArgumentError):  # at once; a port would be listened on until the timeout
            av.open(url, options=options, timeout=20)


def test_a_host_s_name_need_not_be_ascii(sites, segment, monkeypatch):
    resolved = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: resolved(host.replace("bücher.test", "127.0.0.1"), *rest, **more),
    )
    site = sites()
    site.pages["/a.ts"] = segment
    assert frames(f"http://bücher.test:{site.port}/a.ts", SourceRules(hosts=frozenset({"bücher.test"})), pace="fast")
    assert site.hosts == {f"xn--bcher-kva.test:{site.port}"}


def test_a_header_that_cannot_be_sent_is_refused(sites):
    site = sites()
    with reach(f"http://localhost:{site.port}/a.ts", RULES) as (url, options):
        answer = httpx.get(url, headers={"cookie": "é".encode("latin-1")}, proxy=options["http_proxy"])
    assert (answer.status_code, site.asked) == (502, [])


def test_a_no_proxy_setting_does_not_go_around_the_gateway(sites, segment, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    site, closed = sites(), sites()
    closed.pages["/a.ts"] = segment
    site.pages["/a.ts"] = f"http://127.0.0.1:{closed.port}/a.ts"
    with pytest.raises(REFUSED):
        frames(f"http://localhost:{site.port}/a.ts")
    assert not closed.asked


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls_of(authority: trustme.CA, name: str = "localhost") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.mark.parametrize("rules", [RULES, None])
def test_certificates_are_verified_of_the_source_and_of_its_segments(
    sites, segment, authority, rules, monkeypatch, tmp_path
):
    trusted, foreign, misnamed = (
        sites(tls_of(authority)),
        sites(tls_of(trustme.CA())),
        sites(tls_of(authority, "elsewhere.example")),
    )
    for site in (trusted, foreign, misnamed):
        site.pages |= {"/a.ts": segment, "/list.m3u8": playlist("a.ts")}
    trusted.pages["/foreign.m3u8"] = playlist(f"https://localhost:{foreign.port}/a.ts")
    trusted.pages["/moved.m3u8"] = f"https://localhost:{foreign.port}/list.m3u8"
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert frames(f"https://localhost:{trusted.port}/list.m3u8", rules)
    for url in (
        f"https://localhost:{foreign.port}/a.ts",
        f"https://localhost:{misnamed.port}/a.ts",
        f"https://localhost:{trusted.port}/foreign.m3u8",
        f"https://localhost:{trusted.port}/moved.m3u8",
    ):
        with pytest.raises(REFUSED):
            frames(url, rules)
    assert not foreign.asked
    assert not misnamed.asked
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(UserError, match=r"(?i)certificate"):
        frames(f"https://localhost:{trusted.port}/a.ts", rules)


def test_marked_urls_come_back_as_they_were():
    for url in ("https://u:p@h.example:8443/a/b?x=1", "https://[2001:db8::1]/a", "https://h.example/", "http://h/x"):
        assert unmarked(marked(url)) == url
        assert marked(url).startswith("http://")


@contextmanager
def rtsp(reply: str):
    """A camera that always sends the same reply."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        requests: list[bytes] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        while request := connection.recv(4096):
                            requests.append(request)
                            sequence = request.partition(b"CSeq: ")[2].partition(b"\r\n")[0].decode()
                            connection.sendall(reply.format(sequence=sequence).encode())
                    except OSError:
                        pass

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], requests
        listener.shutdown(socket.SHUT_RDWR)


def test_an_rtsp_redirect_is_not_followed():
    refusal = "RTSP/1.0 404 Not Found\r\nCSeq: {sequence}\r\n\r\n"
    with rtsp(refusal) as (closed, closed_requests):
        moved = f"RTSP/1.0 302 Moved\r\nCSeq: {{sequence}}\r\nLocation: rtsp://127.0.0.1:{closed}/1\r\n\r\n"
        with rtsp(moved) as (port, requests):
            with pytest.raises(REFUSED):
                frames(f"rtsp://localhost:{port}/1")
            assert requests
            assert not closed_requests
            with pytest.raises(REFUSED):
                frames(f"rtsp://localhost:{port}/1", rules=None)
            assert closed_requests  # without the gateway, it would be followed


def test_closed_sources_are_refused_where_they_are_opened():
    for url in ("http://127.0.0.1:1/a", "rtsp://127.0.0.1:1/a", "tcp://127.0.0.1:1", "tcp://localhost:1?listen=1"):
        with pytest.raises(REFUSED):
            frames(url)


def test_what_needs_no_gateway_is_opened_as_it_is():
    with reach("rtsp://cam/1", None) as opened:
        assert opened == ("rtsp://cam/1", {})


def test_a_tls_camera_needs_tcp():
    for rules in (None, RULES):
        with pytest.raises(UserError, match="choose transport tcp"), reach("rtsps://localhost/1", rules, "udp"):
            pass


def test_a_tls_camera_s_certificate_is_verified(authority):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context = tls_of(authority)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    context.wrap_socket(connection, server_side=True).close()
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError, match="cannot be reached over TLS"):
            frames(f"rtsps://localhost:{listener.getsockname()[1]}/1", rules=None)
        listener.shutdown(socket.SHUT_RDWR)


def test_paths_are_no_urls(tmp_path: Path):
    write_video(tmp_path / "http:clip.mp4", frames=5)
    assert frames(str(tmp_path / "http:clip.mp4"), rules=None, pace="fast")
