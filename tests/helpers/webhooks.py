"""A real receiver of webhooks."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Receiver:
    """Records requests as (headers in lower case, raw body); answers with each of ``statuses``, then 204."""

    def __init__(self):
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.url = ""

    def alerts(self) -> list[dict]:
        """What was received, in order, repetitions included."""
        return [json.loads(body)["data"] for _, body in self.requests]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Receive webhooks on a free port of loopback."""
    receiver = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        receiver.url = f"http://127.0.0.1:{server.server_port}/alerts"
        yield receiver
        server.shutdown()
