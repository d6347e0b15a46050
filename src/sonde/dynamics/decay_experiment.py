"""One unit of a decay experiment: a joint phase, and from its end the drop, the revivals and the controls.

    joint      all tasks, N steps            its learning curve is control (i), the price of learning from scratch
    dropped    without B, M steps            from the joint point
    revivals   all tasks again               from the end of the drop and from earlier times, until the criterion
    continued  all tasks, M steps            control (ii): how far scores drift without a drop
    floor      without B, from scratch       control (iii): what B scores in a network that never read it
    alone      B alone, from scratch         control (iv): how hard B is

A unit has one seed for data, initial weights and order. Which point is branched from, and how the optimiser's state
crosses the switch, is in `sonde.dynamics.decay`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sonde.data.task_mixture import Mixture
from sonde.data.toy_languages import VOCAB, WIDTH, Name, toy_mixture, with_language
from sonde.dynamics.decay import Branching, Curve, Learner, Point, Rule, Stage, Switch
from sonde.dynamics.decay_metrics import HalfLife, area_under_decay, half_life, reached, savings, skill
from sonde.errors import SondeError
from sonde.nets.transformer import Transformer, TransformerShape

_REVIVAL = 4  # looks in each doubling of the steps, so that steps to the criterion are known to a fifth
_LONGEST = 256  # steps of a revival


@dataclass(frozen=True)
class Setting:
    """What a unit is: mixture, sizes, learner, lengths of the stages, what is dropped, seed.

    Attributes:
        mixture: A, B, C or D.
        languages: 10, or 2 to 4 of maps alone.
        width, layers, dropout: of the network; four heads.
        lr, weight_decay, optimizer: of the learner.
        steps: N of the joint phase. limit: in multiples of N, how long it may go on where a task is not learned.
        drop_steps: M.
        dropped: languages that are dropped, with translations from and into them, or names of tasks.
        everything_but: drop all but these instead.
        replay: share of the batch that dropped tasks keep.
        switch: of the optimiser's state.
        revive_from: times of the drop, beside its end, from which it is revived.
        seed: of data, initial weights and order.

    """

    mixture: Name = "B"
    languages: int = 4
    width: int = 96
    layers: int = 2
    dropout: float = 0.0
    lr: float = 1e-3
    weight_decay: float = 0.01
    optimizer: Rule = "adamw"
    steps: int = 900
    limit: int = 1
    drop_steps: int = 256
    dropped: tuple[str, ...] = ("digits",)
    everything_but: bool = False
    replay: float = 0.0
    switch: Switch = "reset"
    revive_from: tuple[int, ...] = (64,)
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 2 or self.drop_steps < 2 or self.limit < 1:
            raise SondeError(
                f"{self.steps} joint steps, {self.drop_steps} after the drop, a limit of {self.limit}: "
                "give 2, 2 and 1 or more"
            )
        if not 0 <= self.replay < 1:
            raise SondeError(f"a replay of {self.replay}: give a share from 0 to below 1")
        Stage("dropped", self.drop_steps, switch=self.switch)  # refuses an unknown switch before anything is trained
        for time in self.revive_from:
            if not 0 < time < self.drop_steps:
                raise SondeError(f"revival after {time} steps of a drop of {self.drop_steps}: give a time inside it")

    def joint(self) -> Mixture:
        """The mixture of the joint phase. Raises `SondeError` as `toy_mixture` does."""
        return toy_mixture(self.mixture, size=self.languages, width=WIDTH, seed=self.seed)

    def tasks_dropped(self, joint: Mixture) -> tuple[str, ...]:
        """The names of the tasks that the drop takes out; `translation` stands for all of it.

        Raises `SondeError` for names that the mixture does not have, and where nothing would be left.
        """
        named: list[str] = []
        for name in self.dropped:
            if name == "translation":
                found = tuple(task for task in joint.trained if ">" in task)
                if not found:
                    raise SondeError(f"mixture {self.mixture} has no translation to drop: C and D have")
                named += found
            elif name in joint.names and ">" in name:
                named.append(name)
            else:
                named += with_language(joint, name)
        chosen = tuple(dict.fromkeys(named))
        if self.everything_but:
            chosen = tuple(name for name in joint.trained if name not in chosen)
        joint.without(*chosen)
        return chosen

    def branching(self) -> Branching:
        """The network, its mixture and its learner, before the first step."""
        shape = TransformerShape(VOCAB, width=self.width, layers=self.layers, context=WIDTH, dropout=self.dropout)
        learner = Learner(self.lr, self.weight_decay, optimizer=self.optimizer, batch=self.batch)
        net = Transformer(shape, seed=self.seed)
        return Branching(module=net, joint=self.joint(), learner=learner, seed=self.seed)


@dataclass(frozen=True)
class Unit:
    """What came out: curves of all stages, and the points at the joint phase's end and at the drop's.

    `revivals` are by the step of the drop from which they start; `variants` by what was revived with at its end.
    """

    setting: Setting
    dropped: tuple[str, ...]
    learned: bool
    curves: Mapping[str, Curve]
    revivals: Mapping[int, Curve]
    variants: Mapping[str, Curve]
    before: Point
    after: Point

    def main(self) -> tuple[str, ...]:
        """The dropped languages themselves, without translations, where there are any: what scores are of."""
        return tuple(name for name in self.dropped if ">" not in name) or self.dropped

    def decay(self, measure: str = "exact") -> tuple[tuple[int, ...], np.ndarray]:
        """Times and one measure of the dropped tasks, their mean."""
        curve = self.curves["dropped"]
        return curve.times, curve.mean(self.main(), measure)

    def floor(self, measure: str = "loss") -> float:
        """What the dropped tasks score in the network that never read them."""
        return float(self.curves["floor"].mean(self.main(), measure)[-1])

    def skill(self, *, masked: bool = False, stage: str = "dropped") -> tuple[tuple[int, ...], np.ndarray]:
        """Times and normalised skill, 1 at the joint point and 0 at the floor. Raises `SondeError` as `skill` does."""
        measure = "masked_loss" if masked else "loss"
        curve = self.curves[stage]
        return curve.times, skill(curve.mean(self.main(), measure), floor=self.floor(measure))

    def half_life(self, measure: str = "exact") -> HalfLife:
        """Half-life of a measure of the dropped tasks, or of `skill` or `masked_skill`."""
        if measure.endswith("skill"):
            return half_life(*self.skill(masked=measure == "masked_skill"))
        return half_life(*self.decay(measure))

    def savings(self, since: int | None = None) -> tuple[float, str]:
        """Savings ratio of the revival that starts after `since` steps of the drop, its end by default."""
        scratch = self.curves["joint"]
        curve = self.revivals[self.setting.drop_steps if since is None else since]
        return savings(
            scratch.first(self.main(), reached),
            curve.first(self.main(), reached),
            scratch_until=scratch.times[-1],
            revival_until=curve.times[-1],
        )

    def summary(self) -> dict[str, Any]:
        """A row of the tidy table: the setting and all numbers of the unit; None where one cannot be measured."""
        row: dict[str, Any] = {
            key: ",".join(map(str, value)) if isinstance(value, tuple) else value
            for key, value in asdict(self.setting).items()
        }
        joint, drop = self.curves["joint"], self.curves["dropped"]
        row |= {
            "learned": self.learned,
            "joint_steps": joint.times[-1],
            "tokens": joint.tokens * joint.times[-1],
            "least_exact": min(s["exact"] for name, s in joint.scores[-1].items() if self._trained(name)),
            "scratch_steps": joint.first(self.main(), reached),
            "floor_loss": self.floor(),
            "floor_exact": self.floor("exact"),
            "final_exact": float(drop.mean(self.main())[-1]),
            "final_masked_exact": float(drop.mean(self.main(), "masked_exact")[-1]),
        }
        for name in ("exact", "masked_exact", "skill", "masked_skill"):
            try:
                life = self.half_life(name)
                by_rows = name.endswith("exact")
                times, values = self.decay(name) if by_rows else self.skill(masked=name == "masked_skill")
                row |= {
                    f"half_life_{name}": life.time,
                    f"censored_{name}": life.censored,
                    f"crossings_{name}": life.crossings,
                    f"aud_{name}": area_under_decay(times, values),
                    f"retention_{name}": float(values[-1]),
                }
            except SondeError as error:
                row |= {f"half_life_{name}": None, f"why_{name}": str(error)}
        if "continued" in self.curves and row.get("half_life_skill") is not None:
            row["continued_skill"] = float(self.skill(stage="continued")[1][-1])
        row |= self._held_out()
        for since in self.revivals:
            try:
                row[f"savings_{since}"], row[f"savings_sign_{since}"] = self.savings(since)
            except SondeError:
                row[f"savings_{since}"] = None
        return row

    def _trained(self, name: str) -> bool:
        return self.setting.mixture != "D" or name != self._pairs()[0]

    def _pairs(self) -> list[str]:
        """All translations; in mixture D the first is the one that is held out."""
        return [name for name in self.curves["joint"].scores[-1] if ">" in name]

    def _held_out(self) -> dict[str, Any]:
        """In mixture D: zero-shot translation of the held-out pair before, midway and after.

        Where translation was dropped, its half-life as well, beside that of the trained pairs.
        """
        if self.setting.mixture != "D":
            return {}
        held, *others = self._pairs()
        curve = self.curves["dropped"]
        own = curve.of(held)
        row: dict[str, Any] = {
            "zero_shot_before": float(own[0]),
            "zero_shot_middle": float(own[len(own) // 2]),
            "zero_shot_after": float(own[-1]),
        }
        dropped = [name for name in others if name in self.dropped]
        if dropped:
            for key, values in (("held_out", own), ("pair", curve.mean(dropped))):
                try:
                    row[f"{key}_half_life"] = half_life(curve.times, values).time
                except SondeError:
                    row[f"{key}_half_life"] = None
        return row

    def rows(self) -> list[dict[str, Any]]:
        """All scores of all stages as rows of a tidy table."""
        label = {name: getattr(self.setting, name) for name in ("mixture", "seed", "weight_decay")}
        curves = [*self.curves.items(), *((f"revived-{t}", c) for t, c in self.revivals.items())]
        curves += [(f"revived-{name}", curve) for name, curve in self.variants.items()]
        return [row for name, curve in curves for row in replace(curve, stage=name).rows(**label)]

    def tree(self) -> dict[str, Any]:
        """The unit as `sonde.files.save_bundle` takes it."""
        return {
            "setting": asdict(self.setting),
            "dropped": list(self.dropped),
            "learned": self.learned,
            "curves": {name: curve.tree() for name, curve in self.curves.items()},
            "revivals": {str(time): curve.tree() for time, curve in self.revivals.items()},
            "variants": {name: curve.tree() for name, curve in self.variants.items()},
            "before": self.before.weights,
            "after": self.after.weights,
        }

    @classmethod
    def of_tree(cls, tree: Mapping[str, Any]) -> "Unit":
        """What `tree` made. The points have no state of the optimiser."""
        setting: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in tree["setting"].items()
        }
        curves = {name: Curve.of_tree(curve) for name, curve in tree["curves"].items()}
        return cls(
            setting=Setting(**setting),
            dropped=tuple(tree["dropped"]),
            learned=tree["learned"],
            curves=curves,
            revivals={int(time): Curve.of_tree(curve) for time, curve in tree["revivals"].items()},
            variants={name: Curve.of_tree(curve) for name, curve in tree["variants"].items()},
            before=Point(tree["before"], steps=curves["joint"].times[-1]),
            after=Point(tree["after"], steps=curves["joint"].times[-1] + curves["dropped"].times[-1]),
        )


def run_unit(
    setting: Setting,
    *,
    floor_steps: int | None = None,
    drift_steps: int | None = None,
    variants: bool = False,
    alone: bool = False,
    folder: Path | None = None,
    progress: bool = False,
) -> Unit:
    """Run all stages of a unit. An interrupted one goes on from the checkpoints in `folder`.

    `drift_steps` shortens control (ii), M by default, and `floor_steps` control (iii), N by default; `variants` adds
    revivals on B alone and on 16 rows of it, `alone` control (iv). A joint phase that fails is not left out: `learned`
    is False, and all is measured.
    """
    branching = setting.branching()
    joint, dropped = branching.joint, setting.tasks_dropped(branching.joint)
    start = branching.start()

    def file(name: str) -> Path | None:
        return None if folder is None else folder / f"{name}.safetensors"

    def run(stage: Stage, point: Point, **given: Any) -> tuple[Point, Curve]:
        label = stage.name if progress else None
        return branching.run(stage, point, checkpoint=file(stage.name), progress=label, **given)

    before, learning, learned = branching.learn(setting.steps, limit=setting.limit, checkpoint=file("joint"))
    at: dict[int, Any] = dict.fromkeys(setting.revive_from)
    drop = Stage("dropped", setting.drop_steps, drop=dropped, replay=setting.replay, switch=setting.switch)
    after, decay = run(drop, before, keep=at)
    curves = {"joint": learning, "dropped": decay}
    _, curves["continued"] = run(
        replace(drop, name="continued", drop=(), replay=0.0, steps=drift_steps or drop.steps), before
    )
    _, curves["floor"] = run(Stage("floor", floor_steps or setting.steps, drop=dropped, per_octave=1), start)
    main = [name for name in dropped if ">" not in name] or list(dropped)
    if alone:
        _, curves["alone"] = run(Stage("alone", setting.steps, only=tuple(main), per_octave=_REVIVAL), start)
    again = Stage("revived", min(_LONGEST, setting.steps), switch=setting.switch, per_octave=_REVIVAL)
    until = (main, reached)
    revivals = {}
    for time, point in {**at, setting.drop_steps: after}.items():
        _, revivals[time] = run(replace(again, name=f"revived-{time}"), point, until=until)
    more = {}
    if variants:
        alone_again = replace(again, only=tuple(main))
        _, more["B only"] = run(replace(alone_again, name="revived-only"), after, until=until)
        few = few_rows(joint, main, 16, seed=setting.seed)
        _, more["16 rows of B"] = run(replace(alone_again, name="revived-few"), after, until=until, joint=few)
    return Unit(setting, dropped, learned, curves, revivals, more, before, after)


def few_rows(joint: Mixture, tasks: Sequence[str], count: int, *, seed: int) -> Mixture:
    """The mixture with no more than `count` rows to train each of `tasks` on."""
    chosen = {}
    for name in tasks:
        task = joint.task(name)
        place = np.random.default_rng((seed, count)).permutation(len(task.rows))[:count]
        chosen[name] = replace(task, rows=task.rows[place])
    return Mixture(tuple(chosen.get(task.name, task) for task in joint.tasks), dict(joint.shares))
