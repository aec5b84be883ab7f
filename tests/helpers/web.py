"""A real web server for media, as well or badly behaved as a test needs."""

import http.server
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np


class MediaServer:
    """Serves the files of a folder with range support and records the requested paths.

    ``cut_at`` is the share of a file after which the connection drops (1: never). Set ``ranges`` to False to
    disable range support.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.cut_at = 1.0
        self.ranges = True
        self.requests: list[str] = []
        self.url = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Answer a GET or HEAD."""
        self.requests.append(request.path)
        path = self.folder / request.path.lstrip("/").partition("?")[0]
        if not path.is_file():
            request.send_error(404)
            return
        data, start = path.read_bytes(), 0
        requested = re.match(r"bytes=(\d+)-", request.headers.get("range", "")) if self.ranges else None
        if requested and int(requested[1]) >= len(data):
            request.send_error(416)
            return
        request.send_response(206 if requested else 200)
        if requested:
            start = int(requested[1])
            request.send_header("content-range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.ranges:
            request.send_header("accept-ranges", "bytes")
        request.send_header("content-length", str(len(data) - start))
        request.end_headers()
        request.wfile.write(data[start : max(start, int(self.cut_at * len(data)))])
        request.close_connection = True


@contextmanager
def serving_media(folder: Path) -> Iterator[MediaServer]:
    """Serve the files of ``folder`` on a free port of loopback."""
    media = MediaServer(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            media.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        media.url = f"http://127.0.0.1:{server.server_port}"
        yield media
        server.shutdown()


@contextmanager
def raw_camera(head: bytes, pieces: Callable[[int], bytes], pause: float = 0.02) -> Iterator[str]:
    """A camera that answers every connection with ``head``, then ``pieces(0)``, ``pieces(1)``, … forever."""

    def talk(connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(4096)
                connection.sendall(head)
                number = 0
                while True:
                    connection.sendall(pieces(number))
                    number += 1
                    time.sleep(pause)
            except OSError:
                pass  # the viewer is gone

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/stream"
        server.shutdown(socket.SHUT_RDWR)


def write_playlist(path: Path, frames: int, ended: bool = True) -> Path:
    """Write an HLS playlist with one-second segments of 10 frames; grey levels rise by 4 per frame."""
    with av.open(str(path), "w", format="hls", options={"hls_time": "1", "hls_list_size": "0"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            image = np.full((48, 64, 3), min(4 * i, 255), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    if not ended:
        path.write_text(path.read_text().replace("#EXT-X-ENDLIST\n", ""))
    return path
