"""The web page with changing streams, the browser's camera, tokens and a restarted server."""

import socket

import pytest
from playwright.sync_api import Page, expect

from helpers.server import Server, serving
from helpers.web_page import opened

CAMERA_IS_KEPT = """
const devices = navigator.mediaDevices;
if (devices) {
  const original = devices.getUserMedia.bind(devices);
  devices.getUserMedia = async (wanted) => (window.cameraMedia = await original(wanted));
}
"""
"""Lets a test check whether the page released the camera."""
SOCKETS_ARE_KEPT = """
window.sockets = [];
window.WebSocket = class extends WebSocket {
  constructor(...rest) {
    super(...rest);
    window.sockets.push(this);
  }
};
"""
"""Lets a test drop the page's connection."""
CAMERA_IS_OFF = "window.cameraMedia.getTracks().every((track) => track.readyState === 'ended')"


expect.set_options(timeout=30_000)  # for busy machines


@pytest.fixture(scope="module")
def server(quick_folder):
    with serving(str(quick_folder)) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_streams_are_left(server):
    yield
    for stream in server.call("GET", "/v1/streams")[1]:
        server.call("DELETE", f"/v1/streams/{stream['name']}")


@pytest.fixture
def page(browser, server):
    yield from opened(browser, server.url, CAMERA_IS_KEPT, SOCKETS_ARE_KEPT)


def add_pushed(server: Server, *names: str) -> None:
    """Add push streams that have not received a frame yet."""
    for name in names:
        assert server.call("POST", "/v1/streams", {"name": name, "source": "push"})[0] == 201


def start_camera(page: Page) -> None:
    page.click("#open-add")
    page.click("#add [data-use-camera]")
    expect(page.locator("#stream-name")).to_have_text("camera-1")


def has_frames(status: int, body: dict) -> bool:
    return status == 200 and body["kept"] >= 2


def test_all_streams_are_seen_at_a_glance_and_each_is_a_click_away(page: Page, server):
    add_pushed(server, "door", "hall")
    expect(page.locator("#grid li")).to_have_count(2)
    expect(page.locator("#grid .state").first).to_have_text("starting")
    page.click("#grid a >> text=hall")
    expect(page.locator("#stream-name")).to_have_text("hall")
    page.go_back()
    expect(page.locator("#overview")).to_be_visible()
    page.click("[role=tab] >> text=door")
    expect(page.locator("#stream-name")).to_have_text("door")
    page.click("h1 a")
    expect(page.locator("#overview")).to_be_visible()


def test_the_question_is_a_few_tabs_away_with_sixteen_streams(page: Page, server):
    names = [f"stream-{number:02d}" for number in range(16)]
    add_pushed(server, *names)
    page.goto(f"{server.url}/#/stream-07")
    expect(page.locator("[role=tab]")).to_have_count(17)
    expect(page.locator("#stream-name")).to_have_text("stream-07")
    page.keyboard.press("Tab")
    expect(page.locator("#to-question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.focus("#to-question")
    presses = 0
    while page.evaluate("document.activeElement.id") != "question" and presses < 30:
        page.keyboard.press("Tab")
        presses += 1
    assert presses <= 10
    page.focus("[role=tab][aria-selected=true]")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[role=tab] >> text=stream-08")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#stream-name")).to_have_text("stream-08")


def test_a_stream_without_frames_shows_no_other_streams_memory(page: Page, server):
    start_camera(page)
    page.wait_for_selector(".slot img[src]")
    add_pushed(server, "dark")
    page.click("[role=tab] >> text=dark")
    expect(page.locator("#stream-name")).to_have_text("dark")
    expect(page.locator("#memory-lead")).to_contain_text("Nothing yet")
    expect(page.locator("#no-frame")).to_be_visible()
    expect(page.locator(".slot")).to_have_count(0)
    assert page.locator("#picture").get_attribute("src") is None


def test_a_stream_that_is_deleted_elsewhere_says_so_and_keeps_its_question_to_itself(page: Page, server):
    add_pushed(server, "door", "hall")
    page.click("#grid a >> text=door")
    page.fill("#question", "who left the")
    page.click("[role=tab] >> text=hall")
    expect(page.locator("#question")).to_have_value("")
    page.click("[role=tab] >> text=door")
    expect(page.locator("#question")).to_have_value("who left the")
    server.call("DELETE", "/v1/streams/door")
    expect(page.locator("#gone")).to_contain_text("door is no longer being watched")
    expect(page.locator("#gone-draft")).to_contain_text("who left the")
    page.click("[role=tab] >> text=hall")
    expect(page.locator("#stream-name")).to_have_text("hall")
    expect(page.locator("#question")).to_have_value("")


def test_the_browsers_own_camera_is_watched_live_and_stopped(page: Page, server):
    start_camera(page)
    server.wait_for("/v1/streams/camera-1", has_frames)
    expect(page.locator("#state")).to_have_text("live")
    page.wait_for_selector("#picture[src^='blob:']")
    first = page.locator("#picture").get_attribute("src")
    expect(page.locator("#picture")).not_to_have_attribute("src", first)
    page.click("#stop-camera")
    expect(page.locator("#camera")).to_be_hidden()
    assert page.evaluate(CAMERA_IS_OFF)


def test_a_stream_is_edited_while_its_camera_sends(page: Page, server):
    if "patch" not in server.call("GET", "/openapi.json")[1]["paths"]["/v1/streams/{name}"]:
        pytest.skip("this server cannot edit streams")
    start_camera(page)
    before = server.wait_for("/v1/streams/camera-1", has_frames)["kept"]
    page.fill("#question", "who is")
    page.fill("#event", "somebody sits")
    page.click("#edit-stream")
    page.fill("#edit [name=name]", "desk")
    page.fill("#edit [name=fps]", "5")
    page.press("#edit [name=fps]", "Enter")
    expect(page.locator("#stream-name")).to_have_text("desk")
    expect(page.locator("#question")).to_have_value("who is")
    expect(page.locator("#event")).to_have_value("somebody sits")
    expect(page.locator("#summary")).to_contain_text("5 frames per second")
    server.wait_for("/v1/streams/desk", lambda _, body: body["kept"] > before + 1)
    expect(page.locator("#camera-name")).to_have_text("desk")
    page.click("#stop-camera")


@pytest.mark.parametrize("by", ["page", "somebody else"])
def test_the_camera_goes_off_with_its_stream(page: Page, server, by):
    start_camera(page)
    server.wait_for("/v1/streams/camera-1", has_frames)
    if by == "page":
        page.click("#remove-stream")
        page.click("#remove [type=submit]")
        expect(page.locator("#empty")).to_be_visible()
    else:
        server.call("DELETE", "/v1/streams/camera-1")
        expect(page.locator("#notice")).to_contain_text(
            "camera is off: its stream camera-1 was removed", timeout=30_000
        )
    expect(page.locator("#camera")).to_be_hidden()
    assert page.evaluate(CAMERA_IS_OFF)


def test_the_camera_is_sent_on_after_its_connection_broke(page: Page, server):
    start_camera(page)
    before = server.wait_for("/v1/streams/camera-1", has_frames)["kept"]
    page.evaluate("window.sockets.at(-1).close()")
    server.wait_for("/v1/streams/camera-1", lambda _, body: body["kept"] > before + 1)
    assert page.evaluate("window.sockets.length") == 2
    page.click("#stop-camera")


@pytest.fixture
def port() -> str:
    """A port at which a server can be started twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_the_camera_goes_off_with_a_stream_that_outlived_a_restart(browser, quick_folder, port, tmp_path):
    page = browser.new_page()
    options = ("--port", port, "--state", str(tmp_path / "state"))
    with serving(str(quick_folder), *options) as first:
        page.goto(first.url)
        start_camera(page)
        first.wait_for("/v1/streams/camera-1", has_frames)
    with serving(str(quick_folder), *options) as second:  # it still has the stream
        second.wait_for("/v1/streams/camera-1", lambda _, body: body["came"] > 0 and body["state"] == "live", 60)
        second.call("DELETE", "/v1/streams/camera-1")
        expect(page.locator("#notice")).to_contain_text("its stream camera-1 was removed")
        expect(page.locator("#camera")).to_be_hidden()
        assert second.call("GET", "/v1/streams")[1] == []
        page.close()


def test_the_camera_is_sent_on_after_the_server_was_started_again(browser, quick_folder, port):
    page = browser.new_page()
    with serving(str(quick_folder), "--port", port) as first:
        page.goto(first.url)
        start_camera(page)
        first.wait_for("/v1/streams/camera-1", has_frames)
    expect(page.locator("#connection")).to_be_visible()
    with serving(str(quick_folder), "--port", port) as second:  # it does not know the stream
        second.wait_for("/v1/streams/camera-1", has_frames, 60)
        expect(page.locator("#state")).to_have_text("live", timeout=30_000)
        expect(page.locator("#camera")).to_be_visible()
        page.close()


@pytest.fixture(scope="module")
def guarded(quick_folder):
    with serving(str(quick_folder), "--host", "0.0.0.0", token="secret-token") as running:
        yield running


def test_a_token_is_asked_for_once(browser, guarded):
    for page in opened(browser, guarded.url):
        page.fill("#token-form [name=token]", "secret-token")
        page.press("#token-form [name=token]", "Enter")
        expect(page.locator("#empty h2")).to_be_visible()
        page.reload()
        expect(page.locator("#empty h2")).to_be_visible()
        expect(page.locator("#token-dialog")).to_be_hidden()


def test_a_page_that_loses_its_token_no_longer_says_that_the_server_is_away(browser, guarded):
    for page in opened(browser, guarded.url):
        page.fill("#token-form [name=token]", "secret-token")
        page.press("#token-form [name=token]", "Enter")
        expect(page.locator("#empty h2")).to_be_visible()
        page.route("**/v1/streams", lambda route: route.abort())
        expect(page.locator("#connection")).to_be_visible()
        page.evaluate("sessionStorage.setItem('token', 'old')")
        page.unroute("**/v1/streams")
        expect(page.locator("#token-form .error")).to_have_text("The server no longer accepts this token.")
        expect(page.locator("#connection")).to_be_hidden()


def test_a_token_that_is_wrong_or_odd_says_so_and_the_page_is_never_blank(browser, guarded):
    for page in opened(browser, guarded.url):
        page.fill("#token-form [name=token]", "wrong")
        page.press("#token-form [name=token]", "Enter")
        expect(page.locator("#token-form .error")).to_have_text("This is not the server's token.")
        page.fill("#token-form [name=token]", "☃")
        page.press("#token-form [name=token]", "Enter")
        expect(page.locator("#token-form .error")).to_contain_text("cannot be sent")
        page.keyboard.press("Escape")
        expect(page.locator("#token-dialog")).to_be_hidden()
        expect(page.locator("#locked h2")).to_be_visible()
        page.click("#enter-token")
        page.fill("#token-form [name=token]", "secret-token")
        page.press("#token-form [name=token]", "Enter")
        expect(page.locator("#empty h2")).to_be_visible()


def test_a_stored_token_that_no_header_can_carry_is_asked_for_again(browser, guarded):
    for page in opened(browser, guarded.url):
        page.evaluate("sessionStorage.setItem('token', '☃')")
        page.reload()
        expect(page.locator("#token-dialog")).to_be_visible()


def test_pictures_are_pushed_behind_a_token_too(browser, guarded):
    for page in opened(browser, guarded.url):
        page.fill("#token-form [name=token]", "secret-token")
        page.press("#token-form [name=token]", "Enter")
        start_camera(page)
        page.wait_for_selector("#picture[src^='blob:']")
        page.click("#stop-camera")
    guarded.call("DELETE", "/v1/streams/camera-1")


def test_plain_http_says_why_the_camera_cannot_work(browser, guarded):
    for page in opened(browser, guarded.url.replace("127.0.0.1", "cameras.test")):
        page.fill("#token-form [name=token]", "secret-token")
        page.press("#token-form [name=token]", "Enter")
        expect(page.locator("#empty .obstacle")).to_contain_text("only over HTTPS or on localhost")
        page.click("#empty [data-use-camera]")
        expect(page.locator("#add .error")).to_contain_text("came over plain HTTP from cameras.test")
