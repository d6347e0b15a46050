"""The page in a real browser: what it says, asks for, and does under keys, pointer, print and without scripts."""

import json
import re
import shutil
from importlib import resources, util
from pathlib import Path

import pytest
import report_example as example

from sonde.runs.report import write_report

pytestmark = pytest.mark.browser
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FLAGS = [
    f"--{flag}"
    for flag in (
        "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync",
        "no-first-run", "disable-quic",
    )
]  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
VIEWS = [(size, theme) for size in (DESKTOP, PHONE) for theme in ("light", "dark")]


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed on this machine")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    return write_report(
        tmp_path_factory.mktemp("page") / "report.html", header=example.header(), findings=example.findings(),
        chapters=example.chapters(), appendix=example.appendix(),
    )  # fmt: skip


@pytest.fixture
def visit(browser, report):
    """Opens the page in a context of its own and fails the test for any word on the console or any request."""
    contexts, complaints = [], []

    def opened(after="", *, wait=True, prepare=None, **options):
        context = browser.new_context(**{"viewport": DESKTOP, "accept_downloads": True, **options})
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on(
            "request", lambda request: complaints.append(f"request: {request.url}") if not _own(request.url) else None
        )
        if prepare:
            page.add_init_script(prepare)
        page.goto(report.as_uri() + after)
        if wait:
            page.locator(".tv").scroll_into_view_if_needed()
            page.wait_for_selector(".tv.ready")
        page.complaints = complaints
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def _own(url):
    return url.startswith(("file:", "data:", "blob:"))


def until(page, expression):
    """Waits until a condition holds. Playwright's own wait evaluates strings in the page, which its policy forbids."""
    for _ in range(600):
        if page.evaluate(f"!!({expression})"):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {expression}")


def saved(page, button):
    with page.expect_download() as download:
        button.click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


@pytest.mark.parametrize(("size", "theme"), VIEWS)
def test_the_page_fits_draws_its_charts_and_asks_for_nothing(visit, size, theme, tmp_path):
    page = visit(viewport=size, color_scheme=theme)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=tmp_path / "top.png")
    for figure in page.locator("figure.chart").all():
        figure.scroll_into_view_if_needed()
    until(page, "document.querySelectorAll('figure.live').length === 2")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.evaluate("document.querySelectorAll('*').length") < 20_000
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (theme == "dark")
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('figure.live svg.marks')].map(s => s.getBoundingClientRect().right))"
    )
    assert widest <= size["width"]
    page.locator(".tv").screenshot(path=tmp_path / "token-view.png")


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_first_screen_shows_a_finding_with_interval_and_control(visit, size):
    page = visit(wait=False, viewport=size)
    numbers = page.locator(".finding .numbers").first
    box = numbers.bounding_box()
    assert box["y"] + box["height"] <= size["height"]
    assert re.search(r"95\s% interval .* to .*Control, 5-gram", numbers.inner_text().replace("\n", " "))


def test_the_passage_is_walked_with_keys_and_spoken(visit):
    page = visit()
    passage, live = page.locator(".passage"), page.locator(".tv [aria-live]")
    n_tokens = passage.locator("[role=option]").count()
    passage.focus()

    def chosen():
        return int(passage.get_attribute("aria-activedescendant").rsplit("t", 1)[1])

    assert chosen() == 7
    page.keyboard.press("ArrowRight")
    assert chosen() == 8
    until(page, "document.querySelector('.tv [aria-live]').textContent.length > 0")
    pattern = r"Token 9, ␣in\. Layer 5: [\d.]+ bits\. Top: .+ percent\. True token has rank \d+\."
    assert re.fullmatch(pattern, live.text_content())
    page.keyboard.press("ArrowDown")
    until(page, "document.querySelector('.tv [aria-live]').textContent.includes('Layer 4')")
    assert page.locator(".tv output").text_content() == "4"
    assert page.locator(".panel tr.at th").text_content() == "4"
    for key, token in (("End", n_tokens - 1), ("Home", 0), ("PageDown", 20), ("PageUp", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert chosen() == token
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == f"#tv=passage,t{n_tokens - 1},l5,surprisal"
    page.keyboard.press("Escape")
    assert chosen() == 7
    assert page.evaluate("location.hash") == ""
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('.passage')")


def test_hover_shows_and_click_keeps(visit):
    page = visit()
    tokens, caption = page.locator(".passage [role=option]"), page.locator(".panel caption")
    before = caption.text_content()
    tokens.nth(2).hover()
    assert caption.text_content().startswith("Token 3 of")
    page.locator(".tv h3").hover()
    assert caption.text_content() == before
    tokens.nth(2).click()
    page.locator(".tv h3").hover()
    assert caption.text_content().startswith("Token 3 of")
    page.locator(".map canvas").click(position={"x": 14 * 5 + 7, "y": 7})
    assert caption.text_content().startswith("Token 6 of")


def test_a_tap_pins_a_token(visit):
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    page.locator(".passage [role=option]").nth(4).tap()
    assert page.locator(".panel caption").text_content().startswith("Token 5 of")


def test_the_panel_has_the_values_of_the_arrays(visit):
    page, view = visit("#tv=passage,t12,l3,entropy"), example.token_view()
    assert page.locator(".panel caption").text_content().startswith("Token 13 of")
    assert page.locator(".tv select").input_value() == "1"
    cells = page.locator(".panel tr.at td")
    assert float(cells.nth(0).text_content()) == pytest.approx(view.statistics[1].values[3, 12], rel=0.006)
    assert int(cells.nth(1).text_content().replace(",", "")) == view.rank[3, 12]
    shown = [float(cells.nth(2 + k).locator("small").text_content().strip("<%")) / 100 for k in range(5)]
    assert shown == pytest.approx(list(2 ** view.top_log2p[3, 12]), rel=0.06, abs=0.001)


def test_the_true_token_is_marked_where_it_is_among_the_top(visit):
    page, view = visit(), example.token_view()
    layer, token = next((int(a), int(b)) for a, b in zip(*((view.rank > 0) & (view.rank <= 5)).nonzero(), strict=True))
    page.goto(page.url.split("#")[0] + f"#tv=passage,t{token},l{layer},surprisal")
    until(page, "document.querySelector('.panel tr.at .true')")
    true = page.locator(".panel tr.at .true code")
    assert true.evaluate("node => getComputedStyle(node).fontWeight") == "700"
    assert page.locator(".panel tr.at .true").evaluate("node => node.cellIndex") == 2 + view.rank[layer, token]


def test_colours_of_the_passage_follow_statistic_and_layer(visit):
    page = visit()
    classes = "[...document.querySelectorAll('.passage [role=option]')].map(n => n.className.split(' ')[0])"
    first = page.evaluate(classes)
    page.locator(".tv select").select_option("2")
    assert all(name == "gap" or name[0] == "d" for name in page.evaluate(classes))
    page.locator(".tv select").select_option("0")
    assert page.evaluate(classes) == first
    page.locator(".tv input[type=range]").fill("0")
    assert page.evaluate(classes) != first
    assert page.locator(".tv output").text_content() == "embed"


def test_tables_sort_by_value_with_gaps_last_and_say_so(visit):
    page = visit()
    table = page.locator("#tab-worst")
    button, head = table.get_by_role("button", name="loss, bits"), table.locator("th", has_text="loss")
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert table.locator("tbody td:nth-child(2)").all_text_contents() == ["0.500", "11.2", "14.0", "–"]
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert table.locator("tbody td:nth-child(2)").all_text_contents() == ["14.0", "11.2", "0.500", "–"]


def test_a_table_is_saved_and_copied_exactly(visit):
    page = visit(prepare="Object.defineProperty(navigator,'clipboard',{value:{writeText:async t=>{window.copied=t}}})")
    name, data = saved(page, page.locator("#tab-worst [data-save-table]"))
    assert name == "worst.csv"
    assert data.decode().splitlines()[0] == 'token,"loss, bits",times,where'
    assert "11.234,4,topics/if" in data.decode()
    _, long = saved(page, page.locator("#tab-long [data-save-table]"))
    assert len(long.decode().splitlines()) == 451
    page.locator("#tab-worst [data-copy-table]").click()
    until(page, "window.copied")
    assert "\t0.5\t1200\teverywhere" in page.evaluate("copied")
    page.locator(".finding [data-copy]").first.click()
    until(page, "window.copied.startsWith('sonde run')")


def test_a_chart_is_saved_as_picture_data_and_spec(visit):
    page = visit()
    tools = page.locator("#fig-depth .tools")
    name, svg = saved(page, tools.get_by_role("button", name="SVG"))
    assert name == "depth.svg"
    assert b"var(" not in svg
    assert "The tuned lens is closer" in svg.decode()
    _, png = saved(page, tools.get_by_role("button", name="PNG"))
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    _, csv = saved(page, tools.get_by_role("button", name="CSV"))
    assert csv.decode().splitlines()[0] == "layer,kl,low,high,lens"
    assert len(csv.decode().splitlines()) == 22
    _, spec = saved(page, tools.get_by_role("button", name="Spec"))
    assert json.loads(spec)["title"]["text"].startswith("The tuned lens")


def test_charts_show_their_values_under_the_pointer(visit):
    page = visit()
    page.locator("#fig-depth").scroll_into_view_if_needed()
    page.wait_for_selector("#fig-depth.live")
    page.locator("#fig-depth svg.marks .mark-symbol path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "tuned lens" in page.locator("#vg-tooltip-element").inner_text()


def test_without_scripts_everything_can_be_read(visit):
    page = visit(wait=False, java_script_enabled=False)
    assert page.locator("svg.static:visible").count() == 2
    assert page.locator(".passage span").count() == len(example.token_view().tokens)
    assert page.locator(".passage .s3:visible, .passage .s2:visible").count() > 0
    assert page.locator("button:visible", has_text="PNG").count() == 0
    assert page.locator(".finding:visible").count() == 4


def test_an_old_browser_keeps_the_static_page_and_says_so(visit):
    page = visit(wait=False, prepare="delete window.DecompressionStream")
    until(page, "document.querySelector('#notice').textContent")
    assert "too old" in page.locator("#notice").text_content()
    assert page.locator("svg.static:visible").count() == 2


def test_print_shows_static_charts_the_whole_passage_and_no_controls(visit):
    page = visit(color_scheme="dark")
    page.locator("#fig-depth").scroll_into_view_if_needed()
    page.wait_for_selector("#fig-depth.live")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("svg.static:visible").count() == 2
    assert page.locator(".vega-embed:visible, button:visible, nav:visible").count() == 0
    assert page.locator(".printed canvas:visible").count() == 1
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(19, 22, 27)"
    assert page.locator(".how[open]").count() == 2
    clipped = "(n => n.scrollHeight - n.clientHeight)(document.querySelector('.passage'))"
    assert page.evaluate(clipped) <= 1


def test_links_lead_to_findings_chapters_and_figures_by_name(visit):
    page = visit("#fig-depth", wait=False)
    until(page, "Math.abs(document.querySelector('#fig-depth').getBoundingClientRect().top) < 300")
    for target in ("f-depth.tuned-kl", "c-depth", "tab-worst", "tv-passage"):
        assert page.evaluate("id => !!document.getElementById(id)", target)
    broken = (
        "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    )
    assert page.evaluate(broken) == 0


def test_the_theme_follows_the_address_and_the_button(visit):
    page = visit("?theme=dark", wait=False)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 248)"


def test_hostile_tokens_are_text(visit):
    page = visit()
    assert page.locator("img[src=x]").count() == 0
    assert example.HOSTILE in page.locator(".passage").text_content()
    assert page.locator("#tab-worst code", has_text=example.HOSTILE).count() == 1


def test_the_browser_refuses_what_the_page_would_fetch(visit):
    page = visit(wait=False)
    assert page.evaluate("fetch('https://example.org').then(() => 'loaded', () => 'refused')") == "refused"
    page.wait_for_timeout(50)
    blocked, kept = [], []
    for complaint in page.complaints:
        (blocked if "example.org" in complaint else kept).append(complaint)
    assert any("Content Security Policy" in complaint for complaint in blocked)
    assert not any(complaint.startswith("request: ") for complaint in blocked)
    page.complaints[:] = kept


@pytest.mark.parametrize(("size", "theme"), VIEWS)
def test_the_page_has_no_automatic_accessibility_violation(visit, size, theme):
    if util.find_spec("axe_playwright_python") is None:
        pytest.skip("axe-playwright-python is not installed")
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page = visit(viewport=size, color_scheme=theme)
    page.evaluate(axe)
    found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    assert [(rule["id"], [node["target"] for node in rule["nodes"]][:3], rule["help"]) for rule in found] == []
