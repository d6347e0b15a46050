"""Timing of two or more ways to do the same work, in turn, so that a drifting machine hits all of them alike.

A ratio is the median over rounds of (time of the way) / (time of the baseline in the same round); the quartiles say how
noisy the machine was.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the paired ratios to the baseline, and the median time in milliseconds."""

    median: float
    low: float
    high: float
    milliseconds: float

    def __str__(self) -> str:
        return f"{self.median:6.2f}  ({self.low:.2f} to {self.high:.2f})  {self.milliseconds:9.2f} ms"


def interleave(ways: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3) -> dict[str, Ratio]:
    """Call every way once a round, in an order that turns, and compare each with the first, the baseline.

    CPU time of the process, so that a machine that is busy with other work does not count.
    """
    names = list(ways)
    for _ in range(warmup):
        for name in names:
            ways[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            start = time.process_time()
            ways[name]()
            times[name].append(time.process_time() - start)
    base = times[names[0]]
    ratios = {}
    for name in names:
        paired = sorted(mine / its for mine, its in zip(times[name], base, strict=True))
        low, _, high = statistics.quantiles(paired, n=4)
        ratios[name] = Ratio(statistics.median(paired), low, high, 1e3 * statistics.median(times[name]))
    return ratios


def machine() -> str:
    """One line on what the numbers were measured on."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}"
    )
