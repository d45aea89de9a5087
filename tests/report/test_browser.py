"""The page in a browser: complete, without errors, and readable on a desk and on a phone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not here")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not here (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """An opened page: its messages and the requests that it made."""

    def __init__(self, browser, path: Path, width: int, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.tab = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.messages.append(message.text))
        self.tab.on("pageerror", lambda error: self.messages.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        self.tab.route("**/*", self._answer)
        self.tab.goto(path.as_uri(), wait_until="load")

    def _answer(self, route) -> None:
        if route.request.url.startswith(("file://", "data:")):
            route.continue_()
        else:
            self.requests.append(route.request.url)
            route.abort()

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_without_errors_and_fits(browser, page_file, width, scheme):
    with Visit(browser, page_file, width, scheme) as visit:
        assert visit.tab.title() == "Cell types by scMulan"
        visit.tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert visit.tab.evaluate("document.documentElement.scrollWidth") == width
        # No box sticks out but inside one that scrolls; drawings may paint over their edge, but not over the page's.
        outside = visit.tab.evaluate(
            """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .unseen, .skip'))
                .filter(e => { const b = e.getBoundingClientRect(); return b.right > innerWidth + 1 || b.left < -1; })
                .map(e => e.tagName + ' ' + e.className)"""
        )
        assert outside == []
        assert visit.messages == [] and visit.requests == []


def test_a_request_would_be_seen(browser, page_file, tmp_path):
    path = tmp_path / "leaky.html"
    html = page_file.read_text(encoding="utf-8").replace("img-src data:", "img-src *")
    path.write_text(html.replace("</main>", '<img src="https://example.org/x.png"></main>'), encoding="utf-8")
    with Visit(browser, path, 1280) as visit:
        assert visit.requests == ["https://example.org/x.png"]


def test_policy_stops_scripts_and_requests(browser, page_file, tmp_path):
    path = tmp_path / "attacked.html"
    evil = '<img src="https://example.org/x.png" onerror="alert(1)"><script>alert(2)</script></main>'
    path.write_text(page_file.read_text(encoding="utf-8").replace("</main>", evil), encoding="utf-8")
    with Visit(browser, path, 1280) as visit:
        assert visit.requests == []
        assert len(visit.messages) >= 2 and all("Content Security Policy" in text for text in visit.messages)


@pytest.mark.parametrize("width", [1280, 390])
def test_pictures_are_seen_and_scale(browser, page_file, width):
    with Visit(browser, page_file, width) as visit:
        boxes = visit.tab.evaluate(
            """() => [...document.querySelectorAll('figure svg')].map(e => {
                const b = e.getBoundingClientRect(); return [b.width, b.height, e.viewBox.baseVal.width]; })"""
        )
        assert len(boxes) == 7
        for wide, high, drawn in boxes:
            assert min(width * 0.6, drawn * 0.8) <= wide <= min(width, drawn) + 1 and high > 150


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, page_file, scheme):
    with Visit(browser, page_file, 1280, scheme) as visit:
        poor = visit.tab.evaluate(
            """() => {
                const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
                const lum = c => { const [r, g, b] = c.map(v => { v /= 255;
                    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
                const behind = e => { for (; e; e = e.parentElement) {
                    const c = parse(getComputedStyle(e).backgroundColor);
                    if (c.length == 3 || c[3] == 1) return c.slice(0, 3); } return [255, 255, 255]; };
                const found = [];
                for (const e of document.querySelectorAll('body *')) {
                    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
                    const style = getComputedStyle(e);
                    const ink = parse(e.closest('svg') ? style.fill : style.color).slice(0, 3);
                    const [a, b] = [lum(ink), lum(behind(e))].sort((x, y) => y - x);
                    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(e.tagName + ': ' + e.textContent.slice(0, 40));
                }
                return found; }"""
        )
        assert poor == []


def test_wide_tables_scroll_in_their_own_box_and_by_keyboard(browser, page_file):
    with Visit(browser, page_file, 390) as visit:
        boxes = visit.tab.evaluate(
            """() => [...document.querySelectorAll('.scroll')].filter(e => !e.closest('details:not([open])'))
                .map(e => [e.scrollWidth > e.clientWidth, e.tabIndex, e.ariaLabel])"""
        )
        assert boxes and all(scrolls and focus == 0 and label for scrolls, focus, label in boxes)


def test_page_prints(browser, page_file):
    with Visit(browser, page_file, 1280) as visit:
        pdf = visit.tab.pdf(format="A4")
        assert pdf.startswith(b"%PDF") and 3 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 20
        assert visit.messages == []
