"""The web page in a real headless Chromium, with a stream that has frames."""

import re
from collections import Counter

import pytest
from playwright.sync_api import Page, expect

from helpers.server import serving
from helpers.videos import write_video
from helpers.web_page import opened

expect.set_options(timeout=30_000)  # for busy machines


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    video = write_video(tmp_path_factory.mktemp("page") / "clip.mp4", frames=20)
    with serving(str(tiny_folder), "--stream", f"door={video}", "--fps", "5") as running:
        running.video = video
        running.wait_for("/v1/streams/door", lambda _, body: body["state"] == "ended")
        yield running


@pytest.fixture
def page(browser, server):
    yield from opened(browser, server.url)


def remove_current_stream(page: Page) -> None:
    page.click("#remove-stream")
    page.click("#remove [type=submit]")


def test_the_memory_is_shown_with_its_parts(page: Page, server):
    expect(page.locator("#stream-name")).to_have_text("door")
    page.wait_for_selector("#picture[src^='blob:']")
    page.wait_for_selector(".slot img[src]")
    names = page.locator(".part").evaluate_all("parts => parts.map((part) => part.dataset.part)")
    assert names == ["spatial", "retrieved", "temporal", "abstract"]
    assert page.locator(".lane i").count() >= 4
    capacity = server.call("GET", "/v1/streams/door/memory")[1]["capacity"]
    expect(page.locator("#memory-lead")).to_contain_text("10 frames")
    expect(page.locator("#memory-lead")).to_contain_text(f"{capacity['bytes'] / 1e3:.0f} kB")
    temporal = page.locator(".part[data-part=temporal] .numbers").inner_text()
    side = round(capacity["parts"]["temporal"]["tokens"] ** 0.5)
    fine = "1 token each" if side == 1 else f"{side} \N{MULTIPLICATION SIGN} {side} tokens each"
    assert f"of {capacity['parts']['temporal']['slots']} · {fine}" in temporal
    shares = re.findall(r"(\d+)%", page.locator("#budget").get_attribute("aria-label"))
    assert 98 <= sum(map(int, shares)) <= 102
    shot = page.locator(".slot .shot").first.bounding_box()
    assert shot["width"] == pytest.approx(shot["height"])  # the square that the model sees, in square cells
    expect(page.locator(".part[data-part=temporal] .age").first).to_contain_text("earlier")


def test_the_picture_says_what_it_is(page: Page):
    expect(page.locator(".caption").first).to_contain_text("The model sees the centre square")
    expect(page.locator("#state")).to_have_text("ended")


def test_a_question_is_answered_and_its_evidence_leads_to_the_moment(page: Page):
    page.fill("#question", "what is this?")
    page.press("#question", "Enter")
    turn = page.locator("#log li").last
    expect(turn.locator(".asked")).to_have_text("what is this?")
    expect(turn.locator(".meta")).to_contain_text("as of 0:0", timeout=120_000)
    expect(page.locator("#announcement")).to_have_text(turn.locator(".answered").inner_text())
    turn.locator(".evidence button").first.click()
    page.wait_for_selector(".slot.lit")
    expect(page.locator("#moment-picture")).to_be_visible()
    shown = page.locator("#moment-picture").get_attribute("src")
    assert shown == turn.locator(".evidence img").first.get_attribute("src")
    page.click("#show-in-memory")
    expect(page.locator(".slot.lit").first).to_be_focused()
    page.click("#back-to-live")
    expect(page.locator("#moment")).to_be_hidden()
    page.locator(".part[data-part=temporal] .slot").first.click()
    expect(page.locator("#moment-about")).to_contain_text("Scene 0:00")
    page.reload()
    expect(page.locator("#log .asked").last).to_have_text("what is this?")


def test_the_chat_opens_on_its_newest_turn_and_goes_back_to_the_oldest(page: Page, server):
    questions = [f"question {number}" for number in range(1, 26)]
    for question in questions:
        status, _ = server.call("POST", "/v1/streams/door/questions", {"question": question})
        assert status == 200
    page.reload()
    turns = page.locator("#log .asked")
    expect(turns).to_have_count(20)
    expect(turns.last).to_have_text("question 25")
    expect(turns.last).to_be_in_viewport()
    expect(turns.first).not_to_be_in_viewport()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "before=" in request.url else None)
    for _ in range(2):  # there may be earlier turns from other tests
        if page.locator("#older").is_visible():
            page.locator("#older").evaluate("button => { button.click(); button.click(); }")
            expect(turns.filter(has_text=re.compile("^question 1$"))).to_have_count(1)
    assert turns.all_inner_texts()[-25:] == questions
    assert len(asked) == len(set(asked)), "a double click asked twice"
    expect(page.locator("#older")).to_be_hidden()


def test_the_evidence_of_an_answer_that_came_after_the_page_can_be_reached(page: Page):
    slot = {"part": "temporal", "start": 0, "end": 1, "mean": 0.5, "exemplar": 0.5, "weight": 2, "share": 0.5}
    turn = {"id": 1, "question": "what was that?", "answer": None, "error": None, "details": {}}
    page.route("**/history?limit=20", lambda route: route.fulfill(json=[turn]))
    later = {**turn, "answer": "A dog.", "details": {"stream_time": 2.0, "evidence": [slot]}}
    page.route("**/history?limit=1&before=2", lambda route: route.fulfill(json=[later]))
    page.reload()
    expect(page.locator("#log .answered")).to_have_text("A dog.")
    expect(page.locator("#log .evidence button")).to_have_attribute("tabindex", "0")


def test_arrow_keys_with_a_modifier_are_left_to_the_browser(page: Page):
    page.wait_for_selector("#picture[src^='blob:']")  # the stream is open, and its hints stay
    hints = page.locator("#hints button")
    hints.first.focus()
    expect(hints.first).to_be_focused()
    page.keyboard.press("Control+ArrowRight")  # with Alt, it might leave the page
    expect(hints.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(hints.nth(1)).to_be_focused()


def test_an_open_page_asks_for_nothing_but_the_streams_while_nothing_changes(page: Page, server):
    page.goto("about:blank")
    looked: Counter[str] = Counter()
    page.on("request", lambda request: looked.update(re.findall("/v1(.*)", request.url)))
    page.goto(server.url)
    page.wait_for_selector(".slot img[src]")
    for _ in range(4):
        with page.expect_response("**/v1/streams"):
            pass
    assert looked.pop("/streams") >= 4
    assert looked["/streams/door/watches"] == 1
    assert not looked - Counter(set(looked)), "asked for again, though nothing changed"


def test_pictures_of_the_memory_are_fetched_once(page: Page, server):
    looked: list[str] = []
    page.on("request", lambda request: looked.append(request.url) if "/memory" in request.url else None)
    server.watch("again", server.video, loop=True, fps=5)
    page.goto(f"{server.url}/#/again")
    page.wait_for_selector(".slot img[src]")
    for _ in range(3):
        with page.expect_response("**/again/memory**") as answer:
            pass
    after = [float(url.partition("thumbnails_after=")[2]) for url in looked if "/again/" in url]
    assert after[0] == -1
    assert after == sorted(after)
    assert after[-1] > 0
    assert all(slot["thumbnail"] is None or slot["exemplar"] > after[-1] for slot in answer.value.json()["slots"])
    remove_current_stream(page)


def test_streams_are_added_and_removed_by_keyboard(page: Page, server):
    page.focus("#open-add")
    page.keyboard.press("Enter")
    page.keyboard.type("hall")
    page.keyboard.press("Tab")
    page.keyboard.type("/none/such.mp4")
    page.keyboard.press("Enter")
    expect(page.locator("#add .error")).to_contain_text("nothing to watch")
    page.fill("#add [name=source]", str(server.video))
    page.press("#add [name=source]", "Enter")
    expect(page.locator("#stream-name")).to_have_text("hall")
    page.focus("#remove-stream")
    page.keyboard.press("Enter")
    expect(page.locator("#remove-name")).to_have_text("hall")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#stream-name")).to_have_text("door")


def test_the_form_for_editing_knows_the_stream(page: Page):
    page.click("#edit-stream")
    expect(page.locator("#edit [name=name]")).to_have_value("door")
    expect(page.locator("#edit [name=fps]")).to_have_value("5")
    page.click("#edit [type=submit]")  # nothing changed, so nothing is sent
    expect(page.locator("#edit")).to_be_hidden()


def test_a_server_that_is_away_turns_the_dot_and_comes_back(page: Page):
    expect(page.locator("#state")).to_have_text("ended")
    page.route("**/v1/streams", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("offline")
    expect(page.locator("#connection")).to_contain_text("not responding")
    red = page.evaluate("getComputedStyle(document.getElementById('state'), '::before').backgroundColor")
    assert red == "rgb(255, 107, 107)"
    page.unroute("**/v1/streams")
    expect(page.locator("#state")).to_have_text("ended")
    expect(page.locator("#connection")).to_be_hidden()


@pytest.mark.parametrize(
    ("width", "scheme"), [(240, "light"), (240, "dark"), (390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]
)
def test_it_fits_a_watch_a_phone_and_a_desk_in_light_and_dark(browser, server, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(server.url)
    page.wait_for_selector(".slot")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in back[4:-1].split(",")) / 3
    assert (brightness < 64) == (scheme == "dark")
    page.close()


EVENTS = """async (chunks) => {
  const { parseEvents } = await import("/page/sse.js");
  async function* text() { yield* chunks; }
  const found = [];
  for await (const event of parseEvents(text())) found.push([event.event, event.data]);
  return found;
}"""


@pytest.mark.parametrize(
    "chunks",
    [
        ["event: text\ndata: 1\n\nevent: done\ndata: 2\n\n"],
        [": a comment\n\n", "event: text\ndata: 1\n\n: ping\n\n", "retry: 5\n\nevent: done\nid: 7\ndata: 2\n\n"],
        ["event: text\r", "\ndata: 1\r\n\r", "\nevent:done\r\ndata:2\r\n\r\n: ping\r\n\r\n"],
        list("event: text\ndata: 1\n\n:\n\nevent: done\ndata: 2\n\nevent: cut off"),
    ],
)
def test_events_survive_comments_line_endings_and_cuts(page: Page, chunks):
    assert page.evaluate(EVENTS, chunks) == [["text", "1"], ["done", "2"]]


def test_an_event_has_many_lines_or_no_name(page: Page):
    assert page.evaluate(EVENTS, ["data: a\ndata:  b\ndata\n\n"]) == [["message", "a\n b\n"]]
