"""How is a dictionary trained? Every number of one optimisation step, checked when it is made."""

from dataclasses import dataclass
from typing import Literal, get_args

from sonde.features.design import Design

Optimizer = Literal["adam", "signsgd", "muon"]
Penalty = Literal["l1", "l0", "l0_target", "l0_quadratic", "tanh"]
_JUMPRELU = ("l0", "l0_target", "l0_quadratic", "tanh")


@dataclass(frozen=True)
class StepConfig:
    """Loss and optimiser of a dictionary. What is None follows from its design.

    Attributes:
        optimizer: "adam"; "signsgd", the sign of the gradient, averaged without a schedule; "muon", with Adam for
            vectors.
        lr: by default 2e-4/√(M/2¹⁴) for Adam (7e-5 for "jumprelu", 5e-5 for "gated"), 5e-3/√(M/2¹⁴) for "signsgd", 2e-3
            for "muon".
        betas: of Adam; (0.9, 0.999), and (0, 0.999) for "jumprelu" and "gated".
        momentum: of "signsgd" (the weight of the average in the point where gradients are taken) and of "muon".
        warmup: steps in which the rate rises from 0; not for "signsgd".
        steps, decay: all steps, and those at the end in which the rate falls to 0; 0: it stays.
        clip: largest norm of the gradient of all parameters together; None: no limit.
        norm: "project" keeps decoder rows at length 1: the gradient along a row is taken out, and the row is divided by
            its length after the step; "free" leaves them. By default "free" for transcoders, crosscoders and designs
            that rank by norm, whose lengths mean something, and for kinds whose penalty weighs by them.
        reconstruction: "fvu", Σ‖y - ŷ‖² / Σ‖y - ȳ‖²; "mse", Σ‖y - ŷ‖² / n, the scale of published λ. By default "fvu"
            for kinds with k, "mse" for others.
        micro_rows: rows that are gone through at once, their gradients added; denominators are the whole batch's.
        aux_weight: weight of the auxiliary loss of dead latents; 1/32 for "topk", "batchtopk" and "matryoshka". It
            revives latents; where there are many more latents than there is to find, it makes the error larger.
        aux_k: dead latents of a row that stand in for what is missed; half the width of the target.
        aux_rectify: relu them. False also revives latents whose pre is never above 0.
        dead_after: tokens without firing after which a latent is dead.
        sparsity: λ of kinds without k; 0.1, and 1 for "jumprelu".
        sparsity_warmup: steps in which λ rises from 0.
        penalty: "l1" (Σ f, times the norms where these are free) for "relu" and "gated"; of "jumprelu", with L0 the
            mean over the batch: "l0" is λ L0, "l0_target" λ (L0/L0* - 1)², "l0_quadratic" (2λ/L0*)(L0 - L0*)², "tanh"
            λ Σ tanh(c f ‖W_dec‖).
        target_l0, tanh_scale: L0* and c of these.
        dead_penalty: weight of Σ relu(θ - pre) ‖W_dec‖ over dead latents; "jumprelu" only.
        k_start, k_steps: k falls linearly from `k_start` to the design's in `k_steps` steps; None: no annealing.
        threshold_decay, threshold_start: of θ of kinds that choose across rows: the moving average of the smallest
            value that is kept, from this step.

    Raises:
        ValueError: for a field that does not fit; the message names it.

    """

    optimizer: Optimizer = "adam"
    lr: float | None = None
    betas: tuple[float, float] | None = None
    momentum: float = 0.95
    warmup: int = 1000
    steps: int = 0
    decay: int = 0
    clip: float | None = 1.0
    norm: Literal["project", "free"] | None = None
    reconstruction: Literal["fvu", "mse"] | None = None
    micro_rows: int | None = None
    aux_weight: float | None = None
    aux_k: int | None = None
    aux_rectify: bool = True
    dead_after: int = 10_000_000
    sparsity: float | None = None
    sparsity_warmup: int = 2000
    penalty: Penalty | None = None
    target_l0: float | None = None
    tanh_scale: float = 4.0
    dead_penalty: float = 0.0
    k_start: int | None = None
    k_steps: int = 0
    threshold_decay: float = 0.999
    threshold_start: int = 1000

    def __post_init__(self) -> None:
        for name, known in (("optimizer", get_args(Optimizer)), ("penalty", (None, *get_args(Penalty)))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(map(str, known))}")
        if self.norm not in (None, "project", "free"):
            raise ValueError(f"norm is {self.norm!r}: use project or free")
        if self.reconstruction not in (None, "fvu", "mse"):
            raise ValueError(f"reconstruction is {self.reconstruction!r}: use fvu or mse")
        for name in ("warmup", "steps", "decay", "sparsity_warmup", "k_steps", "threshold_start", "dead_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        for name in ("aux_weight", "sparsity"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        for name in ("lr", "clip", "micro_rows", "aux_k", "dead_after", "target_l0"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
        for name in ("momentum", "threshold_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        if self.decay > self.steps:
            raise ValueError(
                f"decay is {self.decay}: the rate falls over the last of all steps, and steps is {self.steps}"
            )

    def for_design(self, design: Design) -> "StepConfig":
        """The same with every None replaced. Raises `ValueError` for a field that does not fit the design."""
        has_k, kind = design.k is not None, design.kind
        scale = (design.latents / 2**14) ** -0.5
        adam = {"jumprelu": 7e-5, "gated": 5e-5}.get(kind, 2e-4 * scale)
        rates = {"adam": adam, "signsgd": 5e-3 * scale, "muon": 2e-3}
        penalty = self.penalty or ("l0_target" if kind == "jumprelu" else "l1")
        free = design.transcodes or design.ranked_by_norm or bool(design.streams)
        given = {
            "lr": rates[self.optimizer],
            "betas": (0.0, 0.999) if kind in ("jumprelu", "gated") else (0.9, 0.999),
            "norm": "free" if free else "project",
            "reconstruction": "fvu" if has_k else "mse",
            "aux_weight": 1 / 32 if kind in ("topk", "batchtopk", "matryoshka") else 0.0,
            "aux_k": max(1, design.outputs // 2),
            "sparsity": 0.0 if has_k else 1.0 if kind == "jumprelu" else 0.1,
            "penalty": penalty,
        }
        filled = {name: value for name, value in given.items() if getattr(self, name) is None}
        whole = StepConfig(**{**self.__dict__, **filled})
        whole._check_design(design)
        return whole

    def _check_design(self, design: Design) -> None:
        kind, has_k = design.kind, design.k is not None
        if self.norm == "project" and design.transcodes:
            raise ValueError("norm is 'project': rows of a transcoder's decoder start at 0 and have free norms")
        if self.norm == "project" and design.streams:
            raise ValueError("norm is 'project': how long each stream's part is says what a crosscoder's latent is")
        if not has_k and (kind == "jumprelu") != (self.penalty in _JUMPRELU):
            allowed = ", ".join(_JUMPRELU) if kind == "jumprelu" else "l1"
            raise ValueError(f"penalty is {self.penalty!r}: kind {kind!r} takes {allowed}")
        if has_k and self.sparsity:
            raise ValueError(f"sparsity is {self.sparsity}: kind {kind!r} has k in its place")
        if self.penalty in ("l0_target", "l0_quadratic") and kind == "jumprelu" and self.target_l0 is None:
            raise ValueError(f"target_l0 is None: penalty {self.penalty!r} needs it")
        if self.dead_penalty and kind != "jumprelu":
            raise ValueError(f"dead_penalty is for kind 'jumprelu', not {kind!r}")
        if self.aux_weight and kind == "gated":
            raise ValueError("aux_weight is not for kind 'gated', whose gate has an auxiliary loss already")
        if self.k_start is not None:
            if not has_k or kind == "groupmax":
                raise ValueError(f"k_start is {self.k_start}: kind {kind!r} has no k that could fall")
            if not (design.k or 0) <= self.k_start <= design.latents:
                raise ValueError(
                    f"k_start is {self.k_start}: it must be from k = {design.k} to {design.latents} latents"
                )

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in step `step`, from 0."""
        rise = (step + 1) / self.warmup if self.warmup and self.optimizer != "signsgd" else 1.0
        fall = (self.steps - step) / (self.decay + 1) if self.decay else 1.0
        return max(0.0, min(1.0, rise, fall))

    def k_at(self, step: int, k: int | None) -> int | None:
        """The k of step `step`, of a design whose own is `k`."""
        if k is None or self.k_start is None or step >= self.k_steps:
            return k
        return round(self.k_start + (k - self.k_start) * step / self.k_steps)
