"""Which tokens become rows, in what order, and that an order that was interrupted goes on to the bit."""

from collections import Counter

import pytest
import torch
from families import tiny

from sonde.data.python_docs import topics
from sonde.errors import SondeError
from sonde.features import activation_buffer
from sonde.features.activation_buffer import Order
from sonde.features.activation_rows import Passes, Selection, matched, rows_of, selected
from sonde.files import load_bundle, save_bundle
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch
from sonde.organisms.small_lm import train_tokenizer

SITES = ("resid_post.0", "mlp_out.1")


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox", vocab_size=400), train_tokenizer(topics()[:20], 400), name="tiny")


@pytest.fixture(scope="module")
def batches(lm):
    return TokenBatches(None, lm.tokenizer, context=16, rows=6, limit_tokens=2000)


@pytest.fixture(scope="module")
def every_row(lm, batches):
    passes = Passes(lm, batches, SITES)
    parts = []
    while (rows := passes.next_rows()) is not None:
        parts.append(rows)
    return {site: torch.cat([part[site] for part in parts]) for site in SITES}


def drained(source):
    taken = []
    while (rows := source.take()) is not None:
        taken.append(rows)
    return taken


def joined(taken, site):
    return torch.cat([rows[site] for rows in taken])


def orders(tmp_path):
    return {
        "direct": Order("direct", batch=70),
        "buffer": Order("buffer", batch=70, size=300),
        "disk": Order("disk", batch=70, folder=tmp_path / "rows", epochs=2),
    }


def test_pads_opening_tokens_and_listed_tokens_are_left_out(lm):
    bos = lm.tokenizer.bos_token_id
    tokens = torch.tensor([[bos, 5, 6, 7], [5, 9, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    none = torch.zeros(2, dtype=torch.long)
    batch = Batch(tokens, mask, 0, none, none, none, acts={"embed": torch.arange(8.0).reshape(2, 4, 1)})
    selection = Selection(skip=(6,))
    assert rows_of(batch, ["embed"], selection, selection.ids(lm))["embed"].flatten().tolist() == [1, 3, 4, 5]
    kept = Selection(keep_opening=True)
    assert rows_of(batch, ["embed"], kept, kept.ids(lm))["embed"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_huge_row_at_one_site_is_left_out_at_all_sites(lm):
    acts = {"embed": torch.ones(1, 9, 4), "resid_post.0": torch.ones(1, 9, 4)}
    acts["embed"][0, 3] *= 11
    acts["resid_post.0"][0, 5] *= 9
    none = torch.zeros(1, dtype=torch.long)
    tokens = torch.full((1, 9), 7)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), 0, none, none, none, acts=acts)
    selection = Selection(outliers=10)
    rows, taken = selected(batch, list(acts), selection, selection.ids(lm))
    assert taken[0].tolist() == [True] * 3 + [False] + [True] * 5
    assert [len(part) for part in rows.values()] == [8, 8]
    assert rows["embed"].max() == 1 and rows["resid_post.0"].max() == 9


def test_the_rows_are_the_activations_of_the_tokens_in_order(lm, batches, every_row):
    with torch.no_grad(), lm.reading(*SITES) as acts:
        lm(batches[1].tokens)
    bos = int((batches[0].tokens == lm.tokenizer.bos_token_id).sum())
    start = batches[0].tokens.numel() - bos
    real = (batches[1].tokens != lm.tokenizer.bos_token_id).flatten()
    for site in SITES:
        expected = acts[site].flatten(0, 1)[real]
        torch.testing.assert_close(every_row[site][start : start + len(expected)], expected)


def test_direct_gives_the_text_in_its_order(lm, batches, every_row):
    taken = drained(Order("direct", batch=70).source(lm, batches, SITES))
    n = len(every_row[SITES[0]]) // 70 * 70
    for site in SITES:
        assert torch.equal(joined(taken, site), every_row[site][:n])


@pytest.mark.parametrize("mode", ["buffer", "disk"])
def test_mixing_gives_every_row_once_and_keeps_sites_aligned(lm, batches, every_row, mode, tmp_path):
    taken = drained(orders(tmp_path)[mode].source(lm, batches, SITES))
    n = len(every_row[SITES[0]])
    epochs = 2 if mode == "disk" else 1
    assert sum(len(rows[SITES[0]]) for rows in taken) == epochs * (n // 70 * 70)
    # tokens after the same prefix have the same row, at every site
    index = {tuple(row): i for i, row in enumerate(every_row[SITES[0]].tolist())}
    first = [tuple(row) for row in joined(taken[: n // 70], SITES[0]).tolist()]
    assert Counter(first) <= Counter(map(tuple, every_row[SITES[0]].tolist()))
    where = [index[row] for row in first]
    assert torch.equal(joined(taken[: n // 70], SITES[1]), every_row[SITES[1]][where])
    moved = torch.tensor([abs(a - b) for a, b in zip(where, range(len(where)), strict=True)])
    assert moved.float().mean() > 50
    if mode == "disk":
        assert not torch.equal(taken[0][SITES[0]], taken[len(taken) // 2][SITES[0]])


@pytest.mark.parametrize("mode", ["direct", "buffer", "disk"])
@pytest.mark.parametrize("stop", [0, 1, 4, 17])
def test_a_source_that_was_saved_goes_on_to_the_bit(lm, batches, mode, stop, tmp_path):
    order = orders(tmp_path)[mode]
    whole = drained(order.source(lm, batches, SITES))
    first = order.source(lm, batches, SITES)
    for _ in range(stop):
        first.take()
    save_bundle(tmp_path / "state", first.state())
    second = order.source(lm, batches, SITES)
    second.load(load_bundle(tmp_path / "state"))
    rest = drained(second)
    assert len(rest) == len(whole) - stop
    for ours, theirs in zip(rest, whole[stop:], strict=True):
        assert all(torch.equal(ours[site], theirs[site]) for site in SITES)


def test_an_interrupted_disk_cache_ends_with_the_same_files(lm, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_buffer, "_SHARD_BYTES", 60_000)
    drained(Order("disk", batch=70, folder=tmp_path / "whole").source(lm, batches, SITES))
    after = Passes.next_rows
    for stop in (3, 2, 8):
        calls = iter(range(stop))

        def killed(self, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return after(self)

        monkeypatch.setattr(Passes, "next_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            Order("disk", batch=70, folder=tmp_path / "cut").source(lm, batches, SITES)
    monkeypatch.setattr(Passes, "next_rows", after)
    drained(Order("disk", batch=70, folder=tmp_path / "cut").source(lm, batches, SITES))
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) > 3 and names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_disk_cache_of_another_selection_is_refused(lm, batches, tmp_path):
    order = Order("disk", batch=70, folder=tmp_path)
    order.source(lm, batches, SITES)
    with pytest.raises(SondeError, match="another model, text, sites or selection"):
        order.source(lm, batches, SITES, Selection(skip=(5,)))


def test_activations_that_are_not_finite_name_site_batch_and_token(lm, batches):
    acts = {"embed": torch.ones(6, 16, 4)}
    acts["embed"][2, 3, 1] = torch.nan
    batch = batches[1]
    bad = Batch(batch.tokens, batch.mask, 1, batch.documents, batch.chunks, batch.n_bytes, acts=acts)
    token = int(batch.tokens[2, 3])
    with pytest.raises(SondeError, match=rf"embed holds nan .* batch 1, row 2, position 3 \(token {token}\)"):
        rows_of(bad, ["embed"], Selection(), torch.zeros(0, dtype=torch.long))


def test_sites_without_one_vector_a_token_are_refused(lm, batches):
    batch = batches[0]
    flat = Batch(
        batch.tokens, batch.mask, 0, batch.documents, batch.chunks, batch.n_bytes, acts={"embed": torch.ones(6, 4)}
    )
    with pytest.raises(SondeError, match=r"embed gives \(6, 4\)"):
        rows_of(flat, ["embed"], Selection(), torch.zeros(0, dtype=torch.long))
    with pytest.raises(SondeError, match="is a memory"):
        matched(lm, "state.0")


def test_a_pattern_without_a_site_lists_the_nearest_names(lm):
    with pytest.raises(SondeError, match=r"'resid_pots.1' does not exist.*nearest: resid_post.1"):
        matched(lm, "resid_pots.1")


def test_a_text_of_left_out_tokens_is_an_error(lm):
    batches = TokenBatches(["a" * 64], lm.tokenizer, context=4, rows=2)
    skip = tuple(set(torch.cat([batch.tokens.flatten() for batch in batches]).tolist()))
    with pytest.raises(SondeError, match=r"every token of .* is left out"):
        Order("direct", batch=4).source(lm, batches, SITES, Selection(skip=skip)).take()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "ram"}, "direct, buffer or disk"),
        ({"mode": "buffer", "batch": 64, "size": 63}, "a buffer of 63 rows is smaller than a batch of 64"),
        ({"mode": "disk"}, "takes a folder"),
        ({"batch": 1}, "2 or more"),
        ({"epochs": 0}, "1 or more"),
    ],
)
def test_orders_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(SondeError, match=message):
        Order(**wrong)


def test_selections_that_mean_nothing_are_refused(lm):
    with pytest.raises(SondeError, match="above 1"):
        Selection(outliers=0.5)
    with pytest.raises(SondeError, match="cannot be skipped"):
        Selection(skip=(400,)).ids(lm)
