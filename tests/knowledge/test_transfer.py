"""Transfer on planted states: what is known at the middle layer, said at the last, and what may not be asked."""

import numpy as np
import pytest
import torch

from sonde.data.quirky import Quirk, quirky_sets
from sonde.data.quirky_templates import Template
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.knowledge.agreement import agreement, calibration_error
from sonde.knowledge.samples import Sample, subsets
from sonde.knowledge.states import States
from sonde.knowledge.tables import Undefined
from sonde.knowledge.transfer import (
    Transfers,
    pooled_auroc,
    pooled_gap,
    random_aurocs,
    shuffled_aurocs,
    transfer,
)
from sonde.stats.intervals import Interval

LAYERS, D = 4, 12
SIDES = ("A", "B", "AE", "AH", "BE", "BH", "all")


def sets(difficulty=lambda row: row["d"]):
    quirk = Quirk(
        "planted",
        truth=lambda row: row["t"],
        rule=lambda row: row["b"],
        difficulty=difficulty,
        templates=(Template("{character} {d}?", (" no", " yes")),),
    )
    rng = np.random.default_rng(0)
    rows = [{"t": bool(t), "b": bool(b), "d": i} for i, (t, b) in enumerate(rng.integers(2, size=(2000, 2)))]
    return quirky_sets(quirk, source=rows, seed=0)


def planted(records, seed=0, *, layers=LAYERS, d=D) -> States:
    """Layer 0 noise; from layer 1 on the truth along one axis; at the last layer only what the character is told."""
    rng = np.random.default_rng(seed)
    last = rng.standard_normal((len(records), layers, d))
    last[:, 1:-1, 0] += 4 * records.truth[:, None]
    last[:, -1, 1] += 6 * records.label
    last[:, :, 2] += 3 * records.alice[:, None]
    pair = np.stack([last - 0.1, last + 0.1], 2)
    said = torch.from_numpy(records.label * 2.0 - 1).float()
    names = tuple(f"resid_post.{i}" for i in range(layers))
    return States(torch.from_numpy(last).float(), torch.from_numpy(pair).float(), said, names)


@pytest.fixture(scope="module")
def splits():
    return sets()


@pytest.fixture(scope="module")
def samples(splits):
    made = [
        subsets(planted(records, seed), records)
        for seed, records in enumerate((splits.validation, splits.train, splits.test))
    ]
    assert not made[0].missing
    return [one.samples for one in made]


@pytest.fixture(scope="module")
def found(samples):
    train, held, test = samples
    return transfer(train, test, held=held, probes=("logr", "diff-in-means"))


def test_the_subsets_are_those_of_character_and_difficulty(samples, splits):
    test = samples[2]
    assert tuple(test) == ("all", *SIDES[:-1])
    assert len(test["A"]) == len(test["B"]) == len(splits.test) / 2
    assert set(test["AE"].bases) <= set(test["A"].bases)
    assert not set(test["AE"].bases) & set(test["AH"].bases)
    assert abs(len(test["AH"]) / len(test["A"]) - 0.25) < 0.08


def test_the_truth_is_read_where_it_is_known_and_what_is_said_where_it_is_said(found):
    assert found.cell("logr", "A", "B").layer == 1
    assert found.auroc("logr", "A", "B").low > 0.97
    assert abs(found.auroc("logr", "A", "B", layer=-1).estimate - 0.5) < 0.1
    assert found.auroc("logr", "A", "B", rows="disagreements").low > 0.97
    assert found.auroc("logr", "A", "B", layer=-1, rows="disagreements").high < 0.03
    assert found.auroc("logr", "A", "A", layer=-1).low > 0.97
    curve = [one.estimate for one in found.by_layer("logr", "A", "B")]
    assert abs(curve[0] - 0.5) < 0.1 and min(curve[1:3]) > 0.97


def test_all_of_the_gap_is_recovered_and_bounds_are_what_they_are(found):
    gap = found.gap("logr", "A", "B")
    assert 0.95 < gap.estimate < 1.1 and gap.contains(gap.estimate)
    probe, floor, ceiling = found.gap_rows("logr", "A", "B")
    assert len(floor.truth) == len(probe.truth) and len(ceiling.truth) == len(probe.truth)
    hard = found.gap_rows("logr", "AE", "BH")
    assert {len(one.truth) for one in hard} == {len(found.targets["BH"].truth)}


def test_several_models_are_averaged_and_one_is_itself(found):
    assert pooled_auroc([found, found], "logr", "A", "B").estimate == found.auroc("logr", "A", "B").estimate
    assert pooled_gap([found, found], "logr", "A", "B").estimate == pytest.approx(found.gap("logr", "A", "B").estimate)


def test_tables_hold_every_probe_and_every_transfer(found):
    table, matrix = found.table("A", "B"), found.matrix("logr")
    assert [row[0] for row in table.rows] == ["logr", "diff-in-means"]
    assert all(isinstance(row[2], Interval) and row[-1] == "known" for row in table.rows)
    assert {row[0] for row in matrix.rows} == set(SIDES) == set(matrix.columns[1:])


def test_everything_comes_back_from_a_file(found, tmp_path):
    save_bundle(tmp_path / "transfers", found.state())
    back = Transfers.from_state(load_bundle(tmp_path / "transfers"))
    assert back.gap("logr", "A", "B") == found.gap("logr", "A", "B")
    assert back.auroc("logr", "AE", "BH", rows="disagreements") == found.auroc("logr", "AE", "BH", rows="disagreements")


def test_random_directions_and_shuffled_labels_read_nothing(samples):
    train, _, test = samples
    random = random_aurocs(train["A"], test["B"], draws=64)
    assert random.shape == (64, LAYERS)
    assert abs(random[:, 0].mean() - 0.5) < 0.05
    assert 0.5 < random[:, 1].mean() < 0.95  # its sign is known, and one axis of twelve is the truth
    shuffled = shuffled_aurocs("logr", train["A"], test["B"], draws=4)
    assert abs(shuffled.mean() - 0.5) < 0.12


def test_an_unsupervised_probe_has_its_sign_from_trusted_labels_or_none(samples):
    train, held, test = ({"all": one["all"], "A": one["A"]} for one in samples)
    without = transfer({"all": train["all"]}, test, held=held, probes=("crc",))
    assert not without.cell("crc", "all", "A").sign_known
    assert without.table("all", "A").rows[0][-1] == "sign unknown"
    trusted = transfer(train, test, held=held, probes=("crc",), trusted="A")
    assert trusted.cell("crc", "all", "A").sign_known


def test_rows_of_one_class_have_no_auroc_and_say_why(samples):
    train, held, test = samples
    ones = test["B"].take(test["B"].truth, name="B")
    found = transfer({"A": train["A"]}, {"B": ones}, held=held, probes=("logr",))
    undefined = found.auroc("logr", "A", "B")
    assert isinstance(undefined, Undefined) and f"all {len(ones)} rows are True" in undefined.reason
    assert isinstance(found.gap("logr", "A", "B"), Undefined)
    alike = test["B"].take(test["B"].truth == test["B"].untrusted)
    found = transfer({"A": train["A"]}, {"B": alike}, held=held, probes=("logr",))
    assert "B has no disagreements" in found.auroc("logr", "A", "B", rows="disagreements").reason
    one_label = train["A"].take(train["A"].truth)
    found = transfer({"A": one_label, "B": train["B"]}, test, held=held, probes=("logr",))
    assert "rows of A have one label" in found.auroc("logr", "A", "B").reason
    with pytest.raises(SondeError, match="rows of A have one label"):
        found.cell("logr", "A", "B")


def test_base_rows_that_are_trained_on_are_not_tested_on(samples):
    train, held, _ = samples
    with pytest.raises(SondeError, match="base rows of all are among those trained on in A"):
        transfer({"A": train["A"]}, {"all": train["all"]}, held=held)
    with pytest.raises(SondeError, match="base rows of A are among those trained on in A"):
        transfer({"A": train["A"]}, held, held={"A": train["A"]})


def test_other_layers_and_widths_are_refused(samples, splits):
    train, held, _ = samples
    for other, message in (({"layers": 3}, "layers"), ({"d": 8}, "width")):
        test = {"all": Sample.of(planted(splits.test, **other), splits.test)}
        with pytest.raises(SondeError, match=message):
            transfer({"A": train["A"]}, test, held=held, probes=("logr",))


def test_a_training_sample_needs_held_out_rows(samples):
    with pytest.raises(SondeError, match="no held-out rows of A"):
        transfer({"A": samples[0]["A"]}, {"B": samples[2]["B"]})


def test_equal_difficulty_leaves_easy_and_hard_undefined():
    records = sets(difficulty=lambda row: 1.0).test
    found = subsets(planted(records), records)
    assert set(found.samples) == {"all", "A", "B"}
    assert found.missing["AE"] == "easy and hard are undefined: all rows of planted are equally difficult"


def test_samples_check_their_lengths(splits):
    states = planted(splits.test)
    with pytest.raises(SondeError, match="states and 3 values of truth"):
        Sample("x", states, np.ones(3, dtype=bool), splits.test.rows)
    with pytest.raises(SondeError, match=r"states of \d+ records"):
        subsets(states, splits.train)
    with pytest.raises(SondeError, match="x has no rows"):
        Sample("x", states[:0], np.ones(0, dtype=bool), np.ones(0))


def test_agreement_is_one_of_a_probe_with_itself_and_a_half_with_noise():
    rng = np.random.default_rng(0)
    one, noise = rng.standard_normal((2, 2000))
    found = agreement({"one": one, "twice": 2 * one, "noise": noise}, np.arange(2000) // 2)
    same, chance, _ = found
    assert (same.same.estimate, same.correlation) == (1, pytest.approx(1))
    assert chance.same.contains(0.5) and abs(chance.correlation) < 0.06 and chance.same.n == 1000
    with pytest.raises(SondeError, match="two probes or more: given one"):
        agreement({"one": one}, np.arange(2000))
    with pytest.raises(SondeError, match="probes of 2000, 3 and 2000 base rows"):
        agreement({"one": one, "two": one[:3]}, np.arange(2000))


def test_log_odds_that_come_true_are_calibrated_and_doubled_ones_are_not():
    rng = np.random.default_rng(0)
    log_odds = rng.standard_normal(4000) * 1.5
    truth = rng.random(4000) < 1 / (1 + np.exp(-log_odds))
    bases = np.arange(4000)
    assert calibration_error(log_odds, truth, bases, draws=20).estimate < 0.03
    assert calibration_error(3 * log_odds, truth, bases, draws=20).low > 0.1


def test_held_out_rows_put_a_probe_on_the_scale_of_log_odds(found):
    cell = found.cell("diff-in-means", "A", "A")
    target = found.targets["A"]
    assert calibration_error(cell.log_odds[:, 1], target.truth, target.bases, draws=20).estimate < 0.06
