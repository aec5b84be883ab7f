"""The whole service with the tiny model and its application, in this process except for the workers."""

import json
import shutil
import sqlite3
import time
from pathlib import Path

import anyio
import pytest
from fastapi.testclient import TestClient

from flash_vstream.errors import UserError
from flash_vstream.serve import answers
from flash_vstream.serve import service as service_module
from flash_vstream.serve.app import make_app
from flash_vstream.serve.in_progress import InProgress
from flash_vstream.serve.security import AccessRules
from flash_vstream.serve.service import Limits, NamedSource, Service
from flash_vstream.serve.store import StateFolder, StoreError
from helpers.asynchronous import run_async
from helpers.videos import write_video
from helpers.waiting import until

SLOTS = 64


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("served") / "clip.mp4", frames=20)


@pytest.fixture(scope="module")
def state(tmp_path_factory, video) -> Path:
    """A state folder with one stream whose file is missing and one that no version can read."""
    folder = tmp_path_factory.mktemp("state")
    StateFolder(folder).close()
    missing = {"name": str(folder / "later.mp4"), "fps": 5.0}
    with sqlite3.connect(folder / "log.sqlite") as db:
        for name, source in (("later", json.dumps(missing)), ("damaged", "{")):
            db.execute("insert into streams values (?, ?, 0)", (name, source))
    db.close()
    return folder


@pytest.fixture(scope="module")
def service(tiny_folder, state, video):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_module, "SAVE_SECONDS", 0.2)
        limits = Limits(questions_at_once=SLOTS)
        running = Service(str(tiny_folder), AccessRules(), state, limits, {"door": NamedSource(str(video), 5.0)})
        yield running
        running.close()


@pytest.fixture(scope="module")
def client(service):
    opened = TestClient(make_app(service), base_url="http://127.0.0.1")
    until(lambda: opened.get("/v1/streams/door").json()["state"] == "ended")
    return opened


def ask(client: TestClient, **more):
    return client.post("/v1/streams/door/questions", json={"question": "what?", "max_new_tokens": 1, **more})


def slots_are_free(service: Service, client: TestClient) -> bool:
    """Whether all question slots are free and every question has an outcome."""
    acquired = [service._questions.begin() for _ in range(SLOTS)]
    for _ in filter(None, acquired):
        service._questions.end()
    rows = service.store.history("door", 1000)
    return all(acquired) and all(row["answer"] is not None or row["error"] for row in rows) and ask(client).is_success


def test_a_clock_that_is_set_does_not_change_how_long_the_server_has_run(client, monkeypatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86400)
    assert 0 < client.get("/healthz").json()["uptime_seconds"] < 3600


def test_what_is_in_progress_is_counted(service, client):
    service._questions.begin()
    try:
        text = client.get("/metrics").text
    finally:
        service._questions.end()
    assert "flash_vstream_questions_in_progress 1.0" in text
    assert "flash_vstream_clips_in_progress 0.0" in text
    assert "flash_vstream_webhooks_given_up 0.0" in text
    with pytest.raises(ValueError, match="more was ended"):
        InProgress(1).end()


# --- questions


def leave_after_request(app, path: str, body: dict, reads: bool = True) -> None:
    """Act as a caller who disconnects right after sending the request, or who stays but reads nothing."""
    content = json.dumps(body).encode()
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    scope |= {"scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {}}
    messages = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive():
        if reads:
            return next(messages, {"type": "http.disconnect"})
        return next(messages, None) or await anyio.sleep_forever()

    async def send(message):
        if not reads and message.get("more_body"):
            await anyio.sleep_forever()

    run_async(app, scope, receive, send)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/streams/door/questions", "/v1/chat/completions"])
def test_callers_who_leave_at_once_take_no_slot_along(service, client, stream, path):
    before = len(service.store.history("door", 1000))
    body = {"question": "what?", "max_new_tokens": 400, "stream": stream}
    if "chat" in path:
        url = [{"type": "video_url", "video_url": {"url": "stream:door"}}, {"type": "text", "text": "what?"}]
        body = {"model": service.model_name, "messages": [{"role": "user", "content": url}], "stream": stream}
    for _ in range(SLOTS + 1):
        leave_after_request(client.app, path, body)
    rows = service.store.history("door", 1000)[before:]
    if "chat" in path:  # whoever leaves before the question is taken leaves no row
        assert len(rows) <= SLOTS + 1
    else:
        assert len(rows) == SLOTS + 1
        assert sum(row["error"] == "nobody waited for the answer" for row in rows) > SLOTS / 2
    assert all(row["answer"] is not None or row["error"] for row in rows)
    assert slots_are_free(service, client)


def test_a_caller_who_stops_reading_takes_no_slot_along(service, client, monkeypatch):
    monkeypatch.setattr(answers, "SEND_SECONDS", 0.1)
    body = {"question": "what?", "max_new_tokens": 400, "stream": True}
    leave_after_request(client.app, "/v1/streams/door/questions", body, reads=False)
    assert service.store.history("door", 1)[0]["error"] == "nobody waited for the answer"
    assert slots_are_free(service, client)


def test_text_that_cannot_be_encoded_is_refused(service, client):
    typed = {"content-type": "application/json"}
    path = "/v1/streams/door/questions"
    message = {"role": "user", "content": "SURROGATE"}
    chat = json.dumps({"model": service.model_name, "messages": [message]})
    for half in ('"\\ud800"', '"a\\u0000b"'):
        for _ in range(SLOTS + 1):
            response = client.post(path, content=f'{{"question": {half}}}', headers=typed)
            assert response.status_code == 422
            response = client.post("/v1/chat/completions", content=chat.replace('"SURROGATE"', half), headers=typed)
            assert 400 <= response.status_code < 500
        for body in (f'{{"name": "x", "source": {half}}}', f'{{"name": {half}, "source": "push"}}', f"{{{half}: 1}}"):
            assert client.post("/v1/streams", content=body, headers=typed).status_code == 422
    assert slots_are_free(service, client)


def test_questions_are_answered_on_a_full_disk(service, client):
    pages = service.store._db.execute("pragma page_count").fetchone()[0]
    service.store._db.execute(f"pragma max_page_count = {pages}")
    filler = service.store.ask("door", "x" * 100_000)  # fill the free pages
    service.store.answer(filler, "x", None, {})
    for _ in range(SLOTS + 1):
        assert ask(client).status_code == 200
    health = until(lambda: (body := client.get("/healthz").json())["status"] == "degraded" and body)
    assert "state folder cannot be written" in " ".join(health["problems"])
    service.store._db.execute(f"pragma max_page_count = {2**30}")
    until(lambda: service.saving_error is None)
    assert slots_are_free(service, client)


def test_an_answer_is_streamed_for_proxies_and_browsers(client):
    response = ask(client, stream=True, max_new_tokens=8)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.text.splitlines()[0] == "event: text"


def test_history_shows_the_pictures_that_the_memory_has(client):
    evidence = ask(client).json()["evidence"]
    pictured = {slot["exemplar"]: slot["thumbnail"] for slot in evidence if "thumbnail" in slot}
    kept = client.get("/v1/streams/door/history?limit=1").json()[0]["details"]["evidence"]
    assert 0 < len(kept) <= 8
    shown = {slot["exemplar"]: slot["thumbnail"] for slot in kept if "thumbnail" in slot}
    assert shown.keys() & pictured.keys()
    assert all(pictured[moment] == shown[moment] for moment in shown.keys() & pictured.keys())


def test_max_tokens_is_openais_word(client):
    assert ask(client, max_tokens=3).status_code == 422


# --- streams


def test_a_stream_is_edited_and_keeps_its_memory(service, client, video):
    client.post("/v1/streams", json={"name": "hall", "source": str(video), "fps": 5, "loop": True})
    before = until(lambda: (body := client.get("/v1/streams/hall").json())["kept"] >= 3 and body)
    client.post("/v1/streams/hall/questions", json={"question": "what?", "max_new_tokens": 1})
    response = client.patch("/v1/streams/hall", json={"name": "gate", "fps": 10})
    assert (response.status_code, response.json()["name"], response.json()["fps"]) == (200, "gate", 10)
    assert client.get("/v1/streams/hall").status_code == 404
    after = until(lambda: (body := client.get("/v1/streams/gate").json())["kept"] > before["kept"] + 2 and body)
    assert after["time"] > before["time"]
    memory = client.get("/v1/streams/gate/memory").json()
    assert min(slot["start"] for slot in memory["slots"]) == 0
    assert len(client.get("/v1/streams/gate/history").json()) == 1
    assert {"gate", "hall"} & {saved.name for saved in service.store.saved_streams()} == {"gate"}
    for body, status in (({"name": "door"}, 409), ({}, 422), ({"fps": 0}, 422), ({"name": "a/b"}, 422)):
        assert client.patch("/v1/streams/gate", json=body).status_code == status
    assert client.patch("/v1/streams/none", json={"fps": 2}).status_code == 404
    assert client.delete("/v1/streams/gate").status_code == 204
    assert not list(service.store.memory_path("gate").parent.glob("gate*"))


def test_nothing_is_half_done_on_a_disk_that_cannot_be_written(service, client, video):
    service.store._db.execute("pragma query_only = on")
    names = [stream["name"] for stream in client.get("/v1/streams").json()]
    for call in (
        lambda: client.post("/v1/streams", json={"name": "new", "source": str(video)}),
        lambda: client.delete("/v1/streams/door"),
        lambda: client.patch("/v1/streams/door", json={"name": "new"}),
    ):
        response = call()
        assert (response.status_code, "cannot be written" in response.json()["error"]["message"]) == (409, True)
    assert [stream["name"] for stream in client.get("/v1/streams").json()] == names
    assert not service.store.memory_path("new").exists()  # or a later stream of that name would begin with it
    service.store._db.execute("pragma query_only = off")
    assert ask(client).status_code == 200
    until(lambda: service.saving_error is None)


def test_a_database_that_cannot_be_read_is_told(service, client):
    store, transcript = service.watches.store, service.descriptions.transcript
    renamed = ((store, "alerts"), (transcript, "captions"))
    for own, table in renamed:
        with own._lock:
            own._db.execute(f"alter table {table} rename to lost")
    try:
        for path in (
            "/v1/streams/door/alerts",
            "/v1/streams/door/transcript",
            "/v1/alerts/none/picture",
            "/v1/alerts/none/clip",
        ):
            response = client.get(path)
            assert (response.status_code, "cannot be read" in response.json()["error"]["message"]) == (422, True)
        with pytest.raises(StoreError):
            transcript.remove_other_streams(())
    finally:
        for own, table in renamed:
            with own._lock:
                own._db.execute(f"alter table lost rename to {table}")
    assert client.get("/v1/streams/door/alerts").json() == client.get("/v1/streams/door/transcript").json() == []


def test_the_saver_outlives_what_safetensors_raises(service, client):
    memories = service.store.memory_path("door").parent
    memories.rename(memories.with_name("aside"))  # at once, since the saver goes on
    memories.write_text("")  # a file in the folder's place
    health = until(lambda: (body := client.get("/healthz").json())["status"] == "degraded" and body)
    until(lambda: "state folder cannot be written" in " ".join(client.get("/healthz").json()["problems"]))
    assert health["problems"]
    memories.unlink()
    memories.mkdir()
    until(lambda: service.store.memory_path("door").exists() and service.saving_error is None)


def test_a_saved_stream_that_cannot_be_watched_is_shown_and_tried_again(service, client, state, video):
    shown = {stream["name"]: stream for stream in client.get("/v1/streams").json()}
    for name in ("later", "damaged"):
        assert shown[name]["state"] == ("failed" if name == "damaged" else "reconnecting")
        assert shown[name]["error"]
        assert client.get(f"/v1/streams/{name}/memory").status_code == 409
        assert client.post(f"/v1/streams/{name}/questions", json={"question": "what?"}).status_code == 409
        assert client.post("/v1/streams", json={"name": name, "source": "push"}).status_code == 409
        assert client.patch(f"/v1/streams/{name}", json={"fps": 3}).status_code == 409
    assert "stream damaged failed" in " ".join(client.get("/healthz").json()["problems"])
    shutil.copyfile(video, state / "later.mp4")
    until(lambda: client.get("/v1/streams/later").json()["kept"] > 0)
    assert client.delete("/v1/streams/damaged").status_code == 204
    assert {saved.name for saved in service.store.saved_streams()} == {"door", "later"}


def test_the_command_line_wins_over_what_was_saved(tiny_folder, tmp_path, video):
    other = write_video(tmp_path / "other.mp4", frames=8)

    def watched(given: NamedSource) -> tuple[str, float]:
        running = Service(str(tiny_folder), AccessRules(), tmp_path / "state", streams={"door": given})
        try:
            until(lambda: running.status("door").time is not None)
            source = running.live.source("door")
            return source.name, source.fps
        finally:
            running.close()

    assert watched(NamedSource(str(video), 5.0)) == (str(video), 5.0)
    assert watched(NamedSource(str(video))) == (str(video), 5.0)
    assert watched(NamedSource(str(video), 2.0)) == (str(video), 2.0)
    assert not list((tmp_path / "state" / "memories").glob("*.set-aside"))
    assert watched(NamedSource(str(other))) == (str(other), 1.0)
    assert len(list((tmp_path / "state" / "memories").glob("*.set-aside"))) == 1  # the memory of the other source


def test_too_many_streams_on_the_command_line_are_a_users_mistake(tiny_folder, tmp_path):
    named = {"first": NamedSource("push"), "second": NamedSource("push")}
    with pytest.raises(UserError, match="--stream second: 1 streams"):
        Service(str(tiny_folder), AccessRules(), tmp_path, Limits(streams=1), named)


def test_a_second_service_on_the_folder_says_who_has_it(service, tiny_folder, state):
    with pytest.raises(UserError, match="used by another server"):
        Service(str(tiny_folder), AccessRules(), state)
