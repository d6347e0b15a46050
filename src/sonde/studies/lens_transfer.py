"""Does a lens that was trained on a base model still read a fine-tuned version of it?

The translators of the base model's lens are put before the unembedding of the fine-tuned model, and read it on the text
that it was tuned to: against its logit lens, and against a lens that was trained on it. Which layers of the base model
can be read with each other's translators is in the second chapter. Without a fine-tuned model one is made: the base
model reads the source code of Python's standard library for a minute.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, halves, open_run, publish, read_text

if TYPE_CHECKING:
    from sonde.lens.descent import LensTraining
    from sonde.lens.evaluation import AttachReport
    from sonde.lens.tuned import TunedLens
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.finding import Finding
    from sonde.runs.run import Run

_CODE = "Python's source code"
_STEP_TOKENS = 4096
_MUON_LR, _ADAM_LR = 0.01, 2e-3
_PAPER = "Belrose et al. 2023, arXiv:2303.08112"


@dataclass(frozen=True)
class LensTransferConfig(Runnable):
    """Read a fine-tuned model with the lens of its base model.

    Example: sonde run lens-transfer base-model/ --tuned tuned-model/ --other reviews.txt
    """

    words = ("sonde", "run", "lens-transfer")

    model: Model
    """The base model: a local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    tuned: Annotated[str | None, arg(metavar="MODEL")] = None
    """A fine-tuned version of it. By default the base model is fine-tuned on the other text, within the run."""
    text: Text = None
    """What the base model's lens is trained on. By default the help texts of Python."""
    other: Text = None
    """What the fine-tuned model was tuned to, and is read on. By default the source code of Python's library."""
    tokens: Count = 65536
    """How many tokens of each text are read by lenses: half to train, half to score."""
    steps: Count = 60
    """Steps of fine-tuning, of 4096 tokens each; not used with --tuned."""
    trainer: Name = None
    """How lenses are trained: ridge+muon (the default), ridge (closed form, fastest), ridge+adam, muon, adam, sgd."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    seed: Count = 0
    """Seed of everything that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "lens-transfer",
    summary="the lens of a base model on a fine-tuned version of it, and each layer's translator on the other layers",
    paper="Belrose et al. 2023, Eliciting Latent Predictions from Transformers with the Tuned Lens (arXiv:2303.08112)",
)
def lens_transfer(config: LensTransferConfig) -> Path:
    """Fine-tune (or load), train the lenses, compare them and write the report. Returns its path.

    Raises `SondeError` for anything wrong with models, texts or folder, and models that do not belong together.
    """
    from sonde.data.text import describe
    from sonde.lens.descent import LensTraining, Trainer
    from sonde.lens.evaluation import attach_report
    from sonde.lens.tuned import TunedLens
    from sonde.organisms.loading import load
    from sonde.studies.tuned_lens import transfer_chapter

    check_options(config)
    settings = LensTraining(trainer=cast(Trainer, config.trainer or LensTraining.trainer), seed=config.seed)
    if config.steps < 1:
        raise SondeError(f"--steps is {config.steps}: fine-tuning takes 1 step or more")
    lm = load(config.model, dtype=config.dtype, device=config.device)
    text = read_text(config, lm)
    fit, held = halves(text, describe(config.text))
    name = describe(config.other) if config.other else _CODE
    tuning, other = _other_text(config, lm)
    other_fit, other_held = halves(other, name)
    given = load(config.tuned, dtype=config.dtype, device=config.device) if config.tuned else None
    if given is not None:
        TunedLens.logit(lm).check_fits(given, f"the lens of {lm.name}", lm.family)
    with open_run("lens-transfer", config, lm) as run:
        tuned = _fine_tuned(run, config, lm, tuning) if given is None else given
        lens = _trained(run, lm, fit, "base", settings)
        own = _trained(run, tuned, other_fit, "own", settings)
        report = attach_report(lens, lm, tuned, other_held, own=own, progress="scoring")
        command = shlex.join(config.command())
        chapters = [_attached(report, lm, tuned, name, command), transfer_chapter(lm, held, lens, command)]
        return publish(
            run,
            lm,
            text,
            chapters,
            title=f"The lens of {lm.name} on {tuned.name}",
            source=f"{describe(config.text)}; {name}",
            timings=dict(run.timings),
        )


def _other_text(config: LensTransferConfig, lm: "LanguageModel") -> "tuple[TokenBatches, TokenBatches]":
    """What is fine-tuned on (not used with --tuned), and behind it what lenses read."""
    from sonde.data.python_docs import sources
    from sonde.lm.batches import TokenBatches

    assert lm.tokenizer is not None
    tuning = 0 if config.tuned else config.steps * _STEP_TOKENS
    base = read_text(config, lm)
    whole = TokenBatches(
        config.other if config.other else sources(),
        lm.tokenizer,
        context=base.context,
        rows=max(1, _STEP_TOKENS // base.context),
        limit_tokens=tuning + config.tokens,
    )
    if config.tuned:
        return whole, whole
    rest, read = whole.split(config.tokens / (tuning + config.tokens))
    return rest, read


def _fine_tuned(run: "Run", config: LensTransferConfig, lm: "LanguageModel", text: "TokenBatches") -> "LanguageModel":
    """The base model after `steps` steps on a text; kept in the run folder."""
    import torch
    from torch.nn import functional as F

    from sonde.lm.model import LanguageModel
    from sonde.nets.loop import Schedule, train
    from sonde.organisms.loading import load
    from sonde.organisms.small_lm import Training, optimizers_for

    folder, name = run.path("tuned"), f"{lm.name} fine-tuned"
    if run.done("fine-tune"):
        return load(folder, dtype=config.dtype, device=config.device, name=name)
    model = load(config.model, dtype="float32", device=config.device, check=False).model.requires_grad_(True)
    batches = list(text)
    torch.manual_seed(config.seed)

    def loss_of_step(step: int) -> torch.Tensor:
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(config.seed))
        tokens = batches[int(order[step % len(batches)])].tokens.to(lm.device)
        logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())

    def report(step: int, loss: float) -> None:
        run.metric(step=step, stage="fine-tune", loss=loss)
        run.progress("fine-tune", done=step + 1, total=config.steps)

    model.train()
    train(
        model,
        loss_of_step,
        optimizers_for(model, Training(muon_lr=_MUON_LR, adam_lr=_ADAM_LR, weight_decay=0.0)),
        steps=config.steps,
        schedule=Schedule(warmup=0.05, decay=0.5),
        clip=1.0,
        checkpoint=run.checkpoint("fine-tune"),
        every=20,
        identity={"steps": config.steps, "seed": config.seed, "text": text.hash, "model": lm.hash},
        report=report,
        progress="fine-tuning",
    )
    tuned = LanguageModel(model, lm.tokenizer, name=name)
    tuned.model.save_pretrained(folder)
    assert lm.tokenizer is not None
    lm.tokenizer.save_pretrained(folder)
    run.finish("fine-tune")
    return load(folder, dtype=config.dtype, device=config.device, name=name)


def _trained(run: "Run", lm: "LanguageModel", fit: "TokenBatches", name: str, settings: "LensTraining") -> "TunedLens":
    from sonde.lens.tuned import TunedLens

    folder, step = run.path("lenses", name), f"lens-{name}"
    if run.done(step):
        return TunedLens.load(folder, lm)
    lens = TunedLens.fit(lm, fit, settings, checkpoint=run.checkpoint(step), progress=f"{name} lens")
    lens.save(folder)
    run.finish(step)
    return lens


def _attached(
    report: "AttachReport", lm: "LanguageModel", tuned: "LanguageModel", text: str, command: str
) -> "Chapter":
    """The base model's lens on the fine-tuned model: distance to its prediction, and loss beside its own lens."""
    from sonde.runs.blocks import Chapter, Column, Table
    from sonde.runs.report.numbers import number
    from sonde.stats.information import bits
    from sonde.studies.chapters.depth import kl_chart

    scores = report.tuned
    findings = [_closer(report, command), _cost(report, command)]
    losses = [scored.bits_per_byte(scored.cross_entropy[-1].estimate) for scored in (report.base, scores["own"])]
    labels = {"own": "lens trained on it", "attached": "lens of the base model", "logit": "logit lens"}
    return Chapter(
        id="attach",
        question="Does the base model's lens still read the fine-tuned model?",
        answer=f"{findings[0].sentence} {findings[1].sentence}",
        findings=findings,
        blocks=[
            kl_chart(
                {label: scores[name].kl for name, label in labels.items()},
                title=findings[0].sentence,
                name="attach.kl",
            ),
            Table(
                id="attach.layers",
                caption=f"By layer, on {report.base.n_tokens:,} held-out tokens of {text}",
                columns=[
                    "input of block",
                    Column(name="base lens on base model", unit="bits KL"),
                    Column(name="base lens, attached", unit="bits KL"),
                    Column(name="own lens", unit="bits KL"),
                    Column(name="logit lens", unit="bits KL"),
                    Column(name="attached minus own", unit="bits per byte of loss"),
                ],
                rows=[
                    [
                        str(layer),
                        *(bits(kl[layer].estimate) for kl in (report.before, report.after)),
                        *(bits(scores[name].kl[layer].estimate) for name in ("own", "logit")),
                        scores["own"].bits_per_byte(cost.estimate),
                    ]
                    for layer, cost in enumerate(report.cost or [])
                ],
            ),
        ],
        not_shown=(
            "One pair of models and one text. How far a lens carries depends on how far fine-tuning moved the model: "
            f"here the loss on this text fell from {number(losses[0])} to {number(losses[1])} bits per byte."
        ),
        how=(
            f"The lens of {lm.name} keeps its translators and takes the unembedding of {tuned.name}. Beside it a lens "
            f"trained on {tuned.name} and the logit lens read the same tokens of {text}, which no lens has seen, and "
            "no fine-tuning within this run. KL(final || lens), mean over tokens; intervals: bootstrap "
            "over windows, differences paired."
        ),
    )


def _closer(report: "AttachReport", command: str) -> "Finding":
    from sonde.runs.finding import Control, Finding
    from sonde.stats.information import bits

    nearer = sum(gap.high < 0 for gap in report.gain)
    least = max(report.gain, key=lambda gap: gap.estimate)
    where = "at every layer" if nearer == len(report.gain) else f"at {nearer} of {len(report.gain)} layers"
    return Finding.of(
        least.scaled(bits(1.0)),
        id="attach.closer",
        chapter="attach",
        sentence=f"On the fine-tuned model the base model's lens is closer than the logit lens {where}.",
        metric="change of KL against the logit lens, at the layer where it is least",
        unit="bits",
        better="lower",
        control=Control("logit lens", 0.0),
        command=command,
        figures=("attach.kl",),
        tables=("attach.layers",),
    )


def _cost(report: "AttachReport", command: str) -> "Finding":
    from sonde.runs.finding import Control, Finding, Paper
    from sonde.runs.report.numbers import number

    assert report.cost is not None and report.logit_cost is not None
    layer = max(range(len(report.cost)), key=lambda i: report.cost[i].estimate)  # type: ignore[index]
    worst, logit = (costs[layer].scaled(report.base.bits_per_byte(1.0)) for costs in (report.cost, report.logit_cost))
    return Finding.of(
        worst,
        id="attach.cost",
        chapter="attach",
        sentence=(
            f"Its loss is at most {number(max(worst.estimate, 0.0), 2)} bits per byte above that of a lens trained on "
            "the fine-tuned model itself."
        ),
        metric="loss above that of a lens of the fine-tuned model, at the layer where it is largest",
        unit="bits per byte",
        better="lower",
        control=Control.of("logit lens", logit),
        paper=Paper(0.3, "LLaMA-13B lens on Vicuna-13B, at most", _PAPER),
        command=command,
        tables=("attach.layers",),
    )
