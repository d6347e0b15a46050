"""The numbers of the study of quirky models, over all its models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.errors import SondeError
from sonde.knowledge.recovered_gap import mean_auroc
from sonde.knowledge.tables import Undefined
from sonde.knowledge.transfer import Rows, Transfers, pooled_auroc
from sonde.runs.finding import Control, Finding
from sonde.runs.run import Run
from sonde.stats.intervals import Interval
from sonde.studies.knowledge_blocks import percentiles
from sonde.studies.quirky_elk_measures import Measured

if TYPE_CHECKING:
    from sonde.studies.quirky_elk import QuirkyElkConfig

CITE = "Mallen et al. 2023, arXiv:2312.01037"


class Written:
    """The chapters of one study, over all its models."""

    def __init__(self, found: Sequence[Measured], run: Run, config: "QuirkyElkConfig", command: str) -> None:
        self.found, self.run, self.config, self.command = list(found), run, config, command
        self.transfers = [one.transfers for one in found]
        self.first: Transfers = self.transfers[0]
        self.probe = config.probes[0]

    def finding(self, measured: Interval | Undefined, **fields: Any) -> Finding:
        """A finding; refused, with the reason, where there is no number."""
        if isinstance(measured, Undefined):
            fields = {key: value for key, value in fields.items() if key not in ("control", "control_reason")}
            return Finding(refused=measured.reason, command=self.command, **fields)
        return Finding.of(measured, command=self.command, **fields)

    def auroc(self, train: str, test: str, *, layer: int | None = None, rows: Rows = "all", probe: str = "") -> Any:
        """AUROC of a probe, by default the first, averaged over the models."""
        return pooled_auroc(self.transfers, probe or self.probe, train, test, layer=layer, rows=rows)

    def curve(self, train: str, test: str, rows: Rows = "all") -> list[Interval | Undefined]:
        """The same at every layer."""
        return [self.auroc(train, test, layer=layer, rows=rows) for layer in range(len(self.first.sites))]

    def random(self, rows: str = "all") -> np.ndarray:
        """AUROC of random directions, `[draws layers]`, of all models."""
        return np.concatenate([one.random[rows] for one in self.found])

    @property
    def layers(self) -> list[int]:
        """The earliest informative layer of the first probe from Alice's records, of each model."""
        return [one.cell(self.probe, "A", "B").layer for one in self.transfers]

    def random_at_layer(self) -> Control:
        """What random directions read at the layer where the probe is read."""
        drawn = self._random_draws("all", self.layers)
        return Control("random directions", float(drawn.mean()), percentiles(drawn))

    def random_spread(self, rows: str, *, last: bool = False) -> Interval | Undefined:
        """Mean of random directions' AUROC, from the 2.5th to the 97.5th percentile; `n` counts directions."""
        drawn = self._random_draws(rows, [-1] * len(self.found) if last else self.layers)
        if not np.isfinite(drawn).all():
            return Undefined(f"random directions: Bob's {rows} are of one class")
        return Interval(float(drawn.mean()), *percentiles(drawn), len(drawn))

    def _random_draws(self, rows: str, layers: Sequence[int]) -> np.ndarray:
        return np.concatenate([one.random[rows][:, layer] for one, layer in zip(self.found, layers, strict=True)])

    def said(self, side: str, rows: str) -> Interval | Undefined:
        """AUROC of the model's own log-odds on the records of A (Alice) or B (Bob)."""
        try:
            return mean_auroc([one.said(side, rows) for one in self.found])
        except SondeError as error:
            return Undefined(f"{side}, {rows}: {error}")

    def says_to_bob(self, rows: str) -> Control:
        """The same on Bob's records, as a control."""
        said = self.said("B", rows)
        return Control.of("what it says to Bob", said) if isinstance(said, Interval) else Control("chance", 0.5)


def above(one: Interval | Undefined) -> bool:
    """Whether an AUROC is clear of chance."""
    return isinstance(one, Interval) and one.low > 0.5
