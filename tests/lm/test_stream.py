import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny

from sonde.data.python_docs import topics
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import all_merge, feed, gather_states, stream
from sonde.organisms.small_lm import train_tokenizer
from sonde.stats.moments import Moments


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox", vocab_size=400), train_tokenizer(topics()[:20], 400), name="tiny")


@pytest.fixture
def batches(lm):
    return TokenBatches(None, lm.tokenizer, context=16, rows=3, limit_tokens=400)


class Seen:
    """Moments of one site, and the numbers of the batches they come from."""

    def __init__(self, site):
        self.sites = (site,)
        self.load({"moments": Moments(32).state(), "indices": []})

    def update(self, batch):
        self.moments.update(batch.acts[self.sites[0]], mask=batch.mask)
        self.indices.append(batch.index)

    def state(self):
        return {"moments": self.moments.state(), "indices": self.indices}

    def load(self, state):
        self.moments, self.indices = Moments.from_state(state["moments"]), list(state["indices"])

    def merge_state(self, state):
        self.moments.merge(Moments.from_state(state["moments"]))
        self.indices += state["indices"]


def counted(lm, monkeypatch):
    calls = []
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
    return calls


@pytest.mark.parametrize("join", [True, False])
def test_a_stream_gives_what_reading_each_batch_gives(lm, join):
    text = TokenBatches([text[:200] for text in topics()[:9]], lm.tokenizer, context=24, tokens_per_batch=96, join=join)
    patterns = ["resid_post.1:", "mlp_out.0", "logits"]
    streamed = list(lm.stream(text, sites=patterns))
    assert len(streamed) == len(text) > 1
    for got, batch in zip(streamed, text, strict=True):
        with torch.no_grad(), lm.reading(*patterns) as acts:
            lm(batch.tokens, batch.mask)
        assert got.acts.keys() == acts.keys() == set(lm.match(*patterns))
        assert all(torch.equal(got.acts[site], acts[site]) for site in acts)
        assert torch.equal(got.tokens, batch.tokens) and torch.equal(got.mask, batch.mask)
        assert torch.equal(got.documents, batch.documents) and torch.equal(got.n_bytes, batch.n_bytes)
        assert torch.equal(got.scored, batch.scored)


def test_what_stands_before_the_pads_does_not_depend_on_them(lm):
    texts = [text[: 60 + 10 * i] for i, text in enumerate(topics()[:6])]
    (padded,) = lm.stream(texts, sites=["resid_post.2"], context=128, rows=6, join=False)
    assert not padded.mask.all()
    for alone in lm.stream(texts, sites=["resid_post.2"], context=128, rows=1, join=False):
        row = padded.chunks.tolist().index(int(alone.chunks))
        real = padded.mask[row]
        torch.testing.assert_close(padded.acts["resid_post.2"][row][real], alone.acts["resid_post.2"][0])


def test_one_forward_pass_serves_all_consumers(lm, batches, monkeypatch):
    consumers = [Seen("resid_post.1"), Seen("mixer_out.0"), Seen("resid_post.1")]
    calls = counted(lm, monkeypatch)
    assert feed(lm, batches, consumers) == len(batches) == len(calls)
    for consumer in consumers:
        expected = Moments(32)
        for batch in stream(lm, batches, sites=consumer.sites):
            expected.update(batch.acts[consumer.sites[0]])
        assert torch.equal(consumer.moments.covariance, expected.covariance)
        assert consumer.indices == list(range(len(batches)))


def test_without_sites_the_model_does_not_run(lm, batches, monkeypatch):
    calls = counted(lm, monkeypatch)
    assert [batch.acts for batch in stream(lm, batches)] == [{}] * len(batches)
    assert not calls


def test_no_gradient_flows_through_the_model_and_consumers_may_use_theirs(lm, batches):
    class Trainer:
        sites = ("resid_post.0",)
        weight = torch.nn.Parameter(torch.eye(32))

        def update(self, batch):
            assert torch.is_grad_enabled() and not batch.acts["resid_post.0"].requires_grad
            (batch.acts["resid_post.0"] @ self.weight).square().sum().backward()

    feed(lm, batches, [Trainer()])
    assert Trainer.weight.grad is not None
    assert all(p.grad is None for p in lm.model.parameters())


def test_the_caller_may_use_the_model_between_batches(lm, batches):
    for batch in stream(lm, batches, sites=["resid_post.1"]):
        before = batch.acts["resid_post.1"].clone()
        assert lm(batch.tokens[:1]).logits is not None
        assert torch.equal(batch.acts["resid_post.1"], before)


def test_a_pass_that_was_interrupted_ends_with_the_same_numbers(lm, batches, tmp_path):
    whole = Seen("resid_post.1")
    feed(lm, batches, [whole])

    class Killed(Exception):
        pass

    def checkpoint(index):
        if index == 3:
            raise Killed
        save_bundle(tmp_path / "state", {"next": index + 1, "seen": part.state()})

    part = Seen("resid_post.1")
    with pytest.raises(Killed):
        feed(lm, batches, [part], after=checkpoint)
    saved = load_bundle(tmp_path / "state")
    assert saved["next"] == 3
    rest = Seen("resid_post.1")
    rest.load(saved["seen"])
    assert feed(lm, batches, [rest], start=saved["next"]) == len(batches) - 3
    assert rest.indices == whole.indices
    assert torch.equal(rest.moments.covariance, whole.moments.covariance)


def test_a_stream_starts_where_it_is_told(lm, batches):
    assert [batch.index for batch in stream(lm, batches, start=2)] == list(range(2, len(batches)))


def test_a_progress_bar_counts_the_batches_that_are_left(lm, batches, capsys):
    feed(lm, batches, [Seen("embed")], progress="reading", start=2)
    assert "reading: 100%" in (shown := capsys.readouterr().err) and f"{len(batches) - 2}/{len(batches) - 2}" in shown
    feed(lm, batches, [Seen("embed")])
    assert not capsys.readouterr().err


def test_text_is_laid_out_for_the_model_by_default(lm):
    assert next(lm.stream()).tokens.shape[1] == min(512, lm.context)
    assert next(lm.stream([topics()[0]], context=20, rows=2)).tokens.shape == (2, 20)


def test_what_cannot_work_is_refused_before_the_first_batch(lm, batches):
    with pytest.raises(SondeError, match=r"site 'resid_post.9' does not exist"):
        stream(lm, batches, sites=["resid_post.9"])
    with pytest.raises(SondeError, match="rows of 500 tokens are longer than tiny takes"):
        stream(lm, None, context=500)
    with pytest.raises(TypeError, match="have their layout already: context"):
        stream(lm, batches, context=16)
    with pytest.raises(SondeError, match="made without a tokenizer"):
        stream(LanguageModel(tiny("gpt2"), name="mute"), ["words"])
    with pytest.raises(SondeError, match="the tokenizer belongs to another model"):
        feed(LanguageModel(tiny("gpt2"), name="other"), batches, [])


def test_a_consumer_that_cannot_be_shared_is_refused_under_several_processes(lm, monkeypatch):
    class Lonely:
        sites = ("embed",)

        def update(self, batch):
            raise AssertionError

    monkeypatch.setitem(os.environ, "RANK", "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    batches = TokenBatches(None, lm.tokenizer, context=16, rows=3, limit_tokens=400)
    with pytest.raises(SondeError, match="Lonely cannot be fed by 2 processes"):
        feed(lm, batches, [Lonely()])


def test_alone_nothing_is_merged():
    moments = Moments(2).update(torch.randn(5, 2))
    assert all_merge(moments) is moments
    assert gather_states({"a": 1}) == [{"a": 1}]


TWO = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from families import tiny
from sonde.files import save_bundle
from sonde.lm.batches import TokenBatches, rank_and_world
from sonde.lm.model import LanguageModel
from sonde.lm.stream import all_merge, feed
from sonde.stats.moments import Moments
from test_stream import Seen
from transformers import PreTrainedTokenizerFast

out = Path(sys.argv[1])
tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
lm = LanguageModel(tiny("gpt_neox", vocab_size=400), tokenizer)
batches = TokenBatches(None, tokenizer, context=16, rows=3, limit_tokens=400)
rank, world = rank_and_world()
seen = Seen("resid_post.1")
fed = feed(lm, batches, [seen])
alone = Moments(4).update(torch.arange(8 * (rank + 1)).reshape(-1, 4))
tree = {"fed": fed, "world": world, "seen": seen.state(), "merged": all_merge(alone).state(), "hash": batches.hash}
save_bundle(out / f"{rank}.bundle", tree)
torch.distributed.destroy_process_group()
"""


def test_two_processes_end_with_what_one_process_finds(lm, batches, tmp_path):
    lm.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "two.py").write_text(TWO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parents[1] / "src")))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port"]
    subprocess.run(
        [sys.executable, *command, str(port), str(tmp_path / "two.py"), str(tmp_path)],
        check=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    alone = Seen("resid_post.1")
    feed(lm, batches, [alone])
    first, second = (load_bundle(tmp_path / f"{rank}.bundle") for rank in range(2))
    assert first["hash"] == second["hash"] == batches.hash
    assert first["fed"] + second["fed"] == len(batches) and first["world"] == 2
    assert first["seen"]["indices"] == second["seen"]["indices"] == [*alone.indices[::2], *alone.indices[1::2]]
    for name in ("mean", "scatter"):
        assert torch.equal(first["seen"]["moments"][name], second["seen"]["moments"][name])
        assert torch.equal(first["merged"][name], second["merged"][name])
        torch.testing.assert_close(first["seen"]["moments"][name], alone.state()["moments"][name], rtol=1e-9, atol=1e-9)
    assert first["seen"]["moments"]["n"] == alone.moments.n == batches.n_chunks * 16
    expected = Moments(4).update(torch.arange(8).reshape(-1, 4)).update(torch.arange(16).reshape(-1, 4))
    torch.testing.assert_close(first["merged"]["scatter"], expected.state()["scatter"])
