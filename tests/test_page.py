"""The web page in a real headless Chromium."""

import pytest
from playwright.sync_api import Page, expect

from helpers.server import serving
from helpers.videos import write_video


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    video = write_video(tmp_path_factory.mktemp("page") / "clip.mp4", frames=20)
    with serving(str(tiny_folder), "--stream", f"door={video}", "--fps", "5") as running:
        running.video = video
        running.wait_for("/v1/streams/door", lambda _, body: body["time"] is not None)
        yield running


@pytest.fixture
def page(browser, server):
    """The page, and afterwards the certainty that nothing on it broke."""
    opened = browser.new_page()
    broken: list[str] = []
    opened.on("pageerror", lambda error: broken.append(str(error)))
    opened.on("console", lambda said: broken.append(said.text) if "Content Security Policy" in said.text else None)
    opened.on("dialog", lambda dialog: dialog.accept())
    opened.goto(server.url)
    yield opened
    opened.close()
    assert not broken


def test_the_memory_is_shown_with_its_parts(page: Page):
    expect(page.locator("#stream-name")).to_have_text("door")
    page.wait_for_selector("#picture[src^='blob:']")
    expect(page.locator(".part h3")).to_have_text(["temporal", "retrieved", "spatial", "abstract"])
    page.wait_for_selector(".slot img")
    assert "frames in" in page.locator("#memory-note").inner_text()
    assert page.locator(".span i").count() >= 4


def test_a_question_is_answered_and_its_evidence_lights_up(page: Page, server):
    server.wait_for("/v1/streams/door", lambda _, body: body["state"] == "ended")
    page.fill("#question", "what is this?")
    page.press("#question", "Enter")
    turn = page.locator("#log li").last
    expect(turn.locator(".asked")).to_have_text("what is this?")
    expect(turn.locator(".meta")).to_contain_text("as of 0:0", timeout=30_000)
    turn.locator(".evidence button").first.click()
    page.wait_for_selector(".slot.lit")
    page.reload()
    expect(page.locator("#log .asked").last).to_have_text("what is this?")


def test_streams_are_added_and_removed_by_keyboard(page: Page, server):
    page.focus("#open-add")
    page.keyboard.press("Enter")
    page.keyboard.type("hall")
    page.keyboard.press("Tab")
    page.keyboard.type("/none/such.mp4")
    page.keyboard.press("Enter")
    expect(page.locator("#add-error")).to_contain_text("nothing to watch")
    page.fill("#add-form [name=source]", str(server.video))
    page.press("#add-form [name=source]", "Enter")
    expect(page.locator("#stream-name")).to_have_text("hall")
    page.locator("#delete").click()
    expect(page.locator("#stream-name")).to_have_text("door")


def test_the_browsers_own_camera_is_watched(page: Page, server):
    page.click("#open-add")
    page.click("#add [data-use-camera]")
    expect(page.locator("#stream-name")).to_have_text("camera-1")
    server.wait_for("/v1/streams/camera-1", lambda _, body: body["kept"] >= 3)
    expect(page.locator("#state")).to_have_text("live")
    page.click("#stop-camera")
    page.click("#delete")
    expect(page.locator("#stream-name")).to_have_text("door")


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark"), (1280, "dark")])
def test_it_fits_a_phone_and_a_desk_in_light_and_dark(browser, server, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(server.url)
    page.wait_for_selector(".slot")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in back[4:-1].split(",")) / 3
    assert (brightness < 64) == (scheme == "dark")
    page.close()


def test_a_token_is_asked_for_once(browser, tiny_folder):
    with serving(str(tiny_folder), "--host", "0.0.0.0", token="secret-token") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#token-form [name=token]", "secret-token")
        page.press("#token-form [name=token]", "Enter")
        expect(page.locator("#empty h2")).to_be_visible()
        page.reload()
        expect(page.locator("#empty h2")).to_be_visible()
        page.close()
