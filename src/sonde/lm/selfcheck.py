"""Does this model do what the names of its sites say? Measured on random tokens, 2 rows of 8, before anything is read.

    unembedding    U(resid_post[L-1]) = logits
    stream         resid_pre[i+1] = resid_post[i]
    parts          resid_post[i] - resid_pre[i] = mixer_out[i] + mlp_out[i]   (reported, not required)
    inputs         given another row's mixer_in[i] and mlp_in[i], a row adds what that row adds   (reported)
    early stop     a pass that stops reads what a whole pass reads
    continuation   a run split by the cache = the whole run, see `sonde.lm.continuation`
    clone          continuing from a clone leaves the original as it was
    states         a changed state changes the logits of the tokens after it, part by part

Every family of transformers is another program, and what goes wrong in one is silent: so a model is measured, not
looked up. The check costs some twenty passes over at most eleven tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.continuation import (
    DEAF,
    Continuation,
    call,
    continuation,
    continue_from,
    difference,
    disturbed,
    random_tokens,
    unhooked,
)
from sonde.lm.state import PARTS

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel

_PREFIX, _SUFFIX = 4, 4


@dataclass(frozen=True)
class Check:
    """Measured errors of one model, each relative to the largest number that it is compared with.

    `parts` and `inputs` are None where no block has a mixer that can be read. `clone` and `states` (the smallest change
    of the last suffix token's logits, by part) are None and empty where the model cannot be continued.
    """

    name: str
    unembedding: float
    stream: float
    parts: float | None
    inputs: float | None
    early_stop: float
    clone: float | None
    states: Mapping[str, float]
    continuation: Continuation
    tolerance: float

    @property
    def ignores_mask(self) -> bool:
        """Whether pads leak into real tokens, so that only rows of equal length can share a batch."""
        return self.continuation.ignores_mask

    @property
    def unusable(self) -> tuple[str, ...]:
        """Why activations of this model would not be what their names say; empty for a sound model."""
        faults = {
            "the unembedding of the last block differs from the logits": self.unembedding,
            "blocks are not given what the block before returned: the stream differs": self.stream,
            "a pass that stops early reads something else: it differs": self.early_stop,
        }
        return tuple(
            f"{fault} by {_number(error)} of its scale (allowed: {self.tolerance:.0e})"
            for fault, error in faults.items()
            if not error <= self.tolerance
        )

    @property
    def refusals(self) -> tuple[str, ...]:
        """What this model cannot be used for, each with the measured number."""
        refused = [*self.unusable]
        if self.continuation.mode == "none":
            wrong = max(self.continuation.one, self.continuation.step)
            why = f": {self.continuation.failure}" if self.continuation.failure else ""
            refused.append(
                f"generation and state edits: a split run differs by {_number(wrong)} from the whole run{why}"
            )
        if self.clone is not None and not self.clone <= self.tolerance:
            refused.append(f"state edits: a clone shares memory with its original (difference {_number(self.clone)})")
        refused += [
            f"edits of state.*.{part}: they change the logits by no more than {_number(effect)}"
            for part, effect in self.states.items()
            if not effect > self.continuation.tolerance
        ]
        if self.ignores_mask:
            refused.append(
                f"rows of unequal length in a batch: pads change the logits by {_number(self.continuation.padding)}"
            )
        return tuple(refused)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was measured and worked around, or does not hold without being an error."""
        how, notes = self.continuation, []
        if how.mode == "step":
            deaf = f" and a state edit loses {_number(how.states)} of its effect" if how.states else ""
            notes.append(f"tokens after a cache run one by one: in one call they differ by {_number(how.chunk)}{deaf}")
        if self.parts is None:
            notes.append("the blocks' parts cannot be read one by one")
        elif not self.parts <= self.tolerance:
            notes.append(f"mixer_out + mlp_out differs by {_number(self.parts)} from what a block adds (of its scale)")
        if self.inputs is not None and not self.inputs <= self.tolerance:
            notes.append(f"a block adds what mixer_in and mlp_in do not decide: {_number(self.inputs)} of its scale")
        return tuple(notes)

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows of (what must hold, measured error, allowed, verdict) for reports and terminals."""
        how = self.continuation
        limit = f"{self.tolerance:.0e}"
        rows = [
            _row("unembedding of the last block = logits", self.unembedding, self.tolerance),
            _row("input of a block = output of the one before", self.stream, self.tolerance),
            _row("stopping early reads the same", self.early_stop, self.tolerance),
        ]
        if self.parts is not None:
            verdict = "yes" if self.parts <= self.tolerance else "no (reported only)"
            rows.append(("mixer + MLP = what a block adds", _number(self.parts), limit, verdict))
        if self.inputs is not None:
            verdict = "yes" if self.inputs <= self.tolerance else "no (reported only)"
            rows.append(("mixer_in and mlp_in decide what a block adds", _number(self.inputs), limit, verdict))
        rows += [
            _row("1 token after the cache = whole run", how.one, how.tolerance),
            _row("4 tokens after the cache, one by one = whole run", how.step, how.tolerance),
            _row("4 tokens after the cache, in one call = whole run", how.chunk, how.tolerance),
        ]
        if how.states is not None:
            rows.append(_row("a state edit acts in one call as one by one", how.states, DEAF))
        if self.clone is not None:
            rows.append(_row("a cloned cache is independent", self.clone, self.tolerance))
        rows += [
            (
                f"editing state.*.{part} changes what follows",
                _number(effect),
                f"> {how.tolerance:.0e}",
                _verdict(effect > how.tolerance),
            )
            for part, effect in self.states.items()
        ]
        rows.append(_row("masked pads on the left change nothing", how.padding, how.tolerance))
        return rows

    def raise_if_unusable(self) -> None:
        """Raise `SondeError` where activations would not be what their names say; other refusals are no error yet."""
        if self.unusable:
            raise SondeError(f"{self.name} failed the self-check: {'; '.join(self.unusable)}")

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings; what is infinite is null."""
        return _finite({**asdict(self), "refusals": list(self.refusals), "notes": list(self.notes)})


@torch.no_grad()
def self_check(lm: "LanguageModel") -> Check:
    """Measure what `lm` does. See the module's docstring for what is compared.

    Raises `SondeError` where the model cannot run at all in its number type on its device.
    """
    tokens = random_tokens(lm.model, _PREFIX + _SUFFIX)
    kinds = {"resid_pre", "resid_post", "mixer_in", "mixer_out", "mlp_in", "mlp_out", "logits"}
    last, middle = lm.n_layers - 1, f"resid_post.{lm.n_layers // 2}"
    try:
        with lm.reading(*(site for site in lm.sites if site.partition(".")[0] in kinds)) as acts:
            lm(tokens)
    except SondeError:
        raise
    except Exception as error:  # whatever the code of a family raises on this device and in this number type
        raise SondeError(f"{lm.name} does not run in {lm.dtype}: {type(error).__name__}: {error}") from error
    with lm.reading(middle) as stopped:
        lm(tokens)
    how = continuation(lm.model)
    clone, states = (None, {}) if how.mode == "none" else _memory(lm, tokens)
    return Check(
        name=lm.name,
        unembedding=difference(lm.unembed(acts[f"resid_post.{last}"]), acts["logits"]),
        stream=max((difference(acts[f"resid_pre.{i + 1}"], acts[f"resid_post.{i}"]) for i in range(last)), default=0.0),
        parts=_parts(acts, lm.n_layers),
        inputs=_inputs(lm, tokens, acts),
        early_stop=difference(stopped[middle], acts[middle]),
        clone=clone,
        states=states,
        continuation=how,
        tolerance=max(1e-4, 8 * torch.finfo(lm.dtype).eps),
    )


def _memory(lm: "LanguageModel", tokens: Tensor) -> tuple[float, dict[str, float]]:
    """What continuing from a clone does to the original, and what a change of each part of the state does to logits."""
    suffix = tokens[:, _PREFIX : _PREFIX + 2]
    with unhooked(lm.model):
        cache = call(lm.model, tokens[:, :_PREFIX])[1]
        first = continue_from(lm.model, cache.clone(), suffix)[0]
        second = continue_from(lm.model, cache.clone(), suffix)[0]
        present = [part for part in PARTS if any(part in cache.parts(layer) for layer in range(cache.n_layers))]
        changed = {part: continue_from(lm.model, disturbed(cache, part), suffix)[0] for part in present}
    return difference(second, first), {
        part: difference(logits[:, -1:], first[:, -1:]) for part, logits in changed.items()
    }


def _parts(acts: Mapping[str, Tensor], n_layers: int) -> float | None:
    """The largest part of what a block adds that its mixer and MLP do not account for."""
    errors = []
    for i in range(n_layers):
        parts = [acts[site] for site in (f"mixer_out.{i}", f"mlp_out.{i}") if site in acts]
        if parts:
            errors.append(difference(sum(parts[1:], parts[0]), acts[f"resid_post.{i}"] - acts[f"resid_pre.{i}"]))
    return max(errors, default=None)


def _inputs(lm: "LanguageModel", tokens: Tensor, acts: Mapping[str, Tensor]) -> float | None:
    """What rows of exchanged inputs add, block by block, against what the other row adds."""
    layers = [i for i in range(lm.n_layers) if f"mixer_in.{i}" in acts]
    if not layers:
        return None
    given = {site: acts[site].flip(0) for site in acts if site.startswith(("mixer_in", "mlp_in"))}
    edits = {site: lambda h, new=new: new for site, new in given.items()}
    with lm.editing(edits), lm.reading("resid_*") as exchanged:
        lm(tokens)
    return max(
        difference(
            exchanged[f"resid_post.{i}"] - exchanged[f"resid_pre.{i}"],
            (acts[f"resid_post.{i}"] - acts[f"resid_pre.{i}"]).flip(0),
        )
        for i in layers
    )


def _row(what: str, error: float, allowed: float) -> tuple[str, str, str, str]:
    return what, _number(error), f"{allowed:.0e}", _verdict(error <= allowed)


def _verdict(holds: bool) -> str:
    return "yes" if holds else "no"


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "all of it"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
