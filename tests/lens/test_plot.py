import re

import pytest
import torch

from sonde.errors import SondeError
from sonde.lens.plot import difference_chart, terminal_table, trajectory_chart, write_html, write_png
from sonde.lens.trajectory import STATISTICS, trajectory
from sonde.lens.tuned import TunedLens
from sonde.runs.charts import spec

TEXT = "def fibonacci(n):\n\treturn n\x1f"


@pytest.fixture(scope="module")
def read(lens_lm):
    ids = torch.tensor([lens_lm.encode(TEXT)])
    return trajectory(lens_lm, ids, anti_targets=ids)


def cells_of(chart):
    return next(iter(chart.to_dict(validate=False)["datasets"].values()))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("log", [True, False])
def test_every_statistic_has_a_chart_that_the_house_accepts(lens_lm, read, statistic, log):
    made = spec(trajectory_chart(read, lens_lm, statistic=statistic, log=log))
    layers = made["layer"]
    assert {layer["mark"]["type"] for layer in layers} == {"rect", "text"}
    assert "predicts" in {tip["field"] for tip in layers[0]["encoding"]["tooltip"]}


def test_a_stride_leaves_out_layers_but_never_the_output(lens_lm, read):
    text = terminal_table(read, lens_lm, stride=2)
    assert "resid_pre.1" not in text
    assert "output" in text
    assert "resid_pre.2" in text


def test_the_terminal_table_keeps_its_width_and_shows_every_token_once(lens_lm, read):
    for width in (60, 100):
        lines = terminal_table(read, lens_lm, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert sum(len(re.findall(r"^output", line)) for line in lines) == -(
            -len(read.tokens[0]) // ((width - 13) // 16)
        )


def test_the_page_needs_no_network_and_the_picture_is_a_png(lens_lm, read, tmp_path):
    chart = trajectory_chart(read, lens_lm)
    write_html(chart, tmp_path / "page.html")
    write_png(chart, tmp_path / "page.png")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    assert "var(--" not in page
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_difference_with_itself_is_zero_and_a_batch_is_averaged(lens_lm, read):
    chart = difference_chart(read, read, lens_lm, statistic="entropy")
    cells = cells_of(chart)
    assert {cell["value"] for cell in cells} == {0.0}
    ids = torch.cat([read.tokens, read.tokens.flip(1)])
    both = trajectory(lens_lm, ids)
    cells = cells_of(trajectory_chart(both, lens_lm, row=None))
    assert cells[0]["value"] == pytest.approx(both.entropy[0, :, 0].mean().item(), rel=1e-6)


def test_pictures_that_cannot_be_drawn_are_refused(lens_lm, read):
    long = trajectory(lens_lm, torch.randint(3, 400, (6, 120)), TunedLens.logit(lens_lm))
    with pytest.raises(SondeError, match="positions"):
        trajectory_chart(read, lens_lm, positions=slice(0, 0))
    with pytest.raises(SondeError, match="row 6"):
        trajectory_chart(long, lens_lm, row=6)
    with pytest.raises(SondeError, match="stride"):
        terminal_table(read, lens_lm, stride=0)
    with pytest.raises(SondeError, match="no difference"):
        difference_chart(read, long, lens_lm)
