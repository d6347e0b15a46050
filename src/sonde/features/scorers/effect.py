"""Intervention: does what a latent makes a model write fit an explanation better than what the model writes anyway?

The latent is added to with the strength at which the next token's mean KL from the clean model is what was asked for.
Someone who sees which tokens that makes likelier after ten prompts explains it several times; these and the explanation
of where the latent fires compete on one half of other prompts, and the gain in log p(explanation | text), in nats, is
reported on the other half. The control is a random direction of the same length, its strength chosen in the same way,
with the same explanations. After Paulo et al. 2024, arXiv:2410.13928, who report the best on the test prompts.
"""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.features import questions
from sonde.features.cases import Subject
from sonde.features.intervention import (
    FewShotLikelihood,
    Intervention,
    NextTokens,
    adding,
    continued,
    effect_score,
    find_strength,
    firing_prompts,
    increases,
)  # fmt: skip
from sonde.features.latent_cache import LatentCache
from sonde.features.scorers.measures import Measure
from sonde.features.scorers.scorer import Scored, alone
from sonde.lm.asking.client import Client
from sonde.lm.asking.completion import Completion, Params, Unanswered
from sonde.lm.model import LanguageModel
from sonde.stats.intervals import bootstrap_mean

SHOTS = (
    ("He put the kettle on and reached for the tin of leaves.", "making tea"),
    ("The index rose by two points before the close.", "share prices"),
    ("for i in range(10):\n    print(i)", "Python code"),
)
_LEAST = 6


@dataclass(frozen=True)
class Effect:
    """Scores explanations by what adding to latents makes `lm` write.

    writes: by hookpoint, where its latents write and the vector that each adds there. cache: of the same hookpoints.
    target: KL in nats. prompts: for the score, half of them to choose the explanation. shown: prompts for the
    explainer. samples: explanations asked for. tokens: of a continuation.
    """

    lm: LanguageModel
    writes: Mapping[str, tuple[str, Float[Tensor, "latents d"]]]
    cache: LatentCache
    target: float = 0.33
    prompts: int = 32
    shown: int = 10
    samples: int = 5
    tokens: int = 8
    seed: int = 0
    name: str = "intervention"
    explained: bool = True
    logprobs: bool = False

    async def score(self, subject: Subject, explanation: str, client: Client) -> Scored:
        """Find the strength, ask for explanations of the effect, and score them on prompts that nobody saw."""
        encoder = self.cache.config["hookpoints"][subject.hookpoint]["encoder"][:16]
        settings = f"{encoder}/{self.target}/{self.prompts}/{self.shown}/{self.tokens}/{self.seed}"
        key = f"{self.name}/{self.lm.hash[:16]}/{subject.hookpoint}/{subject.latent}/{settings}/"
        found = await self._kept(client, key + "strength", lambda: self._strength(subject))
        if found["reason"]:
            return Scored([], {"gain": Measure.missing(found["reason"], 0.0)}, "gain")
        given = [explanation, *(await self._explanations(found["risen"], client))]
        digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()
        scored = await self._kept(client, key + digest, lambda: self._gains(subject, given, found))
        records = [
            {
                "example": text, "kind": "steered", "quantile": None, "distance": None, "label": True, "answer": gain,
                "probability": None, "parsed": True,
            }
            for text, gain in zip(scored["texts"], scored["gains"], strict=True)
        ]  # fmt: skip
        control = bootstrap_mean(scored["control"])
        measures = {
            "gain": Measure(bootstrap_mean(scored["gains"]), control.estimate),
            "gain_random_direction": Measure(control, 0.0),
        }
        return Scored(records, measures, "gain")

    async def _kept(self, client: Client, key: str, work: Any) -> dict[str, Any]:
        known = client.answers.result(key)
        if known is None:
            known = json.dumps(await alone(work))
            client.answers.keep(key, known)
        return json.loads(known)

    async def _explanations(
        self, risen: Sequence[tuple[str, Sequence[tuple[str, float]]]], client: Client
    ) -> list[str]:
        messages = questions.explain_effect(risen)
        asked = [Params(max_tokens=200, temperature=0.7, seed=self.seed + i) for i in range(self.samples)]

        async def one(params: Params) -> str | None:
            try:
                text, _ = await client.parsed(
                    messages,
                    params,
                    lambda answer: questions.read_explanation(answer.text),
                    questions.AGAIN_EXPLANATION,
                )
            except Unanswered:
                return None
            return text

        found = await asyncio.gather(*map(one, asked))
        return list(dict.fromkeys(text for text in found if text))

    def _strength(self, subject: Subject) -> dict[str, Any]:
        """The strength that meets the target, and what the explainer is shown."""
        prompts = self._prompts(subject)
        if len(prompts) < self.shown + _LEAST:
            return {"reason": f"{len(prompts)} prompts end where it fires: {self.shown + _LEAST} are needed"}
        shown = prompts[: self.shown]
        steering = self._steering(subject)
        after = NextTokens(self.lm, shown)
        found = find_strength(self.target, lambda strength: after.divergence(steering, strength))
        if not found.met:
            return {"reason": f"no strength moves the next token by a KL of {self.target:g} (nearest: {found.kl:.2g})"}
        risen = [
            (self.lm.decode(prompt), [(self.lm.token_strings([token])[0], rise) for token, rise in ups])
            for prompt, ups in zip(shown, increases(after, steering, found.value), strict=True)
        ]
        return {"reason": "", "strength": found.value, "risen": risen}

    def _gains(self, subject: Subject, given: Sequence[str], found: Mapping[str, Any]) -> dict[str, Any]:
        """Gains of the chosen explanation on the second half, also under a random direction."""
        prompts = self._prompts(subject)[self.shown :]
        site, rows = self.writes[subject.hookpoint]
        row = rows[subject.latent]
        noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(self.seed + subject.latent)).to(row)
        control = adding(site, noise * row.norm() / noise.norm())
        after = NextTokens(self.lm, prompts)
        other = find_strength(self.target, lambda strength: after.divergence(control, strength))
        likelihood = FewShotLikelihood(self.lm, SHOTS)
        clean = self._continued(prompts, None, 0.0)
        steered = self._continued(prompts, self._steering(subject), found["strength"])
        best = effect_score(given, likelihood, steered, clean)
        half = len(prompts) // 2
        turned = self._continued(prompts[half:], control, other.value)
        against = likelihood(turned, best.explanation) - likelihood(clean[half:], best.explanation)
        return {
            "explanation": best.explanation,
            "texts": steered[half:],
            "gains": best.gains.tolist(),
            "control": against.tolist(),
        }

    def _continued(self, prompts: Sequence[Sequence[int]], by: Intervention | None, strength: float) -> list[str]:
        return continued(self.lm, prompts, by, strength, tokens=self.tokens, seed=self.seed)

    def _prompts(self, subject: Subject) -> list[list[int]]:
        return firing_prompts(
            self.cache, subject.hookpoint, subject.latent, count=self.shown + self.prompts, seed=self.seed
        )

    def _steering(self, subject: Subject) -> Intervention:
        site, rows = self.writes[subject.hookpoint]
        return adding(site, rows[subject.latent])


def _read(answer: Completion) -> str | None:
    return questions.read_explanation(answer.text)
