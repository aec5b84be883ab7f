"""Requests that never arrive completely, against a real uvicorn in a thread."""

import asyncio
import contextlib
import resource
import socket
import threading
import urllib.request

import pytest
import uvicorn
from starlette.responses import StreamingResponse

from flash_vstream.serve.connections import PatientProtocol, connection_limit
from helpers.waiting import until


class Impatient(PatientProtocol):
    head_seconds, body_seconds, send_seconds = 0.3, 0.3, 0.3


class Crowded(PatientProtocol):
    most_arriving, grace_seconds = 20, 0.0


@pytest.fixture
def protocol():
    return Impatient


async def endless():
    while True:
        yield bytes(65536)
        await asyncio.sleep(0)


@pytest.fixture
def server(protocol):
    async def app(scope, receive, send):
        if scope["path"] == "/endless":
            await StreamingResponse(endless())(scope, receive, send)
            return
        message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None, timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started)
    yield server
    server.should_exit = True
    thread.join(timeout=30)


@pytest.fixture
def address(server):
    return server.servers[0].sockets[0].getsockname()


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.02)
    try:
        return connection.recv(100) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"GET / HTTP/1.1\r\nhost: x\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1234",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4\r\n12",
    ],
)
def test_half_a_request_is_dropped(address, half):
    with socket.create_connection(address) as connection:
        connection.sendall(half)
        until(lambda: is_closed(connection))


def test_dripping_does_not_help(address):
    with socket.create_connection(address) as connection, contextlib.suppress(OSError):
        for byte in b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000:
            connection.sendall(bytes([byte]))
            if is_closed(connection):
                return
    assert is_closed(connection)


def test_a_kept_connection_is_dropped_when_its_second_request_stays_half(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert until(lambda: connection.recv(1000)).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HTTP/1.1\r\n")
        until(lambda: is_closed(connection))


def test_a_thousand_halves_keep_nobody_out(address):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")
        url = f"http://{address[0]}:{address[1]}/"
        assert urllib.request.urlopen(url, timeout=30).read() == b"ok"
        until(lambda: not Impatient.arriving)


@pytest.mark.parametrize("protocol", [Crowded])
def test_beyond_a_crowd_the_oldest_is_dropped(address, protocol):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address)) for _ in range(100)]
        until(lambda: sum(is_closed(connection) for connection in connections) == 80)
        assert not is_closed(connections[-1])


def test_a_caller_who_stops_reading_is_dropped(server, address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: server.server_state.connections)
        until(lambda: not server.server_state.connections, 30)


def test_descriptors_are_kept_back():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = connection_limit()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft >= before[0]
    assert 16 <= limit <= max(16, soft - 256)
