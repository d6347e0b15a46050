"""The index of latents and their cards: none is left out, no token is markup, strength is not colour alone."""

import base64
import gzip
import json
import re
from pathlib import Path

import pytest

from sonde.runs.blocks import Chapter, Header
from sonde.runs.feature_cards import Feature, FeatureScore, FeatureView, FeatureWindow
from sonde.runs.report import feature_view, write_report

HOSTILE = "</script><img src=x onerror=alert(1)>"


def latent(number: int = 3, **changes) -> Feature:
    fields = {
        "number": number,
        "status": "scored",
        "fires": 20,
        "tokens": 1000,
        "largest": 4.0,
        "explanation": f'fires on "{HOSTILE}"',
        "windows": [
            FeatureWindow(tokens=["a", HOSTILE, " b", "\n"], activations=[0.0, 4.0, 1.0, 0.0], quantile=10),
            FeatureWindow(tokens=["c", " d", " e", " f"], activations=[0.0, 0.0, 0.1, 0.0], quantile=1),
        ],
        "strengths": [10, 5, 0, 1],
        "scores": [
            FeatureScore(test="detection", measure="balanced accuracy", estimate=0.8, low=0.7, high=0.9, chance=0.5),
            FeatureScore(test="detection", measure="f1", estimate=0.7, main=False),
            FeatureScore(test="simulation", measure="all", estimate=None, reason="constant <prediction>"),
        ],
        "promoted": [(HOSTILE, 2.0)],
        "suppressed": [(" b", -1.5)],
        "near": {"decoder cosine": [(5, 0.4), (77, 0.3)], "firing together (Jaccard)": []},
    }
    return Feature(**{**fields, **changes})


def silent(number: int) -> Feature:
    return Feature(number=number, status="never fired", fires=0, tokens=1000, reason="it fires at no token")


def page(tmp_path: Path, features: list[Feature], **options) -> Path:
    view = FeatureView(id="some.latents", title="Latents", caption="All of them.", features=features, **options)
    chapter = Chapter(id="latents", question="What?", answer="This.", blocks=[view], not_shown="Much.", how="So.")
    header = Header(id="a", title="Latents", study="s", model="m", command="c", created="2026-01-01")
    return write_report(tmp_path / "report.html", header=header, findings=[], chapters=[chapter])


def packed(path: Path) -> dict:
    found = re.search(r'class="fv-data">([^<]*)<', path.read_text())
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_every_latent_is_in_the_index_also_the_silent_ones(tmp_path):
    inside = packed(page(tmp_path, [silent(0), latent(3), silent(5)]))
    assert sorted(row["n"] for row in inside["rows"]) == [0, 3, 5]
    assert inside["rows"][0]["n"] == 3  # what has most to show comes first
    assert set(inside["cards"]) == {"3"}
    assert inside["tests"] == ["detection", "simulation"]
    (said,) = {row["says"] for row in inside["rows"] if row["status"] == "never fired"}
    assert said == "it fires at no token"


def test_no_token_is_markup_in_the_page_or_in_what_the_script_unpacks(tmp_path):
    path = page(tmp_path, [latent()])
    assert "<img" not in path.read_text()
    card = packed(path)["cards"]["3"]
    assert "<img" not in card and "&lt;img" in card and "constant &lt;prediction&gt;" in card


def test_strength_is_a_colour_a_line_and_a_number(tmp_path):
    card = packed(page(tmp_path, [latent()]))["cards"]["3"]
    assert re.search(r'<b class="s6" title="4.00" data-a="4.00">&lt;/script', card)
    assert re.search(r'<b class="s1" title="0.100" data-a="0.100">\xa0e</b>', card)
    assert "tenth 10" in card and "tenth 1<" in card
    assert "±" not in card and "0.70 to 0.90" in card and 'class="ch"' in card


def test_the_histogram_is_logarithmic_and_has_a_name():
    drawn = feature_view.histogram([1000, 10, 0, 1], 4.0)
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert len(heights) == 3
    assert (heights[0] - heights[1]) == pytest.approx(2 * (heights[1] - heights[2]), rel=0.02)
    assert 'role="img" aria-label="Histogram of 1,011 activations' in drawn


def test_neighbours_that_are_in_the_view_are_links(tmp_path):
    card = packed(page(tmp_path, [latent(3), silent(5)]))["cards"]["3"]
    assert '<a href="#some.latents/5">Latent 5</a>' in card
    assert "Latent 77" in card and 'some.latents/77"' not in card


def test_equal_views_give_equal_bytes(tmp_path):
    one = page(tmp_path / "a", [latent(), silent(1)]).read_bytes()
    assert one == page(tmp_path / "b", [latent(), silent(1)]).read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureWindow(tokens=["a"], activations=[1.0, 2.0]), "1 tokens and 2 activations"),
        (lambda: FeatureView(id="a", title="t", caption="c", features=[]), "needs latents"),
        (lambda: FeatureView(id="a", title="t", caption="c", features=[latent(1), latent(1)]), "each of them once"),
        (lambda: FeatureView(id="A b", title="t", caption="c", features=[latent()]), "lower-case"),
        (lambda: FeatureView(id="a", title="t", caption="c", features=[latent()], start=9), "latent 9 is not among"),
        (
            lambda: FeatureView(
                id="a", title="t", caption="c",
                features=[latent(windows=[FeatureWindow(tokens=["a"], activations=[float("nan")])])],
            ),
            "not finite",
        ),
    ],
    ids=["lengths", "none", "twice", "id", "start", "nan"],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.browser
def test_the_index_sorts_searches_and_opens_by_keys_and_address(tmp_path):
    import shutil

    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed on this machine")
    many = [latent(n, fires=n, explanation=f"says {n}") for n in range(3, 160)]
    path = page(tmp_path, [*many, silent(0)])
    complaints = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 400, "height": 800})
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(f"{path.as_uri()}#some.latents/5")
        opened.wait_for_selector("h4:text-is('Latent 5')")
        assert opened.evaluate("document.activeElement.textContent") == "Latent 5"
        assert opened.evaluate("document.documentElement.scrollWidth") == 400
        head = opened.locator("th[data-key=rate] button")
        head.focus()
        head.press("Enter")
        assert opened.locator("th[data-key=rate]").get_attribute("aria-sort") == "descending"
        assert opened.locator(".index tbody tr").first.locator("th").inner_text() == "159"
        assert opened.locator(".index tbody tr").count() == 100
        opened.locator(".fmore").click()
        assert opened.locator(".index tbody tr").count() == 158
        opened.locator("input[type=search]").fill("says 142")
        assert opened.locator(".fcount").inner_text() == "1 of 158 latents"
        opened.locator("input[type=search]").fill("")
        opened.locator(".fv select").select_option("never fired")
        opened.locator(".index tbody a").press("Enter")
        opened.wait_for_selector("h4:text-is('Latent 0')")
        assert "fires at no token" in opened.locator(".fcard").inner_text()
        browser.close()
    assert not complaints
