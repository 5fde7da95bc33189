"""The built pages, as a reader meets them: from the file system, on three screens, light and dark, and as a PDF."""

import html.parser
import pprint
import urllib.parse
import zipfile

import pypdf
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from book.making import pages, pdf
from book.places import chapter_names

pytestmark = pytest.mark.browser

WIDTHS = (390, 1024, 1600)
SERIOUS = ("serious", "critical")

# Names what sticks out of the window, and, where the window is wide, what has to be scrolled inside its frame.
OVERFLOWING = """wide => {
  const window_width = document.documentElement.clientWidth
  const name = element => `${element.tagName} ${element.id} ${element.className} ${element.textContent.slice(0, 60)}`
  const framed = element => {
    for (let parent = element.parentElement; parent; parent = parent.parentElement)
      if (getComputedStyle(parent).overflowX !== "visible") return true
    return false
  }
  const article = [...document.querySelectorAll(".bd-article *")]
  const out = article.filter(element => element.getBoundingClientRect().right > window_width + 1 && !framed(element))
  const scrolled = wide ? article.filter(element => element.matches("pre, .output, .pst-scrollable-table-container")
    && element.scrollWidth > element.clientWidth + 1) : []
  const page = document.documentElement.scrollWidth > window_width ? [document.documentElement] : []
  return [...page, ...out, ...scrolled].map(name)
}"""
BROKEN_IMAGES = "[...document.images].filter(image => !image.naturalWidth || !image.alt).map(image => image.src)"
SET_MATHEMATICS = "window.MathJax?.startup?.promise.then(() => null)"


class Links(html.parser.HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.targets = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.update(filter(None, (values.get("id"), values.get("name") if tag == "a" else None)))
        self.targets += [values[key] for key in ("href", "src") if values.get(key)]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Build the pages from the committed notebooks; return the folder that holds them."""
    build = tmp_path_factory.mktemp("site")
    pages.copy_notebooks(build)
    return pages.build_pages(build, build / "html").parent


@pytest.fixture(scope="session")
def files(site):
    return sorted((site / "book").glob("*.html")) + [site / "genindex.html", site / "search.html"]


@pytest.fixture(scope="session")
def browser():
    program = pdf.find_browser()
    if program is None:
        pytest.skip(f"none of {', '.join(pdf.BROWSERS)} is installed: pages are not looked at")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=pdf.BROWSER_OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens a page, and a list of all that went wrong on it."""
    contexts = []

    def open_page(path, *, width=1024, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("request", lambda request: complaints.append(request.url) if "file:" not in request.url[:5] else None)
        page.goto(path.as_uri())
        page.wait_for_load_state("networkidle")
        page.evaluate(SET_MATHEMATICS)
        return page, complaints

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_open_from_the_file_system_without_a_complaint_and_nothing_sticks_out(width, files, open_page):
    found = {}
    for path in files:
        page, complaints = open_page(path, width=width)
        problems = complaints + page.evaluate(OVERFLOWING, width >= 1024) + page.evaluate(BROKEN_IMAGES)
        found |= {path.name: problems} if problems else {}
        page.close()
    assert not found, pprint.pformat(found, width=200)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_have_no_serious_barrier(scheme, files, open_page):
    """All rules on a phone's light pages; the contrast of colours on dark ones."""
    options = {"preload": False, "resultTypes": ["violations"]}
    if scheme == "dark":
        options["runOnly"] = ["color-contrast"]
    found = {}
    for path in files:
        page, _ = open_page(path, width=390, scheme=scheme)
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        for violation in Axe().run(page, options=options).response["violations"]:
            if violation["impact"] in SERIOUS:
                found[path.name, violation["id"]] = [node["html"][:200] for node in violation["nodes"]]
        page.close()
    assert not found, pprint.pformat(found, width=200)


def test_a_reader_unfolds_a_solution(site, open_page):
    page, _ = open_page(site / "book" / "01_bench.html")
    solution = page.locator("details.sd-dropdown", has_text="Solutions")
    assert not solution.locator(".sd-card-body, .sd-summary-content").first.is_visible()
    solution.locator("summary").click()
    assert solution.locator(".sd-card-body, .sd-summary-content").first.is_visible()


def test_a_reader_switches_to_dark_pages_and_they_stay_dark(site, open_page):
    page, complaints = open_page(site / "book" / "intro.html")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    while page.evaluate("document.documentElement.dataset.theme") != "dark":
        page.locator("button.theme-switch-button:visible").first.click()
    assert page.evaluate(ground) != before
    page.locator(".bd-sidebar-primary a", has_text="02 Proxies").click()
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert complaints == []


def test_a_reader_searches_and_arrives(site, open_page):
    page, complaints = open_page(site / "book" / "intro.html")
    page.keyboard.press("Control+k")
    page.locator("input[type=search]:visible").first.fill("noise ceiling")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results ul.search li a")
    results = page.locator("#search-results ul.search li a")
    assert any("01 Bench" in text for text in results.all_inner_texts())
    results.first.click()
    page.wait_for_load_state("networkidle")
    assert page.locator("h1:visible").count() == 1
    assert complaints == []


def test_every_link_inside_the_book_has_its_target_and_every_other_is_well_formed(site, files):
    known = {path.resolve(): Links(path) for path in [*files, site / "index.html"]}
    missing = []
    for path, links in known.items():
        for target in links.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or target.startswith("//"):
                assert parts.scheme in ("https", "mailto", "data"), (path.name, target)
                assert parts.scheme != "https" or "." in parts.hostname, (path.name, target)
                continue
            file = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if not file.exists() or (parts.fragment and file in known and parts.fragment not in known[file].ids):
                missing.append((path.name, target))
    assert not missing, pprint.pformat(missing)


def test_the_pdf_holds_every_page_in_order_and_names_no_file_of_this_machine(site, browser):
    book = pypdf.PdfReader(site / pages.PDF_NAME)
    headings = [entry.title for entry in book.outline]
    assert headings[0] == "EMQ, rebuilt"
    assert [heading[:2] for heading in headings[1:6]] == ["01", "02", "03", "04", "05"]
    links = [link.get_object() for page in book.pages for link in page.get("/Annots", ())]
    assert any("/Dest" in link for link in links)
    assert not [link for link in links if link.get("/A", {}).get("/URI", "").startswith("file:")]


def test_the_zip_holds_every_notebook(site):
    with zipfile.ZipFile(site / pages.ZIP_NAME) as archive:
        names = archive.namelist()
    assert names == [f"emq-notebooks/{name}.ipynb" for name in chapter_names()]
