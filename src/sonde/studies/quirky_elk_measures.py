"""What the study of quirky models measures on one model: states, transfers, controls, alarm, reflection."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sonde.data.quirky import Records, Splits
from sonde.knowledge.anomaly import Alarm
from sonde.knowledge.probes import fit
from sonde.knowledge.recovered_gap import ScoredRows
from sonde.knowledge.reflection import Reflected, reflect
from sonde.knowledge.samples import Sample, subsets
from sonde.knowledge.states import States, answer_tokens, extract
from sonde.knowledge.transfer import Transfers, random_aurocs, shuffled_aurocs, transfer
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import prompt_ids
from sonde.runs.run import Run

if TYPE_CHECKING:
    from sonde.studies.quirky_elk import QuirkyElkConfig

HELD = 0.25  # of the rows that probes are trained on: as many more choose the layer
RANDOM, SHUFFLED, REFLECTED = 256, 8, 400


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        transfers: every probe from every subset to every subset.
        says: the model's own log-odds on the test records.
        alice: whether each of them is Alice's.
        truth: of each.
        bob: what Bob's rule says.
        bases: base rows of each.
        random: AUROC of random directions on Bob's records, by rows that are scored ("all", "disagreements").
        shuffled: AUROC of the first probe on Bob's records, fitted on shuffled labels of Alice's.
        alarms: strangeness of the test records, by what the alarm watches.
        reflected: answers under reflection, of `reflected_rows` among the test records.
        missing: subsets that do not exist, and why.

    """

    transfers: Transfers
    says: Float[np.ndarray, " n"]
    alice: Bool[np.ndarray, " n"]
    truth: Bool[np.ndarray, " n"]
    bob: Bool[np.ndarray, " n"]
    bases: Int[np.ndarray, " n"]
    random: dict[str, Float[np.ndarray, "draws layers"]]
    shuffled: Float[np.ndarray, "draws layers"]
    alarms: dict[str, Float[np.ndarray, " n"]]
    reflected: Reflected
    reflected_rows: Int[np.ndarray, " m"]
    missing: dict[str, str]

    def state(self) -> dict[str, Any]:
        """Everything as a tree for `sonde.files.save_bundle`."""
        return {
            "transfers": self.transfers.state(),
            "reflected": self.reflected.state(),
            "missing": self.missing,
            **{name: _tensors(getattr(self, name)) for name in _ARRAYS},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """What `state` returned."""
        arrays = {name: _arrays(state[name]) for name in _ARRAYS}
        transfers, reflected = Transfers.from_state(state["transfers"]), Reflected(**state["reflected"])
        return cls(transfers=transfers, reflected=reflected, missing=state["missing"], **arrays)

    def said(self, character: str, rows: str) -> ScoredRows:
        """The model's own log-odds on a character's test records, all of them or the disagreements."""
        chosen = self.alice == (character == "A")
        chosen = chosen & (self.truth != self.bob) if rows == "disagreements" else chosen
        return ScoredRows(self.says[chosen], self.truth[chosen], self.bases[chosen])

    def alarmed(self, name: str) -> ScoredRows:
        """How strange an alarm finds Bob's records (True) beside Alice's."""
        return ScoredRows(self.alarms[name], ~self.alice, self.bases)


_ARRAYS = ("says", "alice", "truth", "bob", "bases", "random", "shuffled", "alarms", "reflected_rows")


def measured(
    run: Run, model: Callable[[], LanguageModel], splits: Splits, config: "QuirkyElkConfig", number: int
) -> Measured:
    """Everything about one model, from the run folder where it is there; `model` is called only where it is not."""
    step = f"model-{number}"
    if not run.done(step):
        run.finish(step, _measured(run, model(), splits, config, step).state())
    return Measured.from_state(run.result(step))


def whole_bases(records: Records, n: int, seed: int) -> Records:
    """About `n` records with all those of their base rows: as many base rows as that takes, drawn at random."""
    values, counts = np.unique(records.rows, return_counts=True)
    if n > len(records):
        return records.sample(n, seed)  # which warns
    order = np.random.default_rng(seed).permutation(len(values))
    chosen = values[order[: int(np.searchsorted(counts[order].cumsum(), n)) + 1]]
    return records.take(np.isin(records.rows, chosen))


def split_bases(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """The records in two, by base row; the second has `share` of the base rows."""
    values = np.unique(records.rows)
    held = np.random.default_rng((seed, 1)).permutation(values)[: round(share * len(values))]
    inside = np.isin(records.rows, held)
    return records.take(~inside), records.take(inside)


def _measured(run: Run, lm: LanguageModel, splits: Splits, config: "QuirkyElkConfig", step: str) -> Measured:
    probing = whole_bases(splits.validation, round(config.train * (1 + HELD)), config.seed)
    test = whole_bases(splits.test, config.test, config.seed)
    test.require_disjoint(probing)
    fitting, held = split_bases(probing, HELD / (1 + HELD), config.seed)
    parts = {"fit": fitting, "held": held, "test": test}
    states = {name: _states(run, lm, records, f"{step}-{name}") for name, records in parts.items()}
    sets = {name: subsets(states[name], records) for name, records in parts.items()}
    names = [name for name in sets["fit"].samples if all(name in one.samples for one in sets.values())]
    train, kept, target = ({name: sets[part].samples[name] for name in names} for part in parts)
    first = config.probes[0]
    transfers = transfer(
        train,
        target,
        held=kept,
        probes=config.probes,
        trusted="A",
        seed=config.seed,
        progress="probes",
    )
    truth_probe = fit("logr", train["A"].states, train["A"].truth, seed=config.seed)
    layer = transfers.cell("logr", "A", "B").layer
    rows = np.random.default_rng(config.seed).permutation(len(test))[:REFLECTED]
    asked = test.take(rows)
    ids = prompt_ids(lm, asked.prompts)
    reflected = reflect(
        lm,
        ids,
        answer_tokens(lm, asked.prompts, ids, asked.answers),
        site=transfers.sites[layer],
        direction=truth_probe.direction[layer],
        mean=states["fit"].last[:, layer].mean(0),
        seed=config.seed,
        progress="reflections",
    )
    return Measured(
        transfers=transfers,
        says=states["test"].lm_log_odds.numpy(),
        alice=test.alice,
        truth=test.truth,
        bob=test.bob,
        bases=test.rows,
        random={
            rows: random_aurocs(train["A"], target["B"], draws=RANDOM, rows=rows, seed=config.seed)
            for rows in ("all", "disagreements")
        },
        shuffled=shuffled_aurocs(first, train["A"], target["B"], draws=SHUFFLED, seed=config.seed),
        alarms=_alarms(train, kept, states["test"], config.seed),
        reflected=reflected,
        reflected_rows=rows,
        missing={name: reason for one in sets.values() for name, reason in one.missing.items()},
    )


def _states(run: Run, lm: LanguageModel, records: Records, name: str) -> States:
    """States of records, from the run folder where they are there; always as they are kept, in half precision."""
    path = run.path("states", f"{name}.safetensors")
    if not path.exists():
        extract(lm, records.prompts, records.answers, progress=f"states, {name}").save(path)
    return States.load(path)


def _alarms(
    train: Mapping[str, Sample], held: Mapping[str, Sample], test: States, seed: int
) -> dict[str, Float[np.ndarray, " n"]]:
    """Strangeness of the test rows by what is watched: the log-odds of a probe of trusted rows, or random directions.

    Alarms are fitted on trusted rows that the probe has not seen.
    """
    found = {}
    for name in ("A", "AE"):
        if name in train:
            probe = fit("logr", train[name].states, train[name].truth, seed=seed)
            alarm = Alarm(seed=seed).fit(probe.log_odds(held[name].states))
            found[name] = alarm.score(probe.log_odds(test))
    generator = torch.Generator().manual_seed(seed)
    for draw in range(16):
        u = torch.randn(len(test.sites), test.d, generator=generator)
        alarm = Alarm(seed=seed).fit(torch.einsum("nld,ld->nl", held["A"].states.last, u))
        found[f"random-{draw}"] = alarm.score(torch.einsum("nld,ld->nl", test.last, u))
    return found


def _tensors(value: Any) -> Any:
    return {k: torch.from_numpy(v) for k, v in value.items()} if isinstance(value, dict) else torch.from_numpy(value)


def _arrays(value: Any) -> Any:
    return {k: v.numpy() for k, v in value.items()} if isinstance(value, dict) else value.numpy()
