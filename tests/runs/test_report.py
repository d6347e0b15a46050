import json
import math
import re

import jsonschema
import pytest
import report_example as example
from hypothesis import given
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.runs import finding as findings_module
from sonde.runs.blocks import Chapter, Figure, Prose, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.palette import DARK, LIGHT
from sonde.runs.report import numbers, page, strip, write_report

WORDS = {"answer": "a", "not_shown": "n", "how": "h"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        path,
        header=example.header(),
        findings=example.findings(),
        chapters=example.chapters(),
        appendix=example.appendix(),
    )
    return path


def render(chapters=(), findings=(), **options):
    return page.render(
        header=example.header(), findings=findings, chapters=chapters, appendix=example.appendix(), **options
    )


def test_equal_runs_give_identical_bytes(written, tmp_path):
    again = write_report(
        tmp_path / "report.html", header=example.header(), findings=example.findings(), chapters=example.chapters(),
        appendix=example.appendix(),
    )  # fmt: skip
    assert again.read_bytes() == written.read_bytes()
    assert again.with_name("findings.json").read_bytes() == written.with_name("findings.json").read_bytes()


def test_findings_json_keeps_its_schema_and_is_what_the_page_holds(written):
    twin = json.loads(written.with_name("findings.json").read_text())
    jsonschema.validate(twin, findings_module.schema())
    inside = re.search(r'id="findings">(.*?)</script>', written.read_text())
    assert json.loads(inside[1]) == twin


def test_every_number_of_a_finding_on_the_page_comes_from_findings_json(written):
    twin = json.loads(written.with_name("findings.json").read_text())
    text = written.read_text()
    for finding in twin["findings"]:
        card = re.search(rf'id="f-{re.escape(finding["id"])}".*?</article>', text, re.S)[0]
        assert f"</span> {finding['status']}</p>" in card
        if finding["estimate"] is None:
            assert finding["reason"] in card
            continue
        places = strip.decimals(finding["estimate"], *finding["interval"])
        low, high = (numbers.rounded(end, places) for end in finding["interval"])
        assert (
            f"{numbers.rounded(finding['estimate'], places)} {finding['unit']}</b>, 95\u00a0% interval {low} to {high}"
            in card
        )
        assert finding["control"]["name"] in card


def test_hostile_text_is_only_ever_text(written):
    text = written.read_text()
    assert "<img" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in text
    assert "\\u003c/script\\u003e\\u003cimg" in text
    assert text.count("</script>") == len(re.findall(r"<script[ >]", text))


def test_the_page_may_load_nothing(written):
    text = written.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert not re.search(
        r'(?:src|href)="(?!#|data:,|https?://arxiv)', re.sub(r"<script.*?</script>", "", text, flags=re.S)
    )


def test_a_page_without_charts_leaves_vega_out():
    assert 'id="vega"' not in render([Chapter(id="c", question="q", blocks=[Prose(text="p")], **WORDS)])[0]


def test_static_charts_need_no_vega_and_the_page_is_smaller(written):
    still = render(example.chapters(), example.findings(), vega=False)[0]
    assert 'id="vega"' not in still
    assert still.count('class="static"') == 2
    assert len(still) < written.stat().st_size - 300_000


def test_charts_share_no_ids():
    text = render(example.chapters(), example.findings(), vega=False)[0]
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_page_over_the_budget_is_refused_with_its_largest_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "BUDGET", 50_000)
    with pytest.raises(SondeError, match=r"more than 50.0 kB. Largest parts: .*token view passage.*fewer tokens"):
        write_report(
            tmp_path / "r.html",
            header=example.header(),
            findings=example.findings(),
            chapters=example.chapters(),
            vega=False,
        )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SondeError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", header=example.header(), findings=[], chapters=[])


def test_ids_that_occur_twice_are_refused():
    same = [Prose(text="p"), Table(id="t", caption="c", columns=["a"], rows=[[1]])]
    with pytest.raises(ValueError, match=r"two parts.*Table t"):
        render([Chapter(id=f"c{i}", question="q", blocks=same, **WORDS) for i in range(2)])
    with pytest.raises(ValueError, match="two findings"):
        render([], [example.findings()[0]] * 2)


def test_a_chapter_cannot_show_a_finding_that_the_report_lacks():
    with pytest.raises(ValueError, match="not among the report's findings"):
        render([Chapter(id="c", question="q", findings=[example.findings()[0]], **WORDS)], [])


def test_an_empty_chapter_is_refused_and_a_failed_one_says_why():
    with pytest.raises(ValueError, match="is empty"):
        Chapter(id="c", question="q", **WORDS)
    with pytest.raises(ValueError, match="no 'not_shown'"):
        Chapter(id="c", question="q", blocks=[Prose(text="p")], answer="a", how="h")
    assert "It ran out of memory." in render([Chapter(id="c", question="q", failed="It ran out of memory.")])[0]


def test_an_empty_table_is_a_sentence_and_a_gap_is_never_zero():
    empty = Table(id="t", caption="Worst tokens", columns=["a"], rows=[], empty="No token is that bad.")
    gaps = Table(id="g", caption="Gaps", columns=["a", "b"], rows=[["x", math.nan], ["y", 1.5]])
    text = render([Chapter(id="c", question="q", blocks=[empty, gaps], **WORDS)])[0]
    assert "No token is that bad." in text
    assert 'data-v="">–</td>' in text


def test_rows_that_do_not_fit_and_figures_without_captions_are_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells"):
        Table(id="t", caption="c", columns=["a", "b"], rows=[[1, 2], [1]])
    with pytest.raises(ValueError, match="no caption"):
        Figure(id="f", chart=example.depth_chart(), caption=" ")


def test_findings_beyond_the_twelfth_are_kept_closed():
    same = {"chapter": "c", "metric": "m", "command": "x", "refused": "no data"}
    many = [Finding(id=f"f{i}", sentence=f"Number {i}.", **same) for i in range(15)]
    text = render([], many)[0]
    first, rest = text.split('<details class="more">')
    assert first.count('<article class="finding') == 12
    assert rest.count('<article class="finding') == 3
    assert "3 more findings" in rest


finite = st.floats(-1e6, 1e6)


@given(finite, st.floats(0, 1e3), st.floats(0, 1e3), finite, st.floats(0, 1e3))
def test_the_number_line_holds_everything_and_keeps_its_order(estimate, below, above, control, spread):
    made = Finding(
        id="f", chapter="c", sentence="s", metric="m", command="x", estimate=estimate,
        interval=(estimate - below, estimate + above), interval_method="exact", n=3,
        control=Control("control", control, (control - spread, control + spread)),
    )  # fmt: skip
    line = strip.view(made.to_json())["line"]
    places = [line["estimate"], line["low"], line["zero"], line["control"], line["control_low"]]
    assert all(0 <= place <= 100 for place in places)
    assert line["low"] + line["width"] <= 100
    assert line["low"] - 0.01 <= line["estimate"] <= line["low"] + line["width"] + 0.01
    if estimate < control:
        assert line["estimate"] <= line["control"]


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_printed_number_has_at_most_three_significant_digits_and_no_hyphen(value):
    text = numbers.number(value)
    assert "-" not in text
    if math.isfinite(value) and 1e-4 <= abs(value) < 1000:
        assert float(text.replace("−", "-").replace(",", "")) == pytest.approx(value, rel=6e-3)
    if not math.isfinite(value):
        assert text == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.2141, "2.21"),
        (-0.5, "−0.500"),
        (65_536, "65,536"),
        (12345.6, "12,346"),
        (3.2e-7, "3.20 × 10⁻⁷"),
        (0.0312, "0.0312"),
    ],
)
def test_numbers_as_people_write_them(value, text):
    assert numbers.number(value) == text


def test_times_and_sizes_as_people_say_them():
    spoken = [numbers.duration(s) for s in (0.42, 41.2, 161.2, 11_100, None)]
    assert spoken == [
        "0.4 s",
        "41 s",
        "2 min 41 s",
        "3 h 5 min",
        "–",
    ]
    assert [numbers.size(n) for n in (512, 48_211, 1_222_333)] == ["512 B", "48.2 kB", "1.22 MB"]
    assert numbers.date("2026-11-21T09:41:00") == "21 Nov 2026, 09:41"
    assert (numbers.count(2_613_248), numbers.trimmed(12.0), numbers.trimmed(0.5)) == ("2.61 M", "12", "0.5")


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_keeps_its_contrast_on_every_colour_of_the_page(written, theme):
    css = re.search(r"<style>(.*?)</style>", written.read_text(), re.S)[1]
    block = re.search(rf":root\[data-theme={theme}\]{{(.*?)}}", css, re.S)[1]
    colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", block))
    scales = [colours[name] for name in (*(f"s{i}" for i in range(7)), *(f"d{i}" for i in range(9)))]
    assert min(contrast(colours["ink"], step) for step in scales) >= 5.6
    for ground in ("paper", "card"):
        assert contrast(colours["ink"], colours[ground]) >= 12
        assert min(contrast(colours[role], colours[ground]) for role in ("muted", "accent", "second")) >= 5.5
        assert min(contrast(colours[role], colours[ground]) for role in ("ctl", "focus")) >= 4.5
    steps = scales[:7]
    rising = [luminance(step) for step in steps]
    assert rising == sorted(rising, reverse=theme == "light")
    assert (LIGHT if theme == "light" else DARK)["ink"] == colours["ink"]
