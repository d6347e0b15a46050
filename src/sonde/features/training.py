"""Many dictionaries from one pass of a language model: sites, kinds, widths, sparsities and seeds at once.

Each batch of text runs through the model once, as far as the deepest site; the rows of all sites go to all
dictionaries, which take their steps one after the other and forget them. How rows are mixed is in
`sonde.features.activation_buffer`, a step in `sonde.features.step`. A training that was killed goes on from its
checkpoint and ends with the same files, to the bit; under torchrun every process reads its share of the text and all
take the same steps.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.features.activation_buffer import Order, RowSource, WholeBatches
from sonde.features.activation_rows import Passes, Rows, Selection, matched
from sonde.features.data_parallel import Processes
from sonde.features.dictionary import Dictionary
from sonde.features.input_scale import Sample
from sonde.features.plan import Plan
from sonde.features.token_matrix import tokenizer_hash
from sonde.features.trainee import Trainee
from sonde.files import load_bundle, save_bundle
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import gather_states

_CONTEXT = 256
_SAMPLE = 8192  # rows from which means and scales are measured
After = Callable[[int, Mapping[str, dict[str, float]]], None]


def train_dictionaries(
    lm: LanguageModel,
    text: Any,
    plans: Sequence[Plan],
    *,
    tokens: int | None = None,
    order: Order | None = None,
    selection: Selection | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    device: Any = None,
    after: After | None = None,
    progress: str | None = None,
) -> list[Dictionary]:
    """Train a dictionary for each plan, all on the same rows, in one pass of the model.

    Args:
        lm: the model. It stays as it is.
        text: `TokenBatches`, or anything they read; then rows of 256 tokens are taken in a random order.
        plans: what is trained, such as `grid(lm, ["resid_post.*"])`.
        tokens: rows to learn from, over all processes; by default all that the text has. Where the text has fewer, a
            warning says so and `facts["truncated"]` of the dictionaries is true.
        order: in what order rows are given, and how many a step takes of each process. With end-to-end plans a step
            takes the rows of one batch of the text.
        selection: which tokens are taken.
        checkpoint: a file to go on from when it exists, written every `checkpoint_every` steps.
        checkpoint_every: steps between two checkpoints.
        device: where dictionaries live; by default that of the model.
        after: called with the step and a point of each dictionary's curve, by name, a hundred times in all.
        progress: label of a progress bar.

    Returns:
        the dictionaries in the order of the plans, a `CrossLayerTranscoder` where the plan is of one. Their `facts`
        have the plan, the curve, tokens and steps.

    Raises:
        SondeError: for sites that do not exist (the nearest are named), widths that do not fit, too little text for one
            step, activations that are not finite (with site, batch and token), and a checkpoint of another training.

    """
    order, selection = order or Order(), selection or Selection()
    batches = _batches(lm, text, tokens, order.seed)
    _check(lm, batches, plans, order)
    processes = Processes(torch.device(device) if device is not None else lm.device)
    sites = matched(lm, *(site for plan in plans for site in (*plan.reads, *plan.predicts)))
    whole = any(plan.end_to_end for plan in plans)
    available = Passes(lm, batches, sites, selection, epochs=order.epochs).available()
    steps, truncated = _steps(len(batches), available, tokens, order, processes, whole=whole)
    identity = {
        "plans": [plan.to_json() for plan in plans],
        "order": {**asdict(order), "folder": None},
        "selection": asdict(selection),
        "steps": steps,
        "model": lm.hash,
        "text": batches.hash,
        "processes": processes.world,
    }
    path = None if checkpoint is None else Path(checkpoint)
    saved = _saved(path, identity)
    if saved is None:
        wanted = {
            "covariance": any(plan.scale == "whiten" for plan in plans),
            "median": any(plan.centre == "median" for plan in plans),
        }
        samples = measured(lm, batches, sites, selection, processes, **wanted)
        trainees = [Trainee(plan, steps, processes, samples) for plan in plans]
    else:
        trainees = [Trainee(plan, steps, processes) for plan in plans]
        for trainee, state in zip(trainees, saved["trainees"], strict=True):
            trainee.load(state)
    passes = None
    if whole:
        passes = Passes(lm, batches, sites, selection, epochs=order.epochs, device=processes.device, also=("logits",))
        source: RowSource = WholeBatches(passes)
    else:
        label = None if progress is None else "rows"
        source = order.source(lm, batches, sites, selection, device=processes.device, progress=label)
    if saved is not None:
        source.load(saved["sources"][processes.rank])
    done = 0 if saved is None else saved["done"]

    def save() -> None:
        if path is None:
            return
        sources = gather_states(source.state())
        if processes.rank == 0:
            states = [trainee.state() for trainee in trainees]
            save_bundle(path, {"identity": identity, "done": done, "trainees": states, "sources": sources})

    hidden = progress is None or processes.rank > 0
    with tqdm(total=steps, initial=done, desc=progress, unit="step", disable=hidden) as bar:
        while done < steps:
            rows = source.take()
            if not processes.least(float(rows is not None)):
                truncated = True  # outliers were left out: fewer rows came than ids promised
                break
            assert rows is not None
            _learn(trainees, rows, lm, passes, after)
            done += 1
            bar.update()
            if done % checkpoint_every == 0 and done < steps:
                save()
    if not done:
        raise SondeError("too few rows are left for one step: give more text or a smaller batch")
    save()
    got = trainees[0].step.tokens_seen
    if truncated and processes.rank == 0:
        asked = "its text promised" if tokens is None else f"the {tokens:,} asked for"
        warnings.warn(f"{batches} gave {got:,} rows, fewer than {asked}: training was cut short", stacklevel=2)
    recorded = {"model": lm.name, "model_hash": lm.hash, "tokenizer_hash": tokenizer_hash(lm.tokenizer)}
    facts = {"text": str(batches), "text_hash": batches.hash, "wanted": tokens, "truncated": truncated}
    return cast(list[Dictionary], [trainee.finished(recorded, facts) for trainee in trainees])


def _learn(
    trainees: Sequence[Trainee], rows: Rows, lm: LanguageModel, passes: Passes | None, after: After | None
) -> None:
    batch, taken = (None, None) if passes is None else (passes.batch, passes.taken)
    points = [trainee.descend(rows, lm, batch, taken) for trainee in trainees]
    if after is not None and points[0]:
        after(trainees[0].step.done, {trainee.plan.name: trainee.curve[-1] for trainee in trainees})


def _batches(lm: LanguageModel, text: Any, tokens: int | None, seed: int) -> TokenBatches:
    if isinstance(text, TokenBatches):
        return text
    if lm.tokenizer is None:
        raise SondeError(f"{lm.name} was made without a tokenizer, so it reads no text; give TokenBatches")
    context = min(_CONTEXT, lm.context)
    limit = None if tokens is None else tokens + tokens // 8 + 2 * context
    return TokenBatches(text, lm.tokenizer, context=context, limit_tokens=limit, shuffle=True, seed=seed)


def _check(lm: LanguageModel, batches: TokenBatches, plans: Sequence[Plan], order: Order) -> None:
    if not plans:
        raise SondeError("there is nothing to train: give at least one plan")
    names = [plan.name for plan in plans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SondeError(f"two dictionaries are called {twice[0]}: give plans that differ, or names")
    for plan in plans:
        for site in (*plan.reads, *plan.predicts):
            if matched(lm, site) != (site,):
                raise SondeError(
                    f"{plan.name}: {site!r} is a pattern; a plan names its sites, and grid() takes patterns"
                )
    if any(plan.end_to_end for plan in plans) and order.mode != "direct":
        raise SondeError(f"end to end the rows of one batch are a step: mode is direct, not {order.mode}")
    if len(batches) == 0:
        raise SondeError(f"{batches} make {batches.n_batches} batches, fewer than {batches.world} processes")


def _steps(
    n_batches: int, available: int, tokens: int | None, order: Order, processes: Processes, *, whole: bool
) -> tuple[int, bool]:
    """Steps of the training, the same on all processes, and whether they take fewer rows than were asked for."""
    if whole:
        most = n_batches * order.epochs
        each = available / most
    else:
        each = order.batch
        most = available // each
        if order.mode == "disk":  # what is left of an epoch is left out
            most = (available // order.epochs) // each * order.epochs
    most = int(processes.least(most))
    if not most:
        raise SondeError(
            f"the text gives {available:,} rows, fewer than a batch of {order.batch:,}: "
            "give more text or a smaller batch"
        )
    if tokens is None:
        return most, False
    if tokens < 1:
        raise SondeError(f"tokens is {tokens}: give 1 or more")
    asked = max(1, round(tokens / (each * processes.world)))
    return min(asked, most), asked > most


def measured(
    lm: LanguageModel,
    batches: TokenBatches,
    sites: Sequence[str],
    selection: Selection,
    processes: Processes,
    *,
    covariance: bool = False,
    median: bool = False,
) -> dict[str, Sample]:
    """Means and sizes of some rows of every site, over all processes."""
    passes = Passes(lm, batches, sites, selection)
    parts: list[Rows] = []
    while passes.tokens < _SAMPLE and (rows := passes.next_rows()) is not None:
        parts.append(rows)
    samples = {
        site: Sample.of(torch.cat([part[site] for part in parts]), covariance=covariance, median=median)
        for site in sites
    }
    if processes.world > 1:
        share = torch.tensor(float(passes.tokens), dtype=torch.float64, device=lm.device)
        tensors = [tensor for sample in samples.values() for tensor in sample.tensors()]
        for tensor in tensors:
            tensor *= share
        processes.sum_([*tensors, share])
        for tensor in tensors:
            tensor /= share
    return samples


def _saved(path: Path | None, identity: dict[str, Any]) -> dict[str, Any] | None:
    if path is None or not path.exists():
        return None
    tree = load_bundle(path)
    if _plain(tree["identity"]) != _plain(identity):
        raise SondeError(f"{path} is a checkpoint of another training of dictionaries: delete it or give another file")
    return tree


def _plain(tree: Any) -> Any:
    """Tuples as the lists that they come back as."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree
