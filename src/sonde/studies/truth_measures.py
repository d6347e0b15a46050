"""Where does a model hold whether a statement is true? States of true and false statements, probes, controls, alarm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int

from sonde.data.statements import Statements, split_by_base
from sonde.errors import SondeError
from sonde.knowledge.anomaly import Alarm
from sonde.knowledge.probes import fit
from sonde.knowledge.samples import Sample
from sonde.knowledge.states import States, answer_tokens, extract
from sonde.knowledge.transfer import Transfers, random_aurocs, shuffled_aurocs, transfer
from sonde.lm.model import LanguageModel

ANSWERS = ((" False", " True"), (" false", " true"), (" No", " Yes"), (" no", " yes"))
RANDOM, SHUFFLED = 256, 8


@dataclass(frozen=True)
class Truth:
    """What probes read of several sets of statements.

    Attributes:
        transfers: every probe from every set to every set.
        random: AUROC of random directions within each set.
        shuffled: AUROC of the first probe within each set, fitted on shuffled labels.
        strange: for each set's test rows, the share of trusted statements at least as strange to an alarm that knows
            the first set only.
        rows: places of each set's test rows among its statements.

    """

    transfers: Transfers
    random: dict[str, Float[np.ndarray, "draws layers"]]
    shuffled: dict[str, Float[np.ndarray, "draws layers"]]
    strange: dict[str, Float[np.ndarray, " n"]]
    rows: dict[str, Int[np.ndarray, " n"]]

    def state(self) -> dict[str, Any]:
        """Everything as a tree for `sonde.files.save_bundle`."""
        arrays = {name: getattr(self, name) for name in ("random", "shuffled", "strange", "rows")}
        return {
            "transfers": self.transfers.state(),
            **{name: {k: torch.from_numpy(v) for k, v in one.items()} for name, one in arrays.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """What `state` returned."""
        arrays = {name: {k: v.numpy() for k, v in one.items()} for name, one in state.items() if name != "transfers"}
        return cls(Transfers.from_state(state["transfers"]), **arrays)


def answers_of(lm: LanguageModel, given: Sequence[str] = ()) -> tuple[str, str]:
    """The negative and the positive answer: those given, or the first pair that are single tokens.

    Raises `SondeError` for answers that are not one token each, or not two.
    """
    if given and len(given) != 2:
        raise SondeError(f"--answers takes two, the negative and the positive, not {' '.join(given)}")
    for pair in ((given[0], given[1]),) if given else ANSWERS:
        try:
            answer_tokens(lm, ["It is."], [lm.encode("It is.")], [pair])
        except SondeError:
            if given:
                raise
            continue
        return pair
    raise SondeError(
        f"{lm.name} has none of {', '.join('/'.join(pair) for pair in ANSWERS)} as single tokens: "
        "name two with --answers"
    )


def statement_states(
    lm: LanguageModel, one: Statements, answers: tuple[str, str], *, progress: str | None = None
) -> States:
    """States at the end of each statement, and behind each of the two answers to it."""
    return extract(lm, list(one.texts), answers, progress=progress)


def measure(sets: Sequence[Statements], states: Mapping[str, States], *, probes: Sequence[str], seed: int = 0) -> Truth:
    """Fit every probe on half of each set's bases, choose layers on a fifth, and read all sets on the rest.

    Raises `SondeError` for sets of one name, and for sets too small to be split by base.
    """
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise SondeError(f"two sets of statements have one name: {', '.join(names)}")
    numbers = {base: i for i, base in enumerate(dict.fromkeys(base for one in sets for base in one.bases))}
    whole = {
        one.name: Sample(one.name, states[one.name], one.labels, np.array([numbers[base] for base in one.bases]))
        for one in sets
    }
    parts = dict(zip(names, split_by_base(sets, seed=seed), strict=True))
    train, held, test = ({name: whole[name].take(parts[name][i]) for name in names} for i in range(3))
    found = transfer(train, test, held=held, probes=probes, trusted=names[0], seed=seed, progress="probes")
    trusted = fit("logr", train[names[0]].states, train[names[0]].truth, seed=seed)
    alarm = Alarm(held_out=0.5, seed=seed).fit(trusted.log_odds(held[names[0]].states))
    return Truth(
        found,
        {name: random_aurocs(train[name], test[name], draws=RANDOM, seed=seed) for name in names},
        {name: shuffled_aurocs(probes[0], train[name], test[name], draws=SHUFFLED, seed=seed) for name in names},
        {name: alarm.p_values(trusted.log_odds(test[name].states)) for name in names},
        {name: parts[name][2] for name in names},
    )
