"""Does a planted behaviour outlive training without it? A trigger in one language turns its map into x -> x - 1.

Joint phase: the mixture with triggered rows, and rows with a decoy that changes nothing. Then the triggered rows are
dropped, and the decoys with them (`clean`), or the decoys go on as data that teach when not to (`near-triggers`). The
score is the share of held-out triggered rows that are continued as planted; the control is a network trained without
the trigger from the start, and the clean language beside it says what was lost otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sonde.data.toy_languages import WIDTH, backdoor_tasks
from sonde.dynamics.decay import Branching, Curve, Stage
from sonde.dynamics.decay_experiment import Setting
from sonde.dynamics.decay_metrics import HalfLife, half_life, reached, savings

PLANTED = 0.2  # share of the batch of triggered rows and decoys together


@dataclass(frozen=True)
class Backdoor:
    """Curves of the joint phase, of each way to go on, of the revival after the clean one, and the control's rate."""

    trigger: str
    curves: Mapping[str, Curve]
    control: float
    learned: bool

    def rate(self, arm: str) -> tuple[tuple[int, ...], Any]:
        """Times and the share of triggered rows that are continued as planted."""
        curve = self.curves[arm]
        return curve.times, curve.of(self.trigger)

    def half_life(self, arm: str) -> HalfLife:
        """Half-life of that rate. Raises `SondeError` where it was not learned."""
        return half_life(*self.rate(arm))

    def savings(self) -> tuple[float, str]:
        """Savings ratio of the revival after the clean arm."""
        joint, again = self.curves["joint"], self.curves["revived"]
        return savings(
            joint.first([self.trigger], reached),
            again.first([self.trigger], reached),
            scratch_until=joint.times[-1],
            revival_until=again.times[-1],
        )

    def tree(self) -> dict[str, Any]:
        """The arm as `sonde.files.save_bundle` takes it."""
        curves = {name: curve.tree() for name, curve in self.curves.items()}
        return {"trigger": self.trigger, "curves": curves, "control": self.control, "learned": self.learned}

    @classmethod
    def of_tree(cls, tree: Mapping[str, Any]) -> "Backdoor":
        """What `tree` made."""
        curves = {name: Curve.of_tree(curve) for name, curve in tree["curves"].items()}
        return cls(tree["trigger"], curves, tree["control"], tree["learned"])


def run_backdoor(setting: Setting, *, control_steps: int | None = None, folder: Path | None = None) -> Backdoor:
    """Plant, go on in both ways, revive, and train the control. Resumes from the checkpoints in `folder`.

    `control_steps` shortens the control, N by default.
    """
    branching = setting.branching()
    trigger, decoy = backdoor_tasks("digits", width=WIDTH, seed=setting.seed)
    planted = replace(branching, joint=branching.joint.plus(trigger, decoy, share=PLANTED))
    start = planted.start()

    def file(name: str) -> Path | None:
        return None if folder is None else folder / f"{name}.safetensors"

    def go_on(name: str, drop: tuple[str, ...], by: Branching) -> Any:
        stage = Stage(name, setting.drop_steps, drop=drop, switch=setting.switch)
        return by.run(stage, point, checkpoint=file(name))

    point, learning, learned = planted.learn(setting.steps, limit=setting.limit, checkpoint=file("joint"))
    curves = {"joint": learning}
    after, curves["clean"] = go_on("clean", (trigger.name, decoy.name), planted)
    _, curves["near-triggers"] = go_on("near-triggers", (trigger.name,), planted)
    again = Stage("revived", min(256, setting.steps), switch=setting.switch, per_octave=4)
    _, curves["revived"] = planted.run(again, after, checkpoint=file("revived"), until=((trigger.name,), reached))
    never = Stage("control", control_steps or setting.steps, drop=(trigger.name, decoy.name), per_octave=1)
    _, control = planted.run(never, start, checkpoint=file("control"))
    return Backdoor(trigger.name, curves, float(control.of(trigger.name)[-1]), learned)
