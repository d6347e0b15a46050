"""Can a detector that knows only normal prompts tell that a model is being misled, from how its answer forms?

Multiple-choice questions are put into few-shot prompts: plain ones, ones whose examples have wrong labels, and ones
with an order to print a wrong answer. Trajectories are the probabilities of the choices through the layers, read by a
tuned and by the logit lens. Detectors are fitted on plain prompts alone and scored on held-out plain and on misled
ones; SRM, a distance of hidden states, needs no lens. Beside that: how often each layer is right, and whether the
questions that the network settles late are those that it learned late.
"""

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sonde.data.multiple_choice import Prompt, Question
    from sonde.lens.choices import ChoiceScores
    from sonde.lens.prediction_depth import Learning
    from sonde.lens.tuned import TunedLens
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.run import Run

_ROUNDS = 4  # draws of examples for the text that the lens reads
_LEAST = 40
_QUIZ = "organism:quiz"
PLAIN = "plain"


@dataclass(frozen=True)
class TrajectoryAnomalyConfig(Runnable):
    """Fit detectors on trajectories of plain multiple-choice prompts and try them on misled ones.

    Example: sonde run trajectory-anomaly organism:quiz
    """

    words = ("sonde", "run", "trajectory-anomaly")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME, such as organism:quiz."""
    questions: Name = None
    """A .json, .jsonl or .csv file of questions, choices and answers. By default generated ones: is the otter alive?"""
    items: Count = 800
    """How many questions are used: a quarter as examples and for the lens, a half plain, a quarter misled."""
    shots: Count = 3
    """Answered examples before each question."""
    style: Literal["text", "letters"] = "text"
    """text: the choices are scored as they stand. letters: they are listed as A, B, C, and the letters are scored."""
    detectors: Names = ("lof", "isolation-forest", "one-class-svm")
    """Which detectors: lof (local outlier factor), isolation-forest, one-class-svm. The first makes the findings."""
    neighbors: Count = 20
    """Neighbours of the local outlier factor."""
    text: Text = None
    """What the tuned lens is trained on. By default plain prompts."""
    tokens: Count = 65536
    """How many tokens of it are read."""
    checkpoints: Names = None
    """Folders of training checkpoints, first to last. By default those of organism:quiz, and none of other models."""
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
    "trajectory-anomaly",
    summary="can detectors that know only normal prompts see in the layers that a model is being misled?",
    paper="Belrose et al. 2023, Eliciting Latent Predictions from Transformers with the Tuned Lens (arXiv:2303.08112)",
)
def trajectory_anomaly(config: TrajectoryAnomalyConfig) -> Path:
    """Score the prompts, fit the detectors and write the report. Returns its path.

    Raises `SondeError` for too few questions and anything wrong with model, questions, text or folder.
    """
    from sonde.data.text import describe
    from sonde.lens.anomaly import KINDS, Kind
    from sonde.lens.choices import check_prompts
    from sonde.organisms.loading import load
    from sonde.studies import trajectory_chapters as chapters

    check_options(config)
    chosen = config.detectors or ()
    detectors: list[Kind] = [kind for name in chosen for kind in KINDS if name == kind]
    if len(detectors) < len(chosen) or not chosen:
        raise SondeError(f"--detectors takes some of {', '.join(KINDS)}, not {' '.join(chosen) or 'none'}")
    if config.neighbors < 1:
        raise SondeError(f"--neighbors is {config.neighbors}: give 1 or more, such as 20")
    for folder in config.checkpoints or ():
        if not (Path(folder) / "config.json").is_file():
            raise SondeError(f"--checkpoints {folder} has no config.json: give folders in Hugging Face format")
    groups, left_out = _groups(config)
    if "lof" in detectors and len(groups[PLAIN]) // 2 <= config.neighbors:
        raise SondeError(
            f"{len(groups[PLAIN])} plain questions are too few: half of them are fitted on, and a local outlier factor "
            f"of {config.neighbors} neighbours needs {config.neighbors + 1}; give more --items or fewer --neighbors"
        )
    sets = _sets(groups, config)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    batches = _lens_text(config, lm, groups)
    for given in sets.values():
        check_prompts(lm, given)
    with open_run("trajectory-anomaly", config, lm) as run:
        lens = _lens(run, lm, batches, config.seed)
        scores = {name: _scored(run, lm, name, given, lens) for name, given in sets.items()}
        command = shlex.join(config.command())
        written = [
            chapters.detect(scores, detectors, neighbors=config.neighbors, seed=config.seed, command=command),
            chapters.srm(scores, seed=config.seed, command=command),
            chapters.accuracy(scores, command=command),
        ]
        if config.checkpoints or config.model == _QUIZ:
            learned = _learned(run, lm, config, sets[PLAIN])
            asked = [question.text for question in groups[PLAIN]]
            written.append(chapters.depth(learned, scores[PLAIN], asked, command=command))
        source = describe(config.text) if config.text else "plain prompts"
        skipped = {"questions left out": f"{left_out} with another number of choices"} if left_out else {}
        return publish(
            run,
            lm,
            batches,
            written,
            title=f"Misled prompts on {lm.name}",
            source=source,
            timings=dict(run.timings),
            skipped=skipped,
        )


def _groups(config: TrajectoryAnomalyConfig) -> "tuple[dict[str, list[Question]], int]":
    """Disjoint questions: examples (a quarter), plain (a half), misled (a quarter); and how many were left out."""
    import numpy as np

    from sonde.data.multiple_choice import questions
    from sonde.data.toy_questions import alive_questions

    if config.questions is None:
        found = alive_questions(max(1, config.items), seed=config.seed)
    else:
        found = questions(config.questions)
    most = Counter(len(question.choices) for question in found).most_common(1)[0][0]
    kept = [question for question in found if len(question.choices) == most]
    order = np.random.default_rng(config.seed).permutation(len(kept))[: max(0, config.items)]
    if len(order) < _LEAST:
        raise SondeError(f"{len(order)} questions are too few: give at least {_LEAST}, and --items {_LEAST} or more")
    mixed = [kept[place] for place in order]
    quarter = len(mixed) // 4
    groups = {"examples": mixed[:quarter], PLAIN: mixed[2 * quarter :], "misled": mixed[quarter : 2 * quarter]}
    return groups, len(found) - len(kept)


def _sets(groups: "dict[str, list[Question]]", config: TrajectoryAnomalyConfig) -> "dict[str, list[Prompt]]":
    from sonde.data.multiple_choice import injected, prompts

    if config.shots < 1:
        raise SondeError(f"--shots is {config.shots}: wrong labels need at least 1 example to stand in")
    options: Any = {"shots": config.shots, "style": config.style, "seed": config.seed}
    options["demonstrations"] = groups["examples"]
    return {
        PLAIN: prompts(groups[PLAIN], **options),
        "wrong": prompts(groups["misled"], wrong_labels=True, **options),
        "order": injected(prompts(groups["misled"], **options), seed=config.seed),
    }


def _lens_text(
    config: TrajectoryAnomalyConfig, lm: "LanguageModel", groups: "dict[str, list[Question]]"
) -> "TokenBatches":
    """What the lens is trained on: the user's text, or plain prompts about the questions that serve as examples."""
    from sonde.data.multiple_choice import prompts
    from sonde.lm.batches import TokenBatches
    from sonde.studies.running import read_text

    if config.text is not None:
        return read_text(config, lm)
    if lm.tokenizer is None:
        raise SondeError(f"{config.model} has no tokenizer, so it reads no text: save one beside the weights")
    options: Any = {"shots": config.shots, "style": config.style}
    texts = [
        prompt.text + prompt.choices[prompt.answer]
        for round in range(_ROUNDS)
        for prompt in prompts(groups["examples"], seed=config.seed + 1 + round, **options)
    ]
    return TokenBatches(
        texts, lm.tokenizer, context=lm.context, join=False, limit_tokens=config.tokens, shuffle=True, seed=config.seed
    )


def _lens(run: "Run", lm: "LanguageModel", batches: "TokenBatches", seed: int) -> "TunedLens":
    from sonde.lens.tuned import TunedLens

    if run.done("lens"):
        return TunedLens.load(run.path("lens"), lm)
    held_out = min(4096, (batches.n_tokens + batches.n_chunks) // 4)
    lens = TunedLens.fit(
        lm, batches, seed=seed, held_out=held_out, checkpoint=run.checkpoint("lens"), progress="tuned lens"
    )
    lens.save(run.path("lens"))
    run.finish("lens")
    return lens


def _scored(
    run: "Run", lm: "LanguageModel", name: str, prompts: "list[Prompt]", lens: "TunedLens"
) -> "dict[str, ChoiceScores]":
    """Scores through both lenses; from the run folder where they are there."""
    from sonde.lens.choices import ChoiceScores, choice_scores
    from sonde.lens.tuned import TunedLens

    step = f"score-{name}"
    if not run.done(step):
        lenses = {"tuned": lens, "logit": TunedLens.logit(lm, sites=lens.sites)}
        found = choice_scores(lm, prompts, lenses, keep_states=True, progress=f"{name} prompts")
        run.finish(step, {lens: scores.state() for lens, scores in found.items()})
    return {lens: ChoiceScores.from_state(state) for lens, state in run.result(step).items()}


def _learned(run: "Run", lm: "LanguageModel", config: TrajectoryAnomalyConfig, prompts: "list[Prompt]") -> "Learning":
    """Answers of all checkpoints, one model at a time; the model itself is the last."""
    from sonde.lens.prediction_depth import Learning, learning
    from sonde.lm.load import load
    from sonde.organisms.quiz import checkpoint_folders
    from sonde.organisms.registry import folder_of

    if config.checkpoints:
        folders = list(enumerate(map(Path, config.checkpoints), 1))
    else:
        folders = checkpoint_folders(folder_of("quiz"))

    def models() -> "Iterator[tuple[int, LanguageModel]]":
        for step, folder in tqdm([*folders, (folders[-1][0] + 1, None)], desc="checkpoints", unit="model"):
            made = lm if folder is None else load(str(folder), dtype=config.dtype, device=config.device)
            made.tokenizer = made.tokenizer or lm.tokenizer
            yield step, made

    if not run.done("checkpoints"):
        found = learning(models(), prompts)
        run.finish("checkpoints", {"steps": list(found.steps), "answers": found.answers})
    kept = run.result("checkpoints")
    return Learning(tuple(kept["steps"]), kept["answers"])
