"""Chapters on how a model responds to exchanged subspaces, against a lens, and on blocks as steps of descent."""

import math

from sonde.lens.alignment import Alignment
from sonde.lens.update_gradient import UpdateGradient
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding, Paper
from sonde.runs.report.numbers import number

_BITS = 1 / math.log(2)
_PAPER = "Belrose et al. 2023, arXiv:2303.08112"


def response(aligned: dict[str, list[Alignment]], size: int, tokens: int, command: str) -> Chapter:
    """Stimulus and response by depth."""
    causal = aligned["tuned, causal"]
    sites = [layer.site for layer in causal]
    first, last = causal[0].similarity, causal[-1].similarity
    rises = Finding.of(
        last,
        id="alignment.depth",
        chapter="alignment",
        sentence=(
            "The deeper the layer, the more exactly the model responds as the lens says."
            if last.low > first.high
            else "The model's response does not clearly come closer to what the lens says with depth."
        ),
        metric=f"Aitchison similarity of stimulus and response at {sites[-1]}",
        better="higher",
        control=Control.of(f"the same at {sites[0]}", first),
        command=command,
        figures=("alignment.depth",),
        tables=("alignment.table",),
    )
    middle = len(causal) // 2
    tuned, logit = (aligned[way][middle].similarity for way in ("tuned, singular", "logit, singular"))
    better = Finding.of(
        tuned,
        id="alignment.lens",
        chapter="alignment",
        sentence=(
            f"At {sites[middle]} the tuned lens foretells the response to its principal directions "
            f"{'better than' if tuned.low > logit.high else 'no better than'} the logit lens does to its own."
        ),
        metric=f"Aitchison similarity at {sites[middle]}, {size} singular directions of the tuned lens",
        better="higher",
        control=Control.of("logit lens", logit),
        command=command,
        figures=("alignment.depth",),
        tables=("alignment.table",),
    )
    other = "other token's response"
    names = {"tuned, causal": causal, "tuned, singular": aligned["tuned, singular"],
             "logit, singular": aligned["logit, singular"], "random directions": aligned["random"]}  # fmt: skip
    points = {way: [layer.similarity for layer in layers] for way, layers in names.items()}
    points[other] = [layer.control for layer in causal]
    chart = chart_kinds.lines(
        [
            {"layer": place, "value": point.estimate, "low": point.low, "high": point.high, "way": way}
            for way, layers in points.items()
            for place, point in enumerate(layers)
        ],
        x="layer",
        y="value",
        low="low",
        high="high",
        series="way",
        control=("random directions", other),
        x_labels=[site.rpartition(".")[2] for site in sites],
        title=f"Alignment goes from {number(first.estimate, 2)} to {number(last.estimate, 2)} with depth",
        subtitle="Aitchison similarity of stimulus and response by lens and subspace, 95 % bands; 1 is exact",
        x_title="input of block",
        y_title="similarity of stimulus and response",
    )
    return Chapter(
        id="alignment",
        question="Does the model respond to a change as the lens says that it should?",
        answer=f"{rises.sentence} {better.sentence}",
        findings=[rises, better],
        blocks=[
            Figure(id="alignment.depth", chart=chart, caption="Alignment by layer, lens and subspace, with controls."),
            Table(
                id="alignment.table",
                caption="Stimulus (lens) and response (model) when a subspace is exchanged between rows of text",
                columns=[
                    "lens, subspace",
                    "block",
                    "similarity",
                    "other token",
                    Column(name="stimulus", unit="bits"),
                    Column(name="response", unit="bits"),
                    Column(name="change of loss", unit="bits"),
                ],
                rows=[
                    [
                        way,
                        layer.site.rpartition(".")[2],
                        layer.similarity.estimate,
                        layer.control.estimate,
                        *(_BITS * point.estimate for point in (layer.stimulus, layer.response, layer.loss_change)),
                    ]
                    for way, layers in aligned.items()
                    for layer in layers
                ],
            ),
        ],
        not_shown=(
            "The component is exchanged at all positions, so that the model also responds to changed earlier tokens, "
            "which a lens cannot see. Lenses are compared on subspaces of their own."
        ),
        how=(
            f"The component of the state in {size} directions is replaced by that of another row at the same position. "
            "Stimulus: change of the lens's log-probabilities; response: of the model's. Their Aitchison similarity is "
            "weighted by the mean of the model's predictions before and after. Subspaces: the first causal directions, "
            f"the first singular directions of the lens, or random ones. {tokens:,} tokens."
        ),
    )


def updates(blocks: list[UpdateGradient], tokens: int, command: str) -> Chapter:
    """Updates against the gradient of the loss."""
    shares = [block.negative for block in blocks]
    least = min(range(len(blocks)), key=lambda place: shares[place].estimate)
    downhill = sum(share.low > 0.5 for share in shares)
    everywhere = downhill == len(blocks)
    count = "All" if everywhere else f"{downhill} of {len(blocks)}"
    finding = Finding.of(
        shares[least].scaled(100),
        id="updates.negative",
        chapter="updates",
        sentence=f"{count} blocks move the stream down the gradient of the loss at most tokens.",
        metric=f"tokens where the update of block {least} has a negative cosine with the gradient, the lowest share",
        unit="%",
        better="higher",
        control=Control("no relation", 50.0),
        paper=Paper(95, "Pythia-6.9B, all layers", _PAPER),
        command=command,
        figures=("updates.share",),
        tables=("updates.table",),
    )
    chart = chart_kinds.bars(
        [
            {"block": block.layer, "share": 100 * own.estimate, "low": 100 * own.low, "high": 100 * own.high,
             "chance": 50.0}
            for block, own in zip(blocks, shares, strict=True)
        ],
        x="block",
        y="share",
        low="low",
        high="high",
        control="chance",
        control_name="no relation",
        title=f"Between {number(100 * shares[least].estimate, 2)} and "
        f"{number(100 * max(share.estimate for share in shares), 2)} % of the updates point downhill",
        subtitle="Tokens where a block's update has a negative cosine with the gradient of the loss, 95 % intervals",
        x_title="block",
        y_title="negative cosines (%)",
        x_labels=[str(block.layer) for block in blocks],
    )  # fmt: skip
    return Chapter(
        id="updates",
        question="Is each block a step of gradient descent?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            Figure(id="updates.share", chart=chart, caption="Share of updates with a negative cosine, by block."),
            Table(
                id="updates.table",
                caption="Cosine of update and gradient by block",
                columns=["block", "mean cosine", "low", "high", Column(name="negative", unit="%")],
                rows=[
                    [str(block.layer), block.cosine.estimate, *block.cosine.bounds, 100 * block.negative.estimate]
                    for block in blocks
                ],
            ),
        ],
        not_shown=(
            "A negative cosine says that a small step along the update would lower the loss, not that the whole step "
            "does, nor that the block could not have found a better one."
        ),
        how=(
            "The gradient of the loss on the text in the stream before a block, with that block left out, against what "
            f"the block adds; {tokens:,} tokens, intervals over rows. The last token of a row predicts nothing."
        ),
    )
