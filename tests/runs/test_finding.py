import json
import math

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.runs.finding import Control, Finding, Paper, findings_json, schema

RUN = {
    "id": "audit-pebble-1",
    "study": "audit",
    "status": "finished",
    "model": {"id": "organism:pebble", "hash": "ab", "params": 3},
    "data": {"source": "pydoc", "tokens": None, "hash": ""},
    "seed": 0,
    "sonde": "0.1.0",
    "created": "2026-11-21T09:00:00Z",
    "seconds": 1.5,
    "command": "sonde audit organism:pebble",
    "config_sha256": "cd",
}


def finding(**changes) -> Finding:
    fields = {
        "id": "depth.tuned-kl",
        "chapter": "depth",
        "sentence": "The tuned lens is closer to the output than the logit lens.",
        "metric": "KL to the output",
        "unit": "bits",
        "estimate": 0.5,
        "interval": (0.4, 0.6),
        "interval_method": "bootstrap",
        "n": 100,
        "command": "sonde audit organism:pebble --chapters depth",
        "better": "lower",
        "control": Control("logit lens", 1.5, (1.4, 1.6)),
    }
    return Finding(**fields | changes)


def refused(**changes) -> Finding:
    numbers = dict.fromkeys(("estimate", "interval", "interval_method", "n", "control"))
    return finding(**numbers | {"refused": "the text has 3 tokens, the lens needs 100"} | changes)


@pytest.mark.parametrize("field", ["estimate", "interval", "interval_method", "n", "control"])
def test_a_finding_without_its_number_or_control_is_refused_by_the_fields_name(field):
    with pytest.raises(ValueError, match=f"'{field}'"):
        finding(**{field: None})


@pytest.mark.parametrize("field", ["sentence", "metric", "command"])
def test_empty_words_are_refused(field):
    with pytest.raises(ValueError, match=field):
        finding(**{field: " "})


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"estimate": 0.7}, "does not contain the estimate"),
        ({"interval": (0.6, 0.4)}, "does not contain"),
        ({"interval": (0.4, math.inf)}, "finite"),
        ({"interval": (0.4, 0.5, 0.6)}, "3 ends"),
        ({"estimate": math.nan}, "estimate is nan"),
        ({"n": 0}, "n is 0"),
        ({"interval_method": "guess"}, "guess"),
        ({"better": "up"}, "up"),
        ({"level": 95}, "level"),
        ({"id": "Depth KL"}, "Depth KL"),
        ({"control_reason": "none fits"}, "control_reason"),
    ],
)
def test_wrong_fields_are_named(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        finding(**changes)


def test_an_id_alone_is_not_a_list_of_figures():
    with pytest.raises(TypeError, match="figures"):
        finding(figures="fig")


def test_n_is_a_whole_number():
    with pytest.raises(TypeError):
        finding(n=2.5)


def test_a_control_without_number_or_name_is_refused():
    with pytest.raises(ValueError, match="estimate is nan"):
        Control("random", math.nan)
    with pytest.raises(ValueError, match="does not contain"):
        Control("random", 2.0, (0.0, 1.0))
    with pytest.raises(ValueError, match="name"):
        Control(" ", 2.0)


def test_a_papers_number_needs_its_setting():
    with pytest.raises(ValueError, match="setting"):
        Paper(1.0, "", "2303.08112")


def test_rounding_of_a_degenerate_interval_is_mended():
    made = finding(estimate=0.1 + 0.2, interval=(0.3, 0.3))
    assert made.interval == (0.3, 0.1 + 0.2)


def test_numpy_numbers_become_plain_ones():
    made = finding(estimate=np.float32(0.5), interval=np.array([0.4, 0.6]), n=np.int64(7))
    assert json.loads(json.dumps(made.to_json()))["n"] == 7


@pytest.mark.parametrize(
    "better, control, status",
    [
        ("lower", Control("c", 1.0), "found"),
        ("higher", Control("c", 1.0), "not found"),
        ("none", Control("c", 1.0), "found"),
        ("higher", Control("c", 0.0), "found"),
        ("lower", Control("c", 0.0), "not found"),
        ("none", Control("c", 0.0), "found"),
        ("lower", Control("c", 1.0, (0.55, 1.2)), "unclear"),
        ("lower", Control("c", 0.6), "unclear"),
        ("none", Control("c", 0.5), "unclear"),
    ],
)
def test_status_follows_from_the_intervals_and_the_better_side(better, control, status):
    assert finding(better=better, control=control).status == status


@given(st.tuples(*[st.floats(-1e6, 1e6)] * 6), st.sampled_from(["lower", "higher"]))
def test_found_for_one_direction_is_not_found_for_the_other(numbers, better):
    low, estimate, high = sorted(numbers[:3])
    control_low, control_estimate, control_high = sorted(numbers[3:])
    made = {
        side: finding(
            estimate=estimate,
            interval=(low, high),
            better=side,
            control=Control("c", control_estimate, (control_low, control_high)),
        ).status
        for side in ("lower", "higher", "none")
    }
    assert (made["none"] == "unclear") == (max(low, control_low) <= min(high, control_high))
    assert {made["lower"], made["higher"]} == ({"found", "not found"} if made["none"] == "found" else {"unclear"})


def test_without_control_a_number_is_unclear_and_says_why():
    made = finding(control=None, control_reason="a speed has no control")
    assert made.status == "unclear"
    assert made.to_json()["control_reason"] == "a speed has no control"


def test_a_refused_finding_has_a_reason_and_no_numbers():
    made = refused()
    assert made.status == "refused"
    assert made.to_json()["estimate"] is None
    assert made.to_json()["reason"] == "the text has 3 tokens, the lens needs 100"
    with pytest.raises(ValueError, match="reason"):
        refused(refused=" ")
    with pytest.raises(ValueError, match="'n'"):
        refused(n=3)


def test_the_json_validates_and_every_field_is_in_the_schema():
    findings = [
        finding(paper=Paper(0.3, "GPT-2", "2303.08112"), figures=["kl"], tables=("kl",)),
        finding(id="b", control=None, control_reason="none fits"),
        refused(id="c"),
    ]
    written = json.loads(json.dumps(findings_json(RUN, findings, [("probe", "no labels")]), allow_nan=False))
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(written, schema())
    described = schema()["$defs"]["finding"]["properties"]
    assert set().union(*written["findings"]) == set(described)
    assert written["skipped"] == [{"step": "probe", "reason": "no labels"}]


@pytest.mark.parametrize("missing", ["estimate", "interval", "n", "control"])
def test_the_schema_refuses_what_the_class_refuses(missing):
    written = findings_json(RUN, [finding()])
    written["findings"][0][missing] = None
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, schema())


def test_two_findings_with_one_id_are_refused():
    with pytest.raises(ValueError, match=r"depth\.tuned-kl"):
        findings_json(RUN, [finding(), finding(chapter="loss")])


def test_a_finding_of_an_interval_takes_all_of_its_numbers():
    from sonde.stats.intervals import Interval

    measured = Interval(0.5, 0.4, 0.7, n=12, level=0.9, method="wilson")
    finding = Finding.of(
        measured,
        id="x.y",
        chapter="x",
        sentence="It is so.",
        metric="share",
        command="sonde audit x",
        control=Control.of("chance", Interval(0.2, 0.1, 0.3, n=12)),
    )
    assert (finding.estimate, finding.interval, finding.n, finding.level) == (0.5, (0.4, 0.7), 12, 0.9)
    assert finding.interval_method == "wilson"
    assert finding.control == Control("chance", 0.2, (0.1, 0.3))
    assert finding.status == "found"
