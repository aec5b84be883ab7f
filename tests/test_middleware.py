"""The middleware in front of every request, around a minimal application; no processes, no model."""

import json
import logging

import pytest
from fastapi import Body, FastAPI, Response, WebSocket
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from flash_vstream.json_log import JsonFormatter, RateLimit
from flash_vstream.serve.middleware import CallerCheck, add_middleware
from flash_vstream.serve.security import AccessRules

ALLOWED = "https://app.example"


def client(access: AccessRules | None = None, host: str = "http://127.0.0.1") -> TestClient:
    app = FastAPI()
    add_middleware(app, access or AccessRules(), json_bytes=1000, upload_bytes=2_000_000)

    @app.get("/large")
    def large() -> Response:
        return Response(b"x" * 5000, media_type="text/plain")

    @app.get("/events")
    def events() -> Response:
        return Response(b"data: x\n\n" * 500, media_type="text/event-stream")

    @app.post("/json")
    @app.post("/v1/chat/completions")
    async def take(value: object = Body()) -> int:
        return len(str(value))

    @app.websocket("/socket")
    async def socket(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")
        await socket.close()

    return TestClient(app, base_url=host)


def chunks(data: bytes, size: int = 300):
    for at in range(0, len(data), size):
        yield data[at : at + size]


def test_bodies_are_bounded_whether_they_tell_their_length_or_not():
    body = json.dumps("x" * 2000).encode()
    typed = {"content-type": "application/json"}
    for content in (body, chunks(body)):
        response = client().post("/json", content=content, headers=typed)
        assert response.status_code == 413
        assert "1,000 bytes" in response.text
    assert client().post("/json", content=chunks(body[:300] + b'"'), headers=typed).status_code == 200


def test_an_upload_may_be_large_but_not_deep():
    upload = json.dumps({"url": "data:video/mp4;base64," + "QUJD" * 300_000}).encode()
    typed = {"content-type": "application/json"}
    assert client().post("/v1/chat/completions", content=upload, headers=typed).status_code == 200
    bomb = b"[" + b"[],[]," * 200_000 + b"[]]"
    for content in (bomb, chunks(bomb, 65536)):
        response = client().post("/v1/chat/completions", content=content, headers=typed)
        assert response.status_code == 413
        assert "50,000 values" in response.text


@pytest.mark.parametrize(
    "headers", [{"host": "["}, {"origin": "http://["}, {"host": "[::1"}, {"origin": "http://[x]y"}]
)
def test_headers_that_cannot_be_read_are_the_callers_mistake(headers):
    token = {"authorization": "Bearer t"}
    for access in (AccessRules(), AccessRules("0.0.0.0", "t")):
        response = client(access).get("/large", headers={**token, **headers})
        assert response.status_code in (400, 403)
        assert response.json()["error"]["message"]


def test_head_works_where_get_does():
    response = client().head("/large")
    assert (response.status_code, response.content, response.headers["content-type"]) == (
        200,
        b"",
        "text/plain; charset=utf-8",
    )
    assert client().head("/json").status_code == 405


def test_every_loopback_address_is_the_servers_own():
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "[::1]"):
        assert client(AccessRules("127.0.0.2"), f"http://{host}:8000").get("/large").status_code == 200
    assert client(host="http://evil.example").get("/large").status_code == 403


def test_a_page_that_is_allowed_gets_its_preflight_and_headers():
    allowed = client(AccessRules("0.0.0.0", "t", origins=frozenset({ALLOWED})))
    asks = {"access-control-request-method": "PATCH", "access-control-request-headers": "authorization,content-type"}
    response = allowed.options("/json", headers={"origin": ALLOWED, **asks})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ALLOWED
    assert "PATCH" in response.headers["access-control-allow-methods"]
    assert allowed.options("/json", headers={"origin": "https://evil.example", **asks}).status_code == 400
    site = {"origin": ALLOWED, "sec-fetch-site": "cross-site"}
    response = allowed.get("/large", headers={**site, "authorization": "Bearer t"})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, ALLOWED)
    response = allowed.get("/large", headers=site)  # so that the page can read the error
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, ALLOWED)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_foreign_page_embeds_is_turned_away(site):
    """An image request has no Origin header, so the browser's other headers about the page decide."""
    headers = {"sec-fetch-site": site, "sec-fetch-dest": "image", "sec-fetch-mode": "no-cors"}
    assert client().get("/large", headers=headers).status_code == 403
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("ws://127.0.0.1/socket", headers=headers):
        pass
    for own in ("same-origin", "none"):
        with client().websocket_connect("ws://127.0.0.1/socket", headers={"sec-fetch-site": own}) as socket:
            assert socket.receive_text() == "hello"
    assert client().get("/large").headers["cross-origin-resource-policy"] == "same-origin"


def test_large_answers_are_compressed_and_events_are_not():
    assert client().get("/large").headers["content-encoding"] == "gzip"
    assert "content-encoding" not in client().get("/events").headers


def test_a_check_can_stand_alone():
    """As used by ``vstream-qa review``, whose page has its own scripts and headers."""
    app = FastAPI()
    app.add_middleware(CallerCheck, access=AccessRules())

    @app.get("/records")
    def records() -> list[int]:
        return [1]

    alone = TestClient(app, base_url="http://127.0.0.1")
    assert alone.get("/records").status_code == 200
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert alone.get("/records", headers=headers).status_code == 403


def test_a_stream_of_errors_is_logged_a_few_times(tmp_path):
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(JsonFormatter())
    limit = RateLimit(burst=3, period=3600)
    handler.addFilter(limit)
    logger = logging.Logger("flood")
    logger.addHandler(handler)
    for i in range(1000):
        logger.error("it failed", extra={"number": i})
        logger.info("a request")
    logger.error("another kind")
    limit._period = 0
    logger.error("another kind again")
    handler.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["number"] for line in lines if line["event"] == "it failed"] == [0, 1, 2]
    assert sum(line["event"] == "a request" for line in lines) == 1000
    assert [line["event"] for line in lines[-2:]] == ["another kind", "another kind again"]


def test_the_first_record_after_a_pause_tells_how_many_were_left_out():
    limit = RateLimit(burst=1, period=3600)
    records = [logging.LogRecord("x", logging.ERROR, "here.py", 1, "failed", (), None) for _ in range(6)]
    assert [limit.filter(record) for record in records[:5]] == [True, False, False, False, False]
    limit._period = 0
    assert limit.filter(records[5])
    assert records[5].suppressed == 4


def test_the_review_page_has_the_servers_rules(tmp_path):
    from flash_vstream.cli.vstream_qa import guarded_review_app

    record = {"questions": [], "segments": [], "video": "none.mp4", "cost": {}}
    (tmp_path / "clip.json").write_text(json.dumps(record))
    page = TestClient(guarded_review_app(tmp_path), base_url="http://127.0.0.1:8001")
    assert page.get("/records").status_code == 200
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert page.get("/records", headers=headers).status_code == 403
        assert page.post("/records/clip/0", json={}, headers=headers).status_code == 403
