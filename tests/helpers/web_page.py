"""Opening the web page in a browser."""

from collections.abc import Iterator

from playwright.sync_api import Browser, Page


def opened(browser: Browser, url: str, *scripts: str) -> Iterator[Page]:
    """The page, with ``scripts`` run before its own; afterwards, check that it raised no errors."""
    page = browser.new_page()
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("console", lambda said: broken.append(said.text) if "Content Security Policy" in said.text else None)
    for script in scripts:
        page.add_init_script(script)
    page.goto(url)
    yield page
    page.close()
    assert not broken
