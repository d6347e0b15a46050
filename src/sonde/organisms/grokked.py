"""`organism:grokked-113`: a one-layer transformer that grokked addition modulo 113, with checkpoints of its training.

What is true of it is in its logits: sums of cos w_k(a+b-c) at a few frequencies. It is no language model; its folder
has `history.safetensors`, which `load_history` reads, and the card.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import folder_of, organism

if TYPE_CHECKING:
    from sonde.dynamics.grokking import History

HISTORY = "history.safetensors"
_KEPT = (0.0, 0.04, 0.1, 0.18, 0.26, 0.34, 0.4, 0.6, 1.0)  # of the steps: the checkpoints that are bundled


@dataclass(frozen=True)
class GrokkedConfig:
    """Train a one-layer transformer on addition modulo P until it groks, in about 5 minutes on one core.

    Example: sonde organism train grokked-113 --out my-grokked
    """

    modulus: Annotated[int, arg(metavar="N")] = 113
    """P: the network adds numbers modulo P."""
    steps: Annotated[int, arg(metavar="N")] = 5000
    """Training steps on the full batch."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("grokked-113")
    """Where history, card and checkpoint are written."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the split and of the weights."""

    @property
    def command(self) -> str:
        """The command line that makes the same organism."""
        return recipe_command("grokked-113", self)


@organism(
    "grokked-113",
    summary="a one-layer transformer that grokked addition modulo 113, with its training history; no language model",
    paper="Nanda et al. 2023, Progress Measures for Grokking via Mechanistic Interpretability (arXiv:2301.05217)",
)
def train_grokked(config: GrokkedConfig) -> Path:
    """Train, keep nine checkpoints, measure and describe. Returns the folder. Resumes from what is in it.

    Raises `SondeError` for options that do not fit.
    """
    from sonde.data.modular import ModularTask
    from sonde.dynamics.grokking import Grokking, grok
    from sonde.nets.one_layer import Shape

    settings = Grokking(
        task=ModularTask(config.modulus, seed=config.seed),
        shape=Shape(config.modulus),
        steps=config.steps,
        seed=config.seed,
    )
    config.out.mkdir(parents=True, exist_ok=True)
    whole = grok(settings, folder=config.out / "training", progress="grokking")
    export(whole, config)
    return config.out


def export(whole: "History", config: GrokkedConfig) -> None:
    """Write the bundled part of a history, and the card with the measures of all of it."""
    from sonde.dynamics.circuit_report import circuit_report
    from sonde.dynamics.grokking import grid_of, phases, trace
    from sonde.organisms.card import write_card
    from sonde.stats.intervals import wilson

    settings, network = whole.settings, whole.network()
    thinned(whole).save(config.out / HISTORY)
    grid = grid_of(network, settings.task)
    keys = grid.key_frequencies()
    points = trace(whole, keys, progress="measuring")
    found, report = phases(points, config.modulus), circuit_report(network, settings.task, keys)
    tested = int((~settings.task.trained).sum())
    right = wilson(round(points[-1].measures.accuracy_test * tested), tested)
    last = points[-1].measures
    write_card(
        config.out,
        {
            "name": "grokked-113",
            "summary": "A one-layer transformer without layer norm that adds numbers modulo "
            f"{config.modulus}; it memorised first and generalised later. No language model.",
            "truth": [
                f"Its key frequencies are {', '.join(map(str, sorted(keys)))}: {last.trig_fve:.1%} of the variance of "
                "its logits is a sum of cos w(a+b-c) at these.",
                f"{found.says[0].upper()}{found.says[1:]}; cleanup "
                + (f"from step {found.cleanup[0]} to {found.cleanup[1]}." if found.cleanup else "was not seen."),
                f"{report.clustered:.1%} of its neurons belong to one frequency each.",
                f"Without its circuit the loss on trained pairs is {last.excluded:.2g} nats; with the circuit alone it "
                f"is {last.restricted['test']:.2g} on pairs that it was not trained on.",
            ],
            "command": config.command,
            "architecture": {
                "family": "one-layer transformer, ReLU, no layer norm, no biases but the MLP's",
                "layers": 1,
                "width": settings.shape.width,
                "parameters": sum(p.numel() for p in network.parameters()),
                "stored_as": "float16, the last checkpoint float32",
            },
            "data": {
                "task": f"a + b modulo {config.modulus}",
                "pairs_trained_on": int(settings.task.trained.sum()),
                "pairs_tested_on": tested,
            },
            "training": {
                "steps": settings.steps,
                "checkpoints": [str(step) for step in thinned(whole).steps],
                "optimizer": f"AdamW, learning rate {settings.lr:g}, weight decay {settings.weight_decay:g}",
                "seed": settings.seed,
                "train_loss_nats": float(f"{last.train:.3g}"),
                "test_loss_nats": float(f"{last.test:.3g}"),
            },
            "behaviour": [{"what": "pairs it was not trained on, added right", "rate": asdict(right)}],
            "sampling": {"temperature": 0.0, "seed": 0},
            "samples": _samples(network, settings.task),
        },
    )


def thinned(whole: "History") -> "History":
    """Nine checkpoints of a history, in half precision but for the last."""
    from sonde.dynamics.grokking import History

    steps, final = whole.steps, whole.steps[-1]
    chosen = sorted({min(range(len(steps)), key=lambda i, at=at: abs(steps[i] - at * final)) for at in _KEPT})
    states = tuple(
        {name: tensor if i == chosen[-1] else tensor.half() for name, tensor in whole.states[i].items()} for i in chosen
    )
    return History(whole.settings, tuple(steps[i] for i in chosen), states)


def load_history(organism: str | Path = "grokked-113") -> "History":
    """The checkpoints of a bundled grokked network, by name, or of a folder that its recipe wrote.

    Raises `SondeError` when there are none.
    """
    from sonde.dynamics.grokking import History

    folder = Path(organism) if Path(organism).is_dir() else folder_of(str(organism).removeprefix("organism:"))
    if not (folder / HISTORY).is_file():
        raise SondeError(f"{organism} has no {HISTORY}: it is no network with a training history")
    return History.load(folder / HISTORY)


def _samples(network: Any, task: Any) -> list[dict[str, str]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    chosen = (~task.trained).nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=generator)[:3]]
    answers = network(task.pairs[chosen])[:, :-1].argmax(-1)
    return [
        {"prompt": f"{a} + {b} =", "text": f" {answer}"}
        for (a, b), answer in zip(task.pairs[chosen].tolist(), answers.tolist(), strict=True)
    ]
