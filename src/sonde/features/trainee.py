"""One of several dictionaries that learn from the same pass: its scale, its steps, its curve, and what it becomes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.activation_rows import Rows
from sonde.features.cross_layer import CrossLayerTranscoder
from sonde.features.data_parallel import Processes
from sonde.features.dictionary import Dictionary
from sonde.features.end_to_end import end_to_end_loss
from sonde.features.input_scale import InputScale, Sample
from sonde.features.objective import Scale
from sonde.features.plan import Plan
from sonde.features.step import Step
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch

_POINTS = 100  # of a curve


class Trainee:
    """A dictionary in training.

    Args:
        plan: what it is.
        steps: optimiser steps of the whole training.
        processes: those that take its steps together.
        samples: a sample of the rows of every site that it reads or predicts; None for one that is loaded next.

    Raises:
        SondeError: for sites whose widths are not those of the design.

    """

    def __init__(
        self, plan: Plan, steps: int, processes: Processes, samples: Mapping[str, Sample] | None = None
    ) -> None:
        self.plan = plan
        self.curve: list[dict[str, float]] = []
        """Means over stretches of the training: "step", "tokens", "fvu", "l0", "dead", "loss" and others."""
        self._processes = processes
        self._every = max(1, steps // _POINTS)
        self._stretch: dict[str, float] = {}
        self._reads, self._writes = InputScale(), InputScale()
        means: list[Tensor | None] = [None, None]
        if samples is not None:
            self._check(samples)
            read, written = ([samples[site] for site in sites] for sites in (plan.reads, plan.predicts))
            self._reads = InputScale.of(plan.scale, *read)
            self._writes = InputScale.of(plan.scale, *written) if written else self._reads
            if plan.centre != "none":
                means = [self._centre(read, self._reads), self._centre(written, self._writes) if written else None]
        self.step = Step(self._module(*means), plan.fitted(steps))
        for each in self.step.dictionaries:
            each.site = "+".join(plan.reads)
            each.target = "+".join(plan.predicts) or None

    def _module(self, mean: Tensor | None, target_mean: Tensor | None) -> Dictionary | CrossLayerTranscoder:
        plan, design, device = self.plan, self.plan.design, self._processes.device
        if plan.cross_layer:
            layers = len(plan.reads)
            means = [None if m is None else m.view(layers, -1) for m in (mean, target_mean)]
            made = CrossLayerTranscoder.initialised(
                layers,
                design.inputs,
                design.latents,
                kind=design.kind,
                k=design.k,
                mean=means[0],
                target_mean=means[1],
                seed=plan.seed,
            )
            return made.to(device)
        return Dictionary.initialised(design, mean=mean, target_mean=target_mean, seed=plan.seed, device=device)

    def _centre(self, samples: list[Sample], scale: InputScale) -> Float[Tensor, " d"]:
        centres = [sample.median if self.plan.centre == "median" else sample.mean for sample in samples]
        return scale(torch.cat([centre for centre in centres if centre is not None]).float()).to(self._processes.device)

    def _check(self, samples: Mapping[str, Sample]) -> None:
        plan, design = self.plan, self.plan.design
        single = design.streams or (design.inputs,) * len(plan.reads)
        for sites, widths in ((plan.reads, single), (plan.predicts, (design.outputs,) * len(plan.predicts))):
            found = tuple(len(samples[site].mean) for site in sites)
            if found != tuple(widths):
                raise SondeError(
                    f"{plan.name}: {', '.join(sites)} has width {', '.join(map(str, found))}, and the design "
                    f"{', '.join(map(str, widths))}"
                )

    def descend(self, rows: Rows, lm: LanguageModel, batch: Batch | None, taken: Bool[Tensor, "..."] | None) -> bool:
        """One step on rows; end to end, also on the batch that they are of. Whether a point of the curve is done."""
        step, plan = self.step, self.plan
        x, y = self._given(rows)
        inputs, targets, own = step.prepared(x, y)
        whole = self._whole(targets, own)
        # an infinite denominator takes the reconstruction out of the loss, and leaves penalty and dead latents in
        scale = Scale(math.inf, whole.rows) if plan.end_to_end else whole
        size = step.config.micro_rows or len(inputs)
        terms: dict[str, float] = {}
        for start in range(0, len(inputs), size):
            found = step.accumulate(inputs[start : start + size], targets[start : start + size], scale)
            terms = {name: terms.get(name, 0.0) + value for name, value in found.items()}
        if plan.end_to_end:
            assert batch is not None
            assert taken is not None
            terms |= self._end_to_end(lm, batch, taken, whole)
        done = self._shared(terms) | step.update()
        return self._note(done)

    def _given(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        plan = self.plan
        sides = [[rows[site] for site in sites] for sites in (plan.reads, plan.predicts)]
        if plan.cross_layer:
            return torch.stack(sides[0], 1), torch.stack(sides[1], 1)
        x = self._reads(torch.cat(sides[0], 1) if len(sides[0]) > 1 else sides[0][0])
        return x, self._writes(sides[1][0]) if sides[1] else None

    def _whole(self, targets: Float[Tensor, "n outputs"], own: Scale) -> Scale:
        """What the rows of all processes are divided by."""
        if self._processes.world == 1:
            return own
        wide = targets.double()
        sums = [wide.sum(0), wide.square().sum(), torch.tensor(float(len(wide)), device=wide.device).double()]
        self._processes.sum_(sums)
        total, squares, rows = sums
        return Scale((squares - total.square().sum() / rows).to(targets.dtype), round(float(rows)))

    def _end_to_end(
        self, lm: LanguageModel, batch: Batch, taken: Bool[Tensor, "batch pos"], whole: Scale
    ) -> dict[str, float]:
        """Gradients of what the model loses, and how far the reconstruction is off."""
        plan, module = self.plan, self.step.module
        assert plan.end_to_end is not None
        missed: list[Tensor] = []
        target = plan.predicts[0] if plan.predicts else plan.reads[0]

        def output(x: Tensor) -> Tensor:
            out = module(self._reads(x.to(self._processes.device)))
            wanted = self._writes(batch.acts[target][taken].to(out))
            missed.append((wanted - out.detach()).square().sum())
            return self._writes.inverse(out).to(x.device)

        module.train()
        try:
            loss = end_to_end_loss(lm, output, batch, taken, site=plan.reads[0], target=target, loss=plan.end_to_end)
            (loss / self._processes.world).backward()
        finally:
            module.eval()
        share = float(loss.detach()) / self._processes.world
        return {"loss": share, plan.end_to_end: share, "fvu": float(missed[0] / whole.variance)}

    def _shared(self, terms: dict[str, float]) -> dict[str, float]:
        """Add up over processes what was found and counted, gradients first."""
        processes, step = self._processes, self.step
        if processes.world == 1:
            return terms
        processes.sum_([p.grad for p in step.parameters if p.grad is not None])
        counts = [*step.fired, torch.tensor(step.tokens, device=processes.device)]
        added = [count.long() for count in counts]
        processes.sum_(added)
        *fired, tokens = added
        step.fired, step.tokens = [each > 0 for each in fired], int(tokens)
        for smallest in step.smallest:
            smallest.fill_(processes.least(float(smallest)))
        values = torch.tensor(list(terms.values()), dtype=torch.float64, device=processes.device)
        processes.sum_([values])
        return dict(zip(terms, values.tolist(), strict=True))

    def _note(self, terms: dict[str, float]) -> bool:
        step, stretch = self.step, self._stretch
        for name, value in terms.items():
            stretch[name] = stretch.get(name, 0.0) + value
        if step.done % self._every:
            return False
        means = {name: value / self._every for name, value in stretch.items()}
        self.curve.append({"step": step.done, "tokens": step.tokens_seen, **means})
        self._stretch = {}
        return True

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`."""
        return {
            "step": self.step.state(),
            "reads": self._reads.state(),
            "writes": self._writes.state(),
            "curve": self.curve,
            "stretch": self._stretch,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.step.load(state["step"])
        self._reads = InputScale.from_state(state["reads"])
        self._writes = InputScale.from_state(state["writes"])
        self.curve, self._stretch = state["curve"], state["stretch"]

    def finished(self, recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> Dictionary | CrossLayerTranscoder:
        """What training has made, with the scale folded in. `recorded` are attributes, `facts` go into `facts`."""
        step = self.step
        step.finish()
        for each in step.dictionaries:
            for name, value in recorded.items():
                setattr(each, name, value)
        own = {"plan": self.plan.to_json(), "steps": step.done, "tokens": step.tokens_seen, "curve": self.curve}
        for each, since in zip(step.dictionaries, step.since_fired, strict=True):
            window = min(step.config.dead_after, step.tokens_seen)
            fired = int((since < window).sum())
            each.facts = {**facts, **own, "alive": {"latents": fired, "in_last_tokens": window}}
        if isinstance(step.module, CrossLayerTranscoder):
            return step.module
        return self._reads.folded(step.module, self._writes)
