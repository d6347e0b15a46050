"""Prompts spliced into rows: rows of E are the hard prompt, in every family, at every place, beside any other row."""

from dataclasses import replace

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.generation import generate
from sonde.prompts.passes import Passes, Rows, pieces
from sonde.prompts.soft_prompt import Position, SoftPrompt, embedded, embedding_rms

HARD = [11, 50, 7]
POSITIONS = ("prefix", "suffix", 2, "random", "slot")


def ragged(*, same: bool = False) -> Examples:
    """Contexts and targets of different lengths (or contexts of one)."""
    ids = families.tokens(3, 14, seed=1).tolist()
    a, b, c = (6, 6, 6) if same else (5, 8, 3)
    contexts = [ids[0][:a], ids[1][:b], ids[2][:c]]
    return Examples(contexts, [ids[0][a : a + 3], ids[1][b : b + 1], ids[2][c : c + 4]], slots=[1, 3, 2])


def worst_difference(lm: LanguageModel, passes: Passes, rows: Rows, hard: list[int]) -> float:
    """Between the spliced rows' logits and those of one unpadded pass over each row's tokens."""
    with torch.no_grad():
        scored = passes.score(embedded(lm, torch.tensor(hard, dtype=torch.long)), rows)
    worst = 0.0
    for i in range(len(rows)):
        example = rows.batch[int(rows.member[i])]
        context, place = passes.examples.contexts[example], int(rows.place[i])
        target = passes.examples.targets[example]
        row = [*context[:place], *hard[: int(rows.n[i])], *context[place:], *target]
        logits = lm(torch.tensor([row])).logits
        assert logits is not None
        true = logits[0, -len(target) - 1 : -1]
        worst = max(worst, float((scored.logits[i, : len(target)] - true).abs().max()))
        assert scored.labels[i, : len(target)].tolist() == target
        assert [row[column] for column in scored.columns[i, : len(target)].tolist()] == target
    return worst


@pytest.mark.parametrize("family", families.FAMILIES)
def test_rows_of_the_embedding_give_the_hard_prompts_logits(family: str) -> None:
    lm = families.model(family)
    passes = Passes(lm, ragged(), cached=False)
    rows = passes.rows([0, 1, 2], [3, 3, 3, 3, 3, 1, 0], [*POSITIONS, "suffix", "suffix"], offsets=[0] * 7)
    assert worst_difference(lm, passes, rows, HARD) < 1e-5


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_is_kept_of_the_contexts_changes_neither_logits_nor_gradients(family: str) -> None:
    lm = families.model(family)
    passes = Passes(lm, ragged(same=family in ("rwkv", "recurrent_gemma", "xlstm")))
    if not passes.keeps("suffix"):
        pytest.skip(f"{family} has no gradient through its cache")
    for position in ("suffix", 2, "slot"):
        rows = passes.rows([0, 1, 2], [3, 3], [position, position], offsets=[0, 0])
        assert rows.fixed == position
        assert worst_difference(lm, passes, rows, HARD) < 2e-5
        bank = embedded(lm, torch.tensor(HARD)).requires_grad_()
        kept, whole = (
            torch.autograd.grad((scored.nats * scored.weights).sum(), bank)[0]
            for scored in (passes.score(bank, each) for each in (rows, replace(rows, fixed=None)))
        )
        torch.testing.assert_close(kept, whole, atol=1e-4 * float(whole.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_generation_under_rows_of_the_embedding_is_that_of_the_hard_prompt(family: str) -> None:
    lm = families.model(family)
    examples = ragged()
    prompt = SoftPrompt.from_tokens(lm, HARD, 2)
    found = generate(lm, prompt, examples.contexts, max_new_tokens=4)
    hard = [[*context[:2], *HARD, *context[2:]] for context in examples.contexts]
    assert found == [lm.generate([row], max_new_tokens=4)[0] for row in hard]


def test_no_prompt_is_the_plain_loss() -> None:
    lm, examples = families.model("gpt_neox"), ragged()
    found = evaluate(lm, SoftPrompt.empty(lm), examples)
    for i, (context, target) in enumerate(zip(examples.contexts, examples.targets, strict=True)):
        logits = lm(torch.tensor([context + target])).logits
        assert logits is not None
        logp = logits[0, len(context) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(found.nats[0, i], -logp.gather(-1, torch.tensor(target)[:, None]).sum())


def test_exact_success_is_greedy_generation_of_the_target() -> None:
    lm, contexts = families.model("gpt_neox"), ragged().contexts
    prompts = [SoftPrompt.from_tokens(lm, HARD, position) for position in ("suffix", "prefix")]
    written = generate(lm, prompts[0], contexts, max_new_tokens=3)
    found = evaluate(lm, prompts, Examples(contexts, written))
    assert found.exact[0].all() and not found.exact[1].all()
    assert found.success.tolist() == [1.0, found.exact[1].float().mean()]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 9))
def test_a_row_does_not_depend_on_the_rows_beside_it(lengths: list[int], seed: int) -> None:
    lm = families.model("llama")
    passes = Passes(lm, ragged(), cached=False)
    bank = embedded(lm, families.tokens(1, 20, seed=seed)[0])
    anywhere: list[Position] = ["random"] * len(lengths)
    rows = passes.rows([2, 0, 1], lengths, anywhere, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        together = passes.score(bank, rows).nats
        for i in range(len(rows)):
            alone = passes.score(bank, rows.select(slice(i, i + 1))).nats
            torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)


def test_parts_hold_every_row_once_and_keep_samples_side_by_side() -> None:
    lm = LanguageModel(families.tiny("llama", max_position_embeddings=4096))
    examples = Examples([[3] * n for n in (5, 900, 40, 2000)], [[4, 5]] * 4)
    rows = Passes(lm, examples).rows(range(4), [1, 8], ["prefix", "suffix"]).repeat(3)
    parts = list(pieces(rows, lm))
    assert len(parts) > 1
    seen = [(int(o), int(m)) for part in parts for o, m in zip(part.owner, part.member, strict=True)]
    assert sorted(seen) == sorted((o, m) for o in range(2) for m in range(4) for _ in range(3))
    assert all(len(set(seen[i : i + 3])) == 1 for i in range(0, len(seen), 3))


def test_random_places_stay_four_tokens_before_the_end_of_the_context() -> None:
    passes = Passes(families.model(), ragged())
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([passes.rows([0, 1, 2], [2], ["random"], generator=generator).place for _ in range(200)])
    assert places.amax(0).tolist() == [1, 4, 0] and places.amin(0).tolist() == [0, 0, 0]


def test_prompts_stay_in_float32_beside_half_precision_weights() -> None:
    model = families.tiny("llama")
    model.bfloat16()
    lm = LanguageModel(model)
    passes = Passes(lm, ragged())
    bank = embedded(lm, torch.tensor(HARD)).requires_grad_()
    scored = passes.score(bank, passes.rows([0, 1, 2], [3], ["suffix"]))
    (gradient,) = torch.autograd.grad(scored.nats.sum(), bank)
    assert bank.dtype == gradient.dtype == scored.nats.dtype == torch.float32 and bool(gradient.any())


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "granite"])
def test_the_unit_of_sizes_is_that_of_what_the_embedding_gives_out(family: str) -> None:
    lm = families.model(family)
    rows = embedded(lm, torch.arange(families.VOCAB))
    assert embedding_rms(lm) == pytest.approx(rows.square().mean().sqrt().item())
    nearest = SoftPrompt(rows[[20, 40]]).nearest_tokens(lm, 3)
    assert [row[0][0] for row in nearest] == [20, 40]
    far = SoftPrompt(rows[[20, 40]]).nearest_tokens(lm, 3, metric="euclidean")
    assert [row[0][0] for row in far] == [20, 40] and far[0][0][1] == pytest.approx(0, abs=1e-2)


def test_too_long_a_row_gives_the_three_numbers() -> None:
    lm = families.model("llama")
    passes = Passes(lm, Examples([[3] * 100], [[4] * 20]))
    with pytest.raises(SondeError, match=r"prompt of 16 and 120 tokens of text are 136, more than the 128 positions"):
        passes.rows([0], [16], ["suffix"])
    with pytest.raises(SondeError, match=r"102 and 30 new tokens are 132, more than the 128 positions"):
        generate(lm, SoftPrompt.from_tokens(lm, [5, 6]), [[3] * 100], max_new_tokens=30)


def test_a_model_that_reads_token_ids_beside_its_embedding_is_refused_by_its_class() -> None:
    model = families.tiny("llama")
    embedding = model.get_input_embeddings()
    plain = type(model.model.layers[0]).forward

    def forward(self, hidden_states, *args, **kwargs):
        return plain(self, hidden_states + 0.1 * ids[-1][..., None], *args, **kwargs)

    ids: list[torch.Tensor] = []
    embedding.register_forward_pre_hook(lambda module, args: ids.append(args[0].float()))
    layer = model.model.layers[0]
    layer.forward = forward.__get__(layer)
    lm = LanguageModel(model, name="reader")
    with pytest.raises(
        SondeError, match=r"LlamaForCausalLM cannot take vectors in the place of tokens, as by inputs_embeds"
    ):
        Passes(lm, ragged())


def test_places_that_do_not_exist_are_refused() -> None:
    examples = ragged()
    passes = Passes(families.model(), replace(examples, slots=None))
    with pytest.raises(SondeError, match=r"index 5 is outside a context of 3 tokens"):
        passes.rows([0, 1, 2], [1], [5])
    with pytest.raises(SondeError, match="position 'slot' needs examples that say where"):
        passes.rows([0], [1], ["slot"])
    with pytest.raises(SondeError, match="'middle' is no position"):
        SoftPrompt(torch.zeros(1, 32), "middle")  # type: ignore[arg-type]
    with pytest.raises(SondeError, match="width 64, llama wants 32"):
        evaluate(families.model(), SoftPrompt(torch.zeros(1, 64)), examples)
