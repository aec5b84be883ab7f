"""Watches and alerts on the web page, in a real headless Chromium."""

import re

import pytest
from playwright.sync_api import Page, expect

from helpers.server import serving
from helpers.videos import write_video
from helpers.waiting import until
from helpers.web_page import opened

expect.set_options(timeout=30_000)  # for busy machines
ANYTHING = 1e-9


@pytest.fixture(scope="module")
def server(quick_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    video = write_video(folder / "clip.mp4", frames=20)
    with serving(str(quick_folder), "--state", str(folder / "state"), "--record", "64MB") as running:
        running.watch("door", video, fps=5, loop=True)
        yield running


@pytest.fixture
def page(browser, server):
    for watch in server.call("GET", "/v1/streams/door/watches")[1]:
        server.call("DELETE", f"/v1/streams/door/watches/{watch['id']}")
    yield from opened(browser, server.url)


def watches(server):
    return server.call("GET", "/v1/streams/door/watches")[1]


def test_a_watch_is_added_paused_and_deleted_by_keyboard(page: Page, server):
    page.focus("#event")
    page.keyboard.type("somebody is at the door")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    item = page.locator("#watches li")
    expect(item).to_contain_text("somebody is at the door")
    expect(item).to_contain_text("when it ends")
    expect(page.locator("#event")).to_have_value("")
    (watch,) = watches(server)
    assert (watch["event"], watch["when"], watch["min_seconds"]) == ("somebody is at the door", "ends", 2)
    page.focus("#watches button >> text=Pause")
    page.keyboard.press("Enter")
    expect(item.locator(".phase")).to_have_text("paused")
    expect(page.get_by_role("button", name="Resume: somebody is at the door")).to_be_focused()
    assert watches(server)[0]["paused"]
    page.keyboard.press("Enter")
    expect(item.locator(".phase")).not_to_have_text("paused")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#delete-event")).to_have_text("somebody is at the door")
    page.click("#delete-watch [data-cancel]")
    assert len(watches(server)) == 1
    page.get_by_role("button", name="Delete: somebody").click()
    page.click("#delete-watch [type=submit]")
    expect(item).to_have_count(0)
    expect(page.locator("#event")).to_be_focused()
    assert watches(server) == []


def test_a_watch_that_is_added_elsewhere_appears_on_a_page_without_one(page: Page, server):
    expect(page.locator("#memory-body")).to_be_visible()
    assert server.call("POST", "/v1/streams/door/watches", {"event": "a dog"})[0] == 201
    expect(page.locator("#watches li")).to_contain_text("a dog")


def test_where_and_how_long_can_be_said_and_mistakes_are_named(page: Page, server):
    page.fill("#event", "a dog")
    page.click("#tell summary")
    page.fill("#tell [name=least]", "0")
    page.fill("#tell [name=quiet]", "300")
    page.fill("#tell [name=url]", "ftp://hooks.test/")
    page.click("#tell [type=submit]")
    expect(page.locator("#alerts-error")).to_contain_text("must begin with http")
    expect(page.locator("#event")).to_have_value("a dog")
    page.fill("#tell [name=url]", "http://127.0.0.1:1/hook")
    page.fill("#tell [name=secret]", "hush")
    page.click("#tell [type=submit]")
    expect(page.locator("#watches li")).to_contain_text("forwarded")
    expect(page.locator("#alerts-error")).to_be_hidden()
    (watch,) = watches(server)
    assert (watch["min_seconds"], watch["cooldown_seconds"]) == (0, 300)
    assert watch["targets"] == [{"url": "http://127.0.0.1:1/hook", "signed": True, "error": None}]


def test_alerts_appear_with_their_picture_and_older_ones_on_demand(page: Page, server):
    expect(page.locator(".told .invitation")).to_be_visible()
    new = {
        "event": "anything at all",
        "threshold": ANYTHING,
        "min_seconds": 0,
        "cooldown_seconds": 0.2,
        "when": "lasts",
    }
    assert server.call("POST", "/v1/streams/door/watches", new)[0] == 201
    page.reload()
    alert = page.locator("#alerts-list li").first
    expect(alert).to_contain_text("anything at all")
    server.wait_for("/v1/streams/door/alerts?limit=50", lambda _, alerts: len(alerts) > 21, 120)
    expect(page.locator("#alert-announcement")).to_contain_text("anything at all: still there")
    expect(page.locator("#watches .phase")).to_have_text("there now")
    page.get_by_role("button", name="Pause: anything at all").click()
    expect(page.locator("#watches .phase")).to_have_text("paused")
    page.reload()
    expect(page.locator("#alerts-list li")).to_have_count(20)
    newest = server.call("GET", "/v1/streams/door/alerts?limit=50")[1]
    expect(page.locator("#alerts-list li").first).to_have_attribute("data-key", newest[-1]["id"])
    page.click("#older-alerts")
    expect(page.locator("#alerts-list li")).to_have_count(min(40, len(newest)))
    page.wait_for_selector("#alerts-list li:first-child img[src^='blob:']")
    shot = page.locator("#alerts-list .shot").first
    assert shot.evaluate("shot => getComputedStyle(shot, '::after').content") == "none"  # no grid of tokens on it
    shot.click()
    expect(page.locator("#moment-picture")).to_be_visible()
    expect(page.locator(".caption.only-past")).to_contain_text("Alert: anything at all, still there at")
    expect(page.locator("#show-in-memory")).to_be_hidden()
    page.click("#back-to-live")
    expect(page.locator("#alerts-list .shot").first).to_be_focused()


def test_an_alert_s_clip_is_played(page: Page, server):
    new = {"event": "something to play", "threshold": ANYTHING, "min_seconds": 0, "cooldown_seconds": 3600}
    assert server.call("POST", "/v1/streams/door/watches", new)[0] == 201
    expect(page.locator("#summary")).to_contain_text("recorded")
    play = page.get_by_role("button", name="Play something to play, started at")
    play.click()
    clip = page.locator("#moment-clip")
    expect(clip).to_be_visible()
    until(lambda: clip.evaluate("clip => clip.currentTime > 0.2"))
    assert clip.evaluate("clip => clip.error") is None
    assert clip.evaluate("clip => clip.videoWidth / clip.videoHeight") == pytest.approx(64 / 48, rel=0.02)
    assert clip.evaluate("clip => clip.duration") > 4
    expect(page.locator(".caption.only-past")).to_contain_text("Alert: something to play, started at")
    expect(page.locator("#moment-none")).to_be_hidden()
    over, shown = page.locator("#moment .over").bounding_box(), clip.bounding_box()
    assert over["y"] + over["height"] < shown["y"] + shown["height"] / 2  # its controls can be reached
    page.locator("#alerts-list .shot").first.click()
    expect(clip).to_be_hidden()
    expect(page.locator("#moment-picture")).to_be_visible()
    play.click()
    expect(clip).to_be_visible()
    page.click("#back-to-live")
    expect(clip).to_be_hidden()
    assert clip.get_attribute("src") is None
    expect(play).to_be_focused()


def test_why_a_clip_cannot_be_played_is_said(page: Page, server):
    new = {"event": "something gone", "threshold": ANYTHING, "min_seconds": 0, "cooldown_seconds": 3600}
    assert server.call("POST", "/v1/streams/door/watches", new)[0] == 201
    refused = {"error": {"message": "the frames are not kept any more", "type": "not_found", "code": 404}}
    page.route("**/clip", lambda route: route.fulfill(status=404, json=refused))
    play = page.get_by_role("button", name="Play something gone, started at")
    play.click()
    expect(page.locator("#alerts-error")).to_have_text("the frames are not kept any more")
    expect(play).to_have_text("Play")


def test_a_picture_that_is_gone_leaves_no_button_and_one_that_failed_is_fetched_again(page: Page, server):
    new = {"event": "something seen", "threshold": ANYTHING, "min_seconds": 0, "cooldown_seconds": 3600}
    page.route("**/picture", lambda route: route.fulfill(status=404, json={"error": {"message": "gone"}}))
    assert server.call("POST", "/v1/streams/door/watches", new)[0] == 201
    seen = page.locator("#alerts-list li").filter(has_text="something seen")
    expect(seen.locator(".shot")).to_have_text("No picture")
    expect(seen.locator("button.shot")).to_have_count(0)
    page.unroute("**/picture")
    page.route("**/picture", lambda route: route.abort())
    page.reload()
    shot = seen.locator("button.shot:not([aria-busy])")
    shot.click()
    expect(page.locator("#alerts-error")).to_have_text("The server is not responding.")
    page.unroute("**/picture")
    shot.click()
    expect(page.locator("#moment-picture")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [240, 390, 1280])
def test_it_fits_every_width_with_watches_and_alerts(browser, server, page, width, scheme):
    long = "somebody with a very long coat and " + "an unbreakable" * 12
    assert (
        server.call("POST", "/v1/streams/door/watches", {"event": long, "threshold": ANYTHING, "min_seconds": 0})[0]
        == 201
    )
    narrow = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    narrow.goto(server.url)
    narrow.wait_for_selector("#watches li")
    expect(narrow.locator("#alerts-list b", has_text=re.compile("very long coat")).first).to_be_visible()
    narrow.click("#tell summary")
    assert narrow.evaluate("document.documentElement.scrollWidth") <= width
    for outer, inner in ((".watch-for", "#watches li"), (".told", "#alerts-list li")):
        box, held = narrow.locator(outer).bounding_box(), narrow.locator(inner).first.bounding_box()
        assert held["x"] + held["width"] <= box["x"] + box["width"] + 1
    narrow.close()


def test_nothing_of_one_stream_is_shown_at_another(page: Page, server, tmp_path):
    assert server.call("POST", "/v1/streams/door/watches", {"event": "a dog"})[0] == 201
    assert server.call("POST", "/v1/streams", {"name": "hall", "source": "push"})[0] == 201
    page.goto(f"{server.url}/#/door")
    expect(page.locator("#watches li")).to_have_count(1)
    page.fill("#event", "a cat")
    page.click("#tell summary")
    page.fill("#tell [name=url]", "https://hooks.test/door")
    page.fill("#tell [name=secret]", "hush")
    page.click("[role=tab] >> text=hall")
    expect(page.locator("#stream-name")).to_have_text("hall")
    expect(page.locator("#watches li")).to_have_count(0)
    expect(page.locator("#alerts-list li")).to_have_count(0)
    for name in ("event", "url", "secret"):
        expect(page.locator(f"#tell [name={name}]")).to_have_value("")
    server.call("DELETE", "/v1/streams/hall")
