import itertools
import json
import math
import re

import pytest
from report_example import calibration_chart, depth_chart, lens_rows

from sonde.runs import chart_kinds, charts
from sonde.runs.palette import DARK, LIGHT, fixed, variables

WORDS = {"title": "It falls", "subtitle": "bits, lower is better", "x_title": "layer", "y_title": "bits"}


def bare(**changes):
    chart = {
        "title": {"text": "It falls", "subtitle": "bits, lower is better"},
        "data": {"values": [{"a": 1, "b": 2}]},
        "mark": "point",
        "encoding": {"x": {"field": "a", "title": "layer"}, "y": {"field": "b", "axis": {"title": "bits"}}},
    }
    return {**chart, **changes}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"title": "It falls"}, "no title"),
        ({"title": {"text": "It falls"}}, "no subtitle"),
        ({"encoding": {"x": {"field": "a"}, "y": {"field": "b", "title": "bits"}}}, "no title on its x axis"),
        ({"data": {"values": [{"a": i, "b": i} for i in range(2001)]}}, "2,001 points"),
        ({"hconcat": []}, "hconcat"),
    ],
)
def test_a_chart_that_breaks_a_rule_is_refused_by_name(changes, complaint):
    with pytest.raises(ValueError, match=rf"'my-chart'.*{complaint}"):
        charts.spec(bare(**changes), "my-chart")


def test_a_chart_that_keeps_the_rules_gets_the_theme_and_fits_its_container():
    made = charts.spec(bare())
    assert made["width"] == "container"
    assert made["height"] == chart_kinds.HEIGHT
    assert made["config"]["axis"]["labelColor"] == "var(--muted)"


def test_equal_charts_have_equal_specs_and_pictures_however_many_came_before():
    first = charts.spec(depth_chart())
    calibration_chart().to_dict()
    second = charts.spec(depth_chart())
    assert json.dumps(first) == json.dumps(second)
    assert charts.svg(first) == charts.svg(second)


def test_numbers_that_are_not_finite_become_counted_gaps():
    rows = [{"a": 1.0, "b": math.nan}, {"a": math.inf, "b": 2.0}, {"a": 3.0, "b": 4.0}]
    made = charts.spec(bare(data={"values": rows}))
    assert made["usermeta"]["gaps"] == 2
    assert made["data"]["values"][0]["b"] is None
    json.dumps(made, allow_nan=False)


def test_the_static_picture_has_only_theme_colours_and_png_only_fixed_ones():
    made = charts.spec(depth_chart())
    picture = charts.svg(made)
    assert "var(--accent)" in picture
    assert not re.search(r'(?:fill|stroke)="#(?!000)[0-9a-f]{3,6}"', picture)
    assert "var(" not in fixed(json.dumps(made))
    assert charts.png(made, scale=1).startswith(b"\x89PNG")


def test_the_control_is_grey_and_dashed_and_every_line_is_named_at_its_end():
    made = charts.spec(depth_chart())
    text = json.dumps(made)
    line = next(layer for layer in made["layer"] if layer["mark"]["type"] == "line")
    place = line["encoding"]["color"]["scale"]["domain"].index("unigram")
    assert line["encoding"]["color"]["scale"]["range"][place] == "var(--ctl)"
    assert line["encoding"]["strokeDash"]["scale"]["range"][place] != [1, 0]
    assert {end["lens"] for rows in made["datasets"].values() for end in rows if "label_at" in end} == {
        "tuned lens",
        "logit lens",
        "unigram",
    }
    assert '"legend": {' not in text.replace(json.dumps(made["config"]), "")


@pytest.mark.parametrize("log", [False, True])
def test_names_at_line_ends_stay_apart_and_inside(log):
    rows = [{"layer": i, "kl": 1.0 + 0.001 * s, "lens": f"lens {s}"} for s in range(4) for i in range(3)]
    rows.append({"layer": 2, "kl": 5.0, "lens": "far"})
    made = charts.lines(rows, x="layer", y="kl", series="lens", log=log, **WORDS).to_dict()
    ends = sorted(end["label_at"] for found in made["datasets"].values() for end in found if "label_at" in end)
    low, high = next(layer for layer in made["layer"] if layer["mark"]["type"] == "line")["encoding"]["y"]["scale"][
        "domain"
    ]
    place = (lambda v: math.log(v / low) / math.log(high / low)) if log else (lambda v: (v - low) / (high - low))
    pixels = [chart_kinds.HEIGHT * place(end) for end in ends]
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(pixels))
    assert pixels[-1] <= chart_kinds.HEIGHT * 1.001


def test_zero_is_in_view_unless_the_axis_says_it_is_logarithmic():
    rows = lens_rows()
    flat = charts.lines(rows, x="layer", y="kl", series="lens", **WORDS).to_dict()
    log = charts.lines(rows, x="layer", y="kl", series="lens", log=True, **WORDS).to_dict()
    assert flat["layer"][0]["encoding"]["y"]["scale"]["domain"][0] == 0
    assert "(log scale)" in log["layer"][0]["encoding"]["y"]["title"]


def test_every_kind_of_chart_keeps_the_rules():
    items = [{"i": i, "name": f"n{i}", "v": i + 1.0, "lo": i + 0.5, "hi": i + 1.5, "c": 2.0} for i in range(3)]
    cells = [{"x": i, "y": j, "v": float(i * j)} for i in range(3) for j in range(3)]
    same = {"low": "lo", "high": "hi", "control": "c", **WORDS}
    for made in (
        charts.intervals(items, label="name", value="v", reference=("chance", 0.5), **same),
        charts.bars(items, x="i", y="v", x_labels=["a", "b", "c"], **same),
        charts.points(items, x="i", y="v", low="lo", high="hi", size="c", diagonal="equal", **WORDS),
        charts.heat(cells, x="x", y="y", value="v", x_labels=list("abc"), y_labels=list("abc"), **WORDS),
    ):
        assert charts.svg(charts.spec(made)).startswith("<svg")


def test_both_themes_define_the_same_variables():
    assert LIGHT.keys() == DARK.keys()
    names = {theme: re.findall(r"--(\w+):", variables(theme)) for theme in ("light", "dark")}
    assert names["light"] == names["dark"]


def test_a_matrix_names_every_row_and_column():
    names = [f"block {i}" for i in range(12)]
    cells = [{"x": i, "y": j, "v": float(i + j)} for i in range(12) for j in range(12)]
    made = charts.heat(cells, x="x", y="y", value="v", x_labels=names, y_labels=names, **WORDS)
    picture = charts.svg(charts.spec(made))
    assert all(picture.count(f">{name}</text>") == 2 for name in names)


def test_control_characters_in_labels_are_spelled_out_instead_of_ending_the_process():
    rows = [{"x": 0, "y": 1.0, "of": "\x1f token"}, {"x": 1, "y": 2.0, "of": "\x1f token"}]
    chart = chart_kinds.lines(rows, x="x", y="y", series="of", title="T", subtitle="s", x_title="x", y_title="y")
    assert "\\x1f token" in charts.svg(charts.spec(chart))


def test_every_colour_of_the_page_has_a_fixed_value():
    from sonde.runs import palette

    names = [declared.split(":")[0] for declared in palette.variables("light").split(";")]
    assert "var(" not in palette.fixed(" ".join(f"var({name})" for name in names))
