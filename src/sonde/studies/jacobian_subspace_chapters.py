"""Chapters on subspaces of the training Jacobian: what they do, who shares them, training inside them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats.intervals import Interval
from sonde.studies.jacobian_bands import Seeds, band, flat, lines, over, recipe

if TYPE_CHECKING:
    from sonde.studies.training_jacobian import TrainingJacobianConfig

_SMALL = 1e-6  # of divergences that are shown


def _inside(tree: dict[str, Any], at: Sequence[Any]) -> float:
    return tree[at[0]][at[1]][at[2]]


def effect(seeds: Seeds, config: "TrainingJacobianConfig", command: str) -> Chapter:
    """What a unit step along a direction does to the predictions, on digits and far from them."""
    kinds = list(seeds[0]["effect"])

    def times(name: str) -> Interval:
        return over(
            seeds, lambda each: each["effect"][name]["maximum"]["rest"] / each["effect"][name]["maximum"]["bulk"]
        )

    test, gaussian = times("test"), times("gaussian")
    sentence = (
        f"On held-out digits a unit step outside the bulk changes the predictions {number(test.estimate, 2)} times as "
        f"much as one inside; on Gaussian noise {number(gaussian.estimate, 2)} times."
    )
    finding = Finding.of(
        test,
        id="effect.ratio",
        chapter="effect",
        sentence=sentence,
        metric="median largest KL of directions outside the bulk over that inside, test digits",
        better="higher",
        control=Control.of("the same on Gaussian noise", gaussian),
        command=command,
        figures=("effect.curve",),
    )
    points = len(seeds[0]["effect"]["test"]["maximum"]["curve"])
    xs = [(i + 0.5) / points for i in range(points)]

    def curve(each: dict[str, Any], name: str) -> list[float]:
        return [max(value, _SMALL) for value in each["effect"][name]["maximum"]["curve"]]

    shown = {"test": "test digits", "inverted": "inverted digits", "gaussian": "Gaussian noise"}
    rows = [row for name, of in shown.items() for row in band(seeds, lambda each, name=name: curve(each, name), xs, of)]
    chance = sum(each["effect"]["test"]["maximum"]["random"] for each in seeds) / len(seeds)
    chart = lines(
        rows + flat(xs, [chance] * points, "random step, test digits"),
        control=("random step, test digits",),
        log=True,
        title="The bulk is invisible on digits, and visible far from them",
        subtitle="largest divergence of the predictions after a unit step, median of directions of like rank",
        x_title="rank of the direction by σ, as a share of all",
        y_title="KL, nats",
    )
    where = ("bulk", "rest", "random")
    medians = {
        (name, kind): [over(seeds, lambda e, at=(name, kind, k): _inside(e["effect"], at)).estimate for k in where]
        for name in kinds
        for kind in ("maximum", "mean")
    }
    table = Table(
        id="effect.table",
        columns=["inputs", "over inputs", *(Column(name=name, unit="nats") for name in where)],
        rows=[[*at, *values] for at, values in medians.items()],
        caption="Median KL over directions, means over seeds; bulk is |σ - 1| < 0.1.",
    )
    return Chapter(
        id="effect",
        question="Does the bulk matter to what the network says?",
        answer=sentence,
        findings=[finding],
        blocks=[Figure(id="effect.curve", chart=chart, caption="What a unit step along each direction does."), table],
        not_shown="A step of one length along one direction at a time, from the trained weights.",
        how="KL of the predictions at θ_T from those at θ_T + v, largest and mean over inputs. "
        + recipe(config, seeds),
    )


def sharing(seeds: Seeds, config: "TrainingJacobianConfig", command: str) -> Chapter:
    """The bulk beside that of other trainings."""
    n, names, counts = seeds[0]["n"], seeds[0]["overlap"]["names"], seeds[0]["overlap"]["counts"]
    halves = {name: over(seeds, lambda each, name=name: each["overlap"][name]["half"]) for name in names}
    sentence = (
        f"Half of the weight space, chosen as the most bulk-like, overlaps {halves['other seed'].estimate:.2f} with "
        f"that of another seed, {halves['permuted labels'].estimate:.2f} with that of permuted labels, and "
        f"{halves['noise inputs'].estimate:.2f} with that of noise inputs; chance is 0.50."
    )
    findings = [
        Finding.of(
            halves[name],
            id=f"sharing.{name.replace(' ', '-')}",
            chapter="sharing",
            sentence=f"The bulk is shared with a training that differs by {_articles[name]}."
            if halves[name].low > 0.6
            else f"The bulk is hardly shared with a training that differs by {_articles[name]}.",
            metric="overlap of the more bulk-like halves",
            control=Control("random subspaces", (n // 2) / n),
            command=command,
            figures=("sharing.curve",),
        )
        for name in names
    ]
    rows = [
        row for name in names for row in band(seeds, lambda e, name=name: e["overlap"][name]["curve"], counts, name)
    ]
    chart = lines(
        rows + flat(counts, [k / n for k in counts], "chance"),
        control=("chance",),
        title="The bulk belongs to the inputs, not to the seed or the labels"
        if halves["noise inputs"].high < min(halves["other seed"].low, halves["permuted labels"].low)
        else "How far the bulk is that of another training",
        subtitle="mean squared cosine of the principal angles of the k most bulk-like directions",
        x_title="k",
        y_title="overlap",
    )
    return Chapter(
        id="sharing",
        question="Is it the same bulk in another training?",
        answer=sentence,
        findings=findings,
        blocks=[Figure(id="sharing.curve", chart=chart, caption="Overlap of bulks over their size.")],
        not_shown="Whether other data of the same kind share it: all digits here come from one set.",
        how="Each training is held against three: another initialisation, labels permuted, pixels uniform on [0, 1]. "
        + recipe(config, seeds),
    )


_articles = {"other seed": "its seed", "permuted labels": "its labels", "noise inputs": "its inputs"}


def blindness(seeds: Seeds, config: "TrainingJacobianConfig", command: str) -> Chapter:
    """The bulk beside what the outputs cannot see of the weights."""
    n, counts = seeds[0]["n"], seeds[0]["blind"]["counts"]
    kinds = ("test start", "test end", "noise start", "noise end")
    test, noise = (over(seeds, lambda e, kind=kind: e["blind"][kind]["half"]) for kind in ("test start", "noise start"))
    end = over(seeds, lambda each: each["blind"]["test end"]["half"])
    sentence = (
        f"The weights that outputs on digits cannot see at the start overlap {test.estimate:.2f} with the bulk, those "
        f"that outputs on noise cannot see {noise.estimate:.2f}; chance is 0.50."
    )
    finding = Finding.of(
        test,
        id="blindness.overlap",
        chapter="blindness",
        sentence=sentence,
        metric="overlap of half the weight space: least seen by outputs on test digits, most bulk-like",
        better="higher",
        control=Control.of("the same for outputs on noise", noise),
        command=command,
        figures=("blindness.curve",),
    )
    labels = {"test start": "digits", "test end": "digits, after training", "noise start": "noise",
              "noise end": "noise, after training"}  # fmt: skip
    rows = [row for k in kinds for row in band(seeds, lambda e, k=k: e["blind"][k]["curve"], counts, labels[k])]
    chart = lines(
        rows + flat(counts, [k / n for k in counts], "chance"),
        control=("chance",),
        title=f"The bulk is what digits do not test: overlap {test.estimate:.2f}, with noise {noise.estimate:.2f}",
        subtitle="k directions that outputs see least, against the k most bulk-like ones",
        x_title="k",
        y_title="overlap",
    )
    return Chapter(
        id="blindness",
        question="Can the bulk be told before training?",
        answer=sentence,
        findings=[finding],
        blocks=[Figure(id="blindness.curve", chart=chart, caption="Null spaces of the parameter-function Jacobian.")],
        not_shown=f"After training the overlap is {end.estimate:.2f}; which causes which is not shown.",
        how="P = ∂ logits(X; θ) / ∂θ, a row for each of 197 inputs and 10 classes; its least directions in float64. "
        + recipe(config, seeds),
    )


def restriction(seeds: Seeds, config: "TrainingJacobianConfig", command: str) -> Chapter:
    """Training inside subspaces."""
    first = seeds[0]["restricted"]
    counts, names, quarter = first["counts"], first["names"], first["quarter"]

    def loss(name: str) -> Interval:
        return over(seeds, lambda each: each["restricted"]["train_loss"][names.index(name)][quarter])

    bulk, other, chance = loss("bulk"), loss("complement"), loss("random")
    k = counts[quarter]
    sentence = (
        f"Inside the {k:,} most bulk-like directions training ends at a loss of {number(bulk.estimate, 3)}, inside as "
        f"many of the least bulk-like at {number(other.estimate, 2)}, in random ones at {number(chance.estimate, 2)}."
    )
    finding = Finding.of(
        bulk,
        id="restriction.bulk",
        chapter="restriction",
        sentence=sentence,
        metric=f"train loss after training inside the {k:,} most bulk-like directions",
        unit="nats",
        control=Control.of("inside as many random directions", chance),
        command=command,
        figures=("restriction.loss",),
    )
    titles = ("bulk", "complement", "most chaotic", "most stable", "random")  # in the order of `names`
    rows = [
        row
        for i, of in enumerate(titles)
        for row in band(seeds, lambda e, i=i: e["restricted"]["train_loss"][i].tolist(), counts, of)
    ]
    chart = lines(
        rows,
        control=("random",),
        log=True,
        title="Training cannot do without what is not bulk" if bulk.low > other.high else "Training inside subspaces",
        subtitle="train loss after training inside k directions of each kind",
        x_title="k",
        y_title="train loss, nats",
    )
    fields = ("train_loss", "test_loss", "test_accuracy")
    table = Table(
        id="restriction.table",
        columns=["directions", "k", *(Column(name=field.replace("_", " ")) for field in fields)],
        rows=[
            [
                name,
                counts[j],
                *(over(seeds, lambda e, f=f, i=i, j=j: e["restricted"][f][i][j]).estimate for f in fields),
            ]
            for i, name in enumerate(names)
            for j in (0, quarter, len(counts) // 2)
        ],
        caption="Means over seeds.",
    )
    return Chapter(
        id="restriction",
        question="Can a network learn inside the bulk alone?",
        answer=sentence,
        findings=[finding],
        blocks=[
            Figure(id="restriction.loss", chart=chart, caption="Training inside subspaces of many sizes."),
            table,
        ],
        not_shown="The subspaces are those of the very training that is repeated inside them.",
        how="θ = θ₀ + Bc, c trained from 0 by the same recipe, all sizes as one batch. " + recipe(config, seeds),
    )
