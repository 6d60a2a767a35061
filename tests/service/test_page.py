"""The page in a real browser: every way to search, what goes wrong, and a narrow screen."""

from __future__ import annotations

import base64
import re
import shutil

import pytest

from puma_jax.search.open import open_index
from tests.service.serving import picture, serving

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome")
     if (path := shutil.which(name))),
    None,
)  # fmt: skip
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A page of the browser, and all that it complained of."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(base_url=url, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self.requested.append(request.url))

    def _note(self, message):
        # Browsers report refused requests by themselves.
        if message.type in ("error", "warning") and "Failed to load" not in message.text:
            self.complaints.append(message.text)

    def search(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def found(self, count: int | None = None) -> list[str]:
        """Names of the results, once there are as many."""
        if count is not None:
            playwright.expect(self.page.locator(".card")).to_have_count(count)
        cards = self.page.locator(".card .open")
        return [cards.nth(number).get_attribute("title") for number in range(cards.count())]

    def status(self, pattern: str) -> None:
        playwright.expect(self.page.locator("#status")).to_have_text(re.compile(pattern))


@pytest.fixture
def page(browser, live):
    opened = Page(browser, live.url)
    opened.page.goto("/")
    playwright.expect(opened.page.locator("#about")).to_have_text("12 documents · tiny")
    yield opened
    opened.context.close()
    assert not opened.complaints
    assert all(url.startswith((live.url, "blob:", "data:")) for url in opened.requested)


def expected(live, **query) -> list[str]:
    hits = live.post("/search", query).json()["hits"]
    return [hit["text"] or hit["id"] for hit in hits]


def upload(color: str) -> dict:
    return {"name": f"{color}.png", "mimeType": "image/png", "buffer": picture(color)}


def test_a_text_finds_what_the_service_finds(page, live):
    page.search("a red thing")
    assert page.found(12) == expected(live, text="a red thing")
    page.status(r"^12 results in \d+ ms · model \d+ ms · search \d+ ms$")
    assert page.page.url == f"{live.url}/?q=a+red+thing"
    pictures = page.page.locator(".card .picture img.there")
    playwright.expect(pictures).to_have_count(8)
    assert page.page.title() == "a red thing · puma_jax"


def test_a_picture_alone_and_with_words(page, live):
    page.page.set_input_files("#file", upload("green"))
    page.status("^12 results")
    alone = page.found(12)
    assert live.url + "/?picture=green.png" == page.page.url
    with_words = page.page.expect_response("**/search")
    with with_words as answer:
        page.search("in blue")
    assert answer.value.ok
    hits = answer.value.json()["hits"]
    playwright.expect(page.page).to_have_url(f"{live.url}/?q=in+blue&picture=green.png")
    page.page.wait_for_function(
        "title => document.querySelector('.card .open').title === title",
        arg=hits[0]["text"] or hits[0]["id"],
    )
    assert page.found(12) == [hit["text"] or hit["id"] for hit in hits]
    # The way back finds the picture again.
    page.page.go_back()
    playwright.expect(page.page.locator("#text")).to_have_value("")
    playwright.expect(page.page.locator("#query-picture img")).to_be_visible()
    page.page.wait_for_function(
        "title => document.querySelector('.card .open').title === title", arg=alone[0]
    )
    assert page.found(12) == alone


def test_a_picture_that_is_dropped_or_pasted(page, live):
    drop = """(kind) => {
      const data = new DataTransfer();
      const bytes = Uint8Array.from(atob(window.file), (one) => one.charCodeAt(0));
      data.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true };
      document.body.dispatchEvent(kind === "paste"
        ? new ClipboardEvent("paste", { ...options, clipboardData: data })
        : new DragEvent(kind, { ...options, dataTransfer: data }));
    }"""
    data = base64.b64encode(picture("red")).decode()
    page.page.evaluate("data => { window.file = data; }", data)
    page.page.evaluate(drop, "dragenter")
    playwright.expect(page.page.locator("#drop")).to_be_visible()
    page.page.evaluate(drop, "drop")
    playwright.expect(page.page.locator("#drop")).to_be_hidden()
    page.status("^12 results")
    page.page.click(".remove")
    playwright.expect(page.page.locator(".card")).to_have_count(0)
    assert page.page.url == f"{live.url}/"
    page.page.evaluate(drop, "paste")
    page.status("^12 results")


def test_modality_filter_and_number_are_kept_in_the_address(page, live, browser):
    page.search("a thing")
    page.page.click("text=Pictures")
    assert page.found(4) == expected(live, text="a thing", modality="image")
    page.page.click("#more")
    page.page.fill("#filter", "price < 3")
    page.page.fill("#instruction", "Find it.")
    page.page.fill("#k", "2")
    page.page.press("#k", "Enter")
    wanted = expected(
        live, text="a thing", modality="image", filter="price < 3", instruction="Find it.", k=2
    )
    assert page.found(2) == wanted
    playwright.expect(page.page.locator("#more b")).to_have_text("3")
    again = Page(browser, live.url)
    again.page.goto(page.page.url)
    assert again.found(2) == wanted
    again.context.close()


def test_more_like_this_and_the_document_itself(page, live):
    page.search("a red thing")
    page.found(12)
    first = live.post("/search", {"text": "a red thing"}).json()["hits"][0]
    page.page.click(".card:first-child .like")
    assert page.found(11) == expected(live, id=first["id"])
    page.page.click(".card:first-child .open")
    detail = page.page.locator("#detail")
    playwright.expect(detail).to_be_visible()
    playwright.expect(detail.locator("dl")).to_contain_text("price")
    page.page.keyboard.press("Escape")
    playwright.expect(detail).to_be_hidden()
    page.page.go_back()
    assert page.found(12) == expected(live, text="a red thing")


def test_what_goes_wrong_is_said(page):
    page.search("a thing")
    page.found(12)
    page.page.click("#more")
    page.page.fill("#filter", "price <")
    page.page.press("#filter", "Enter")
    notice = page.page.locator("#notice")
    playwright.expect(notice).to_contain_text('filter "price <"')
    page.found(0)
    page.page.fill("#filter", "price > 50")
    page.page.press("#filter", "Enter")
    page.status("Nothing found.*No document passes the filter")
    playwright.expect(notice).to_be_hidden()
    text = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"}
    page.page.set_input_files("#file", text)
    playwright.expect(notice).to_have_text(re.compile("“a.txt” is not a picture"))
    page.page.set_input_files("#file", {**text, "name": "a.png", "mimeType": "image/png"})
    playwright.expect(notice).to_contain_text("image cannot be decoded")
    page.page.goto("/?picture=lost.png")
    playwright.expect(notice).to_contain_text("“lost.png”, which a link cannot carry")


def test_a_service_that_is_gone_is_said(page):
    page.page.route("**/search", lambda route: route.abort())
    page.search("a")
    playwright.expect(page.page.locator("#notice")).to_contain_text("does not answer")


def test_the_keyboard_is_enough(page):
    keyboard = page.page.keyboard
    page.page.locator("body").click(position={"x": 5, "y": 500})
    keyboard.press("/")
    keyboard.type("a blue thing")
    keyboard.press("Enter")
    names = page.found(12)
    page.page.locator(".card .open").first.focus()
    keyboard.press("ArrowRight")
    focused = "document.activeElement.title"
    assert page.page.evaluate(focused) == names[1]
    columns = page.page.evaluate(
        "getComputedStyle(document.querySelector('#results')).gridTemplateColumns.split(' ').length"
    )
    keyboard.press("ArrowDown")
    assert page.page.evaluate(focused) == names[1 + columns]
    keyboard.press("Enter")
    playwright.expect(page.page.locator("#detail")).to_be_visible()
    keyboard.press("Escape")
    assert page.page.evaluate(focused) == names[1 + columns]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_all_without_sideways_scrolling(browser, live, scheme):
    phone = Page(browser, live.url, viewport={"width": 360, "height": 700}, color_scheme=scheme,
                 has_touch=True, is_mobile=True)  # fmt: skip
    for path, ready in (("/?q=a+red+thing", ".card"), ("/", ".hint"), ("/docs", ".operation")):
        phone.page.goto(path)
        phone.page.wait_for_selector(ready)
        for toggle in phone.page.locator("#more, summary").all():
            toggle.click()
        width = phone.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, path
    background = phone.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    assert not phone.complaints
    phone.context.close()


def test_a_key_is_asked_for_once(browser, embedder, vectors):
    with serving(embedder, open_index(vectors), "the key") as live:
        page = Page(browser, live.url)
        page.page.goto("/?q=a+red+thing")
        notice = page.page.locator("#notice")
        playwright.expect(notice).to_contain_text("asks for a key")
        page.page.fill("#key", "wrong")
        page.page.press("#key", "Enter")
        playwright.expect(notice).to_contain_text("did not accept this key")
        page.page.fill("#key", "the key")
        page.page.press("#key", "Enter")
        page.found(12)
        playwright.expect(page.page.locator(".picture img.there")).to_have_count(8)
        page.context.close()
        assert not page.complaints
