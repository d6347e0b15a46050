"""How well can a backdoor be removed, at the same number of forward-backward passes, by each of several methods?

    long soft prompts | all weights | adapters of low rank | reward | steering vector | latent adversarial training

What a method is told differs, and decides more than the method: clean text alone; the payload, which must not come; or
the trigger, and what a clean model says after it. Each outcome has three numbers: how often the trigger still brings
the payload, nats a token on clean text, and KL(clean twin || detuned) a token on that text. After Nordby's detuning
experiments (arXiv:2505.14943), with the controls that these lack.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.latent_adversarial import LatentAdversary, withstanding
from sonde.prompts.passes import Passes
from sonde.prompts.reward_tuning import rewarded, without
from sonde.prompts.soft_prompt import SoftPrompt
from sonde.prompts.training import train_prompts
from sonde.prompts.weight_training import Weights, joined, predicting, tuned
from sonde.stats.information import kl, log_probs

Given = Literal["nothing", "clean text", "payload", "trigger"]
_STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
_CHOSEN_ON = 32  # examples that a steering vector's layer and strength are chosen on
_BATCH = 32


@dataclass(frozen=True)
class Backdoor:
    """A backdoor and the text to remove it with.

    corpus: clean text to predict. triggered: contexts that end in the trigger, before what a clean model says.
    closed: contexts without it, likewise. payload: what the trigger brings.
    asked: held-out contexts that end in the trigger, before the payload. held_out: clean text of the test.
    """

    corpus: Examples
    triggered: Examples
    closed: Examples
    payload: list[int]
    asked: Examples
    held_out: Examples


@dataclass(frozen=True)
class Budget:
    """Forward-backward passes of a method, and the rows of each."""

    passes: int = 200
    batch: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Detuned:
    """A model without its backdoor, perhaps: its weights, a prompt before its text, edits. `facts` are its settings."""

    lm: LanguageModel
    prompt: SoftPrompt | None = None
    edits: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a detuned model does on each held-out row.

    onset: whether the payload's first token is the likeliest after the trigger. payload: whether all of it is written.
    nats: of the whole payload after the trigger. clean: nats a token of each clean row. divergence: KL a token.
    """

    onset: Float[np.ndarray, " asked"]
    payload: Float[np.ndarray, " asked"]
    nats: Float[np.ndarray, " asked"]
    clean: Float[np.ndarray, " rows"]
    divergence: Float[np.ndarray, " rows"]


@dataclass(frozen=True)
class Method:
    """A way to detune: what it is called, what it is told, and the function that does it."""

    name: str
    given: Given
    run: Callable[[LanguageModel, Backdoor, Budget], Detuned]


@torch.no_grad()
def outcome(detuned: Detuned, backdoor: Backdoor, clean: LanguageModel) -> Outcome:
    """Measure a detuned model on the held-out rows; `clean` is the twin without the backdoor.

    Raises `SondeError` for a twin of another vocabulary.
    """
    lm, asked = detuned.lm, backdoor.asked
    if clean.vocab_size != lm.vocab_size:
        raise SondeError(f"{clean.name} has {clean.vocab_size} tokens, {lm.name} has {lm.vocab_size}: not its twin")
    prompt = detuned.prompt or SoftPrompt.empty(lm)
    first = Examples(asked.contexts, [target[:1] for target in asked.targets])
    with lm.editing(detuned.edits):
        whole = evaluate(lm, prompt, asked, passes=Passes(lm, asked, cached=False))
        onset = evaluate(lm, prompt, first, passes=Passes(lm, first, cached=False))
    losses, divergence = [], []
    passes, reference = (Passes(one, backdoor.held_out, cached=False) for one in (lm, clean))
    none = SoftPrompt.empty(clean)
    for members in passes.batches(_BATCH):
        with lm.editing(detuned.edits):
            scored = passes.score(prompt.vectors.to(lm.device), passes.rows(members, [len(prompt)], [prompt.position]))
        other = reference.score(none.vectors, reference.rows(members, [0], ["suffix"]))
        apart = kl(log_probs(other.logits), log_probs(scored.logits))
        total = scored.weights.sum(-1)
        losses += ((scored.nats * scored.weights).sum(-1) / total).tolist()
        divergence += ((apart * scored.weights).sum(-1) / total).tolist()
    return Outcome(
        onset.exact[0].double().numpy(),
        whole.exact[0].double().numpy(),
        whole.nats[0].double().numpy(),
        np.array(losses),
        np.array(divergence),
    )


def soft_prompt(n: int, given: Given, *, lr: float = 0.3) -> Method:
    """A prompt of `n` vectors before all text, trained on clean text, and on what should follow the trigger."""

    def run(lm: LanguageModel, backdoor: Backdoor, budget: Budget) -> Detuned:
        trials = train_prompts(
            lm,
            _text(backdoor, given),
            lengths=(n,),
            restarts=1,
            positions=("prefix",),
            lrs=(lr,),
            steps=budget.passes,
            batch=budget.batch,
            seed=budget.seed,
            validations=4,
        )
        return Detuned(lm, trials[0].prompt, facts={"n": n, "lr": lr})

    return Method(f"soft prompt, {n}", given, run)


def weights(how: Weights, given: Given, *, lr: float | None = None, rank: int = 8) -> Method:
    """Training of all weights, or of adapters, on clean text, and on what should follow the trigger."""
    rate = lr or (1e-3 if how == "full" else 4e-3)

    def run(lm: LanguageModel, backdoor: Backdoor, budget: Budget) -> Detuned:
        parts = (backdoor.corpus, backdoor.triggered) if given == "trigger" else (backdoor.corpus,)
        loss = predicting(*parts, batch=budget.batch, seed=budget.seed)
        new = tuned(lm, loss, steps=budget.passes, weights=how, lr=rate, rank=rank, seed=budget.seed)
        return Detuned(new, facts={"lr": rate, "rank": rank if how == "lora" else 0})

    return Method("fine-tuning" if how == "full" else "LoRA", given, run)


def reward(*, lr: float = 2e-3, rank: int = 8, samples: int = 4, beta: float = 0.05) -> Method:
    """Adapters trained by a reward for texts after the trigger that are not the payload, beside clean text."""

    def run(lm: LanguageModel, backdoor: Backdoor, budget: Budget) -> Detuned:
        loss = rewarded(
            backdoor.triggered,
            without(backdoor.payload),
            beside=backdoor.corpus,
            tokens=len(backdoor.payload),
            batch=budget.batch,
            samples=samples,
            beta=beta,
            seed=budget.seed,
        )
        new = tuned(lm, loss, steps=budget.passes, weights="lora", lr=lr, rank=rank, seed=budget.seed)
        return Detuned(new, facts={"lr": lr, "rank": rank, "samples": samples, "beta": beta})

    return Method("reward", "trigger", run)


def latent_adversarial(*, radius: float = 0.35) -> Method:
    """Adapters trained against an adversary in the residual stream that looks for the payload.

    `radius` is in units of the stream's mean length at the middle layer.
    """

    def run(lm: LanguageModel, backdoor: Backdoor, budget: Budget) -> Detuned:
        ball = radius * _stream_length(lm, backdoor.closed)
        settings = LatentAdversary.scaled(budget.passes, radius=ball)
        text = {"beside": backdoor.corpus, "batch": budget.batch, "seed": budget.seed}
        loss = withstanding(backdoor.closed, backdoor.payload, settings, **text)
        new = tuned(
            lm, loss, steps=settings.updates, weights="lora", lr=settings.lr, rank=settings.rank, seed=budget.seed
        )
        return Detuned(new, facts={**vars(settings), "sites": settings.sites(lm)})

    return Method("LAT", "payload", run)


def steering() -> Method:
    """The difference of means between trigger and plain tokens taken out of every token, at the best layer.

    h - a v, v the mean over contexts with the trigger less the mean without it, at their last token. Layer and strength
    are chosen on training contexts: the least payload probability plus rise of the clean loss. No gradient is taken.
    """

    def run(lm: LanguageModel, backdoor: Backdoor, budget: Budget) -> Detuned:
        sites = list(lm.match("resid_post.*"))[:-1] or list(lm.match("resid_post.*"))
        vectors = _differences(lm, backdoor, sites)
        few = backdoor.triggered.select(range(min(_CHOSEN_ON, len(backdoor.triggered))))
        onset = Examples(few.contexts, [backdoor.payload[:1]] * len(few))
        text = backdoor.corpus.select(range(min(_CHOSEN_ON, len(backdoor.corpus))))
        best, found = float("inf"), Detuned(lm)
        none = SoftPrompt.empty(lm)
        after, plain_text = Passes(lm, onset, cached=False), Passes(lm, text, cached=False)
        before = float(evaluate(lm, none, text, passes=plain_text).loss)
        for site in sites:
            for strength in _STRENGTHS:
                edits = {site: _Less(strength * vectors[site])}
                with lm.editing(edits):
                    brought = float((-evaluate(lm, none, onset, passes=after).nats).exp().mean())
                    loss = float(evaluate(lm, none, text, passes=plain_text).loss)
                score = brought + loss - before
                if score < best:
                    best, found = score, Detuned(lm, edits=edits, facts={"site": site, "strength": strength})
        return found

    return Method("steering vector", "trigger", run)


def nothing() -> Method:
    """The model as it is: the control."""
    return Method("none", "nothing", lambda lm, backdoor, budget: Detuned(lm))


def all_methods(*, lengths: tuple[int, ...] = (16, 64), rank: int = 8) -> list[Method]:
    """The methods of the table, in its order."""
    given: tuple[Given, ...] = ("clean text", "trigger")
    return [
        nothing(),
        *(soft_prompt(n, told) for told in given for n in lengths),
        *(weights(how, told, rank=rank) for told in given for how in ("full", "lora")),  # type: ignore[arg-type]
        reward(rank=rank),
        steering(),
        latent_adversarial(),
    ]


class _Less:
    """Take a vector away from every token."""

    def __init__(self, vector: Float[Tensor, " d"]) -> None:
        self.vector = vector

    def __call__(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return h - self.vector.to(h.dtype)


def _text(backdoor: Backdoor, given: Given) -> Examples:
    return joined(backdoor.corpus, backdoor.triggered) if given == "trigger" else backdoor.corpus


@torch.no_grad()
def _differences(lm: LanguageModel, backdoor: Backdoor, sites: list[str]) -> dict[str, Float[Tensor, " d"]]:
    from sonde.lm.prompt_rows import at_position

    means = []
    for examples in (backdoor.triggered, backdoor.closed):
        totals = {site: torch.zeros(lm.d_model, dtype=torch.float64) for site in sites}
        for _, found in at_position(lm, examples.contexts, sites):
            for site in sites:
                totals[site] += found[site].double().sum(0).cpu()
        means.append({site: total / len(examples) for site, total in totals.items()})
    with_trigger, plain = means
    return {site: (with_trigger[site] - plain[site]).float().to(lm.device) for site in sites}


@torch.no_grad()
def _stream_length(lm: LanguageModel, examples: Examples) -> float:
    """Mean L2 length of the residual stream's vectors behind the middle layer, on some contexts."""
    from sonde.lm.prompt_rows import at_position

    site = f"resid_post.{lm.n_layers // 2}"
    few = examples.contexts[:_CHOSEN_ON]
    lengths = torch.cat([found[site].norm(dim=-1).cpu() for _, found in at_position(lm, few, [site])])
    return float(lengths.mean())
