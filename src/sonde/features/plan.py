"""Which dictionary is to be trained, where, and how: one `Plan` each, or a grid of them over sites and settings."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sonde.errors import SondeError
from sonde.features.activation_rows import matched
from sonde.features.design import WITH_K, Design, Kind
from sonde.features.end_to_end import LOSSES, Loss
from sonde.features.input_scale import SCALES, Scale, foldable
from sonde.features.step_config import StepConfig
from sonde.lm.model import LanguageModel

Centre = Literal["mean", "median", "none"]


@dataclass(frozen=True)
class Plan:
    """One dictionary to be trained.

    Attributes:
        site: what it reads; several sites for a crosscoder (its design has `streams`) and, with as many targets, for a
            cross-layer transcoder (the design is then that of one layer: outputs = inputs).
        design: what it is.
        config: its steps. Where `config.steps` is 0 the schedules are fitted to the training: all its steps, the rate
            falling over the last fifth, warm-ups of at most a tenth (rate) and a fifth (sparsity), a threshold from at
            latest a quarter on.
        target: what a transcoder predicts.
        seed: of its weights.
        scale: of the rows while it is trained; see `sonde.features.input_scale`. Folded in afterwards.
        centre: where its bias starts: mean or geometric median of a sample, or 0, which kills latents.
        end_to_end: "kl" or "ce": what the model loses takes the place of the reconstruction error.
        name: what it is called; by default from the fields above.

    Raises:
        SondeError: for fields that do not fit one another.

    """

    site: str | tuple[str, ...]
    design: Design
    config: StepConfig = field(default_factory=StepConfig)
    target: str | tuple[str, ...] | None = None
    seed: int = 0
    scale: Scale = "none"
    centre: Centre = "mean"
    end_to_end: Loss | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if (self.target is not None) != self.design.transcodes:
            raise SondeError("a transcoder, and it alone, has a target: the site that it predicts")
        if self.scale not in SCALES:
            raise SondeError(f"scale is {self.scale!r}; it is one of {', '.join(SCALES)}")
        if self.centre not in ("mean", "median", "none"):
            raise SondeError(f"centre is {self.centre!r}; it is mean, median or none")
        if self.scale != "none" and (self.cross_layer or self.design.layer_norm):
            raise SondeError("a cross-layer transcoder, and a design with layer_norm, take no scale")
        if self.scale == "whiten" or (self.scale != "none" and self.design.streams):
            foldable(self.design)
        if self.end_to_end is not None:
            if self.end_to_end not in LOSSES:
                raise SondeError(f"end_to_end is {self.end_to_end!r}; it is kl or ce")
            if not isinstance(self.site, str) or self.design.kind == "gated":
                raise SondeError("end to end a dictionary of one site is trained, and not of kind 'gated'")
        if isinstance(self.site, tuple) and not self.design.streams and not self.cross_layer:
            raise SondeError("several sites are for a crosscoder, whose design has streams, or with as many targets")
        self.config.for_design(self.design)
        object.__setattr__(self, "name", self.name or self._name())

    @property
    def cross_layer(self) -> bool:
        """Whether it is a cross-layer transcoder."""
        return isinstance(self.site, tuple) and isinstance(self.target, tuple)

    @property
    def reads(self) -> tuple[str, ...]:
        """Sites that it reads."""
        return (self.site,) if isinstance(self.site, str) else self.site

    @property
    def predicts(self) -> tuple[str, ...]:
        """Sites that it predicts, if it transcodes."""
        return (self.target,) if isinstance(self.target, str) else self.target or ()

    def fitted(self, steps: int) -> StepConfig:
        """The configuration of a training of so many steps."""
        config = self.config
        if config.steps:
            return config
        return replace(
            config,
            steps=steps,
            decay=steps // 5,
            warmup=min(config.warmup, steps // 10),
            sparsity_warmup=min(config.sparsity_warmup, steps // 5),
            threshold_start=min(config.threshold_start, steps // 4),
        )

    def to_json(self) -> dict[str, Any]:
        """What decides the numbers."""
        return asdict(self)

    def _name(self) -> str:
        design = self.design
        parts = [*self.reads, *self.predicts, design.kind, str(design.latents)]
        parts += [f"k{design.k}"] if design.k else []
        return "-".join([*parts, f"s{self.seed}"])


def grid(
    lm: LanguageModel,
    sites: Sequence[str],
    *,
    kinds: Sequence[Kind] = ("topk",),
    latents: Sequence[int] = (1024,),
    ks: Sequence[int] = (32,),
    sparsities: Sequence[float | None] = (None,),
    seeds: Sequence[int] = (0,),
    config: StepConfig | None = None,
    scale: Scale = "none",
    threshold: float = 0.001,
    bandwidth: float = 0.001,
) -> list[Plan]:
    """Autoencoders of all `sites` (names or patterns) in every combination of the other settings.

    `ks` are for kinds with k and, as the L0 that is aimed at, for "jumprelu"; `sparsities` (λ) are for "relu", "gated"
    and "jumprelu", `threshold` and `bandwidth` for "jumprelu" alone. Widths are the model's. Raises `SondeError` for
    sites that do not exist, naming the nearest, and `ValueError` as `Design` does.
    """
    config = config or StepConfig()
    plans: list[Plan] = []
    for site, kind, width, seed in itertools.product(matched(lm, *sites), kinds, latents, seeds):
        inputs = lm.vocab_size if site == "logits" else lm.d_model
        if kind in WITH_K:
            made = [(Design(kind, inputs, width, k), config, f"k{k}") for k in ks]
        elif kind == "jumprelu":
            aims = [
                replace(config, target_l0=k, sparsity=config.sparsity if value is None else value)
                for k in ks
                for value in sparsities
            ]
            jumping = Design(kind, inputs, width, threshold=threshold, bandwidth=bandwidth)
            made = [(jumping, aim, f"l0-{aim.target_l0}" + _labelled("-", aim.sparsity)) for aim in aims]
        else:
            weighed = [config if value is None else replace(config, sparsity=value) for value in sparsities]
            made = [(Design(kind, inputs, width), each, _labelled("", each.sparsity)) for each in weighed]
        for design, each, label in made:
            name = "-".join(part for part in (site, kind, str(width), label, f"s{seed}") if part)
            plans.append(Plan(site, design, each, seed=seed, scale=scale, name=name))
    return plans


def _labelled(before: str, sparsity: float | None) -> str:
    return "" if sparsity is None else f"{before}l{sparsity:g}"
