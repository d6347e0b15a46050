"""The chapters of the study of the training Jacobian: exactness, spectrum, response, effect, sharing, restriction."""

from typing import TYPE_CHECKING, Any

import torch

from sonde.dynamics.jacobian_spectrum import TOLERANCES
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding, Paper
from sonde.runs.report.numbers import number
from sonde.stats.intervals import Interval
from sonde.studies.jacobian_bands import CITE, Seeds, band, flat, lines, over, recipe
from sonde.studies.jacobian_subspace_chapters import blindness, effect, restriction, sharing

if TYPE_CHECKING:
    from sonde.studies.training_jacobian import TrainingJacobianConfig

_SEEN = 1e-4  # below this a singular value is rounding


def chapters(seeds: Seeds, config: "TrainingJacobianConfig", command: str) -> list[Chapter]:
    """All chapters, from what each seed left."""
    made = (_spectrum, _response, effect, sharing, blindness, restriction)
    return [_exactness(seeds, config)] + [chapter(seeds, config, command) for chapter in made]


def _exactness(seeds: Seeds, config: "TrainingJacobianConfig") -> Chapter:
    rows = [
        [config.seed + i, *(each["losses"][key] for key in ("train", "test", "accuracy")),
         *(each["checks"][key] for key in ("pixels", "shifts", "differences", "adjoint"))]
        for i, each in enumerate(seeds)
    ]  # fmt: skip
    names = ["seed", "train loss", "test loss", "test accuracy", "still pixels", "shifts", "differences", "adjoint"]
    worst = max(each["checks"]["differences"] for each in seeds)
    return Chapter(
        id="exactness",
        question="Is the Jacobian exact?",
        answer=(
            f"It agrees with the difference of whole trainings to {number(worst, 2)} or better, and with what must "
            "hold exactly as the table says."
        ),
        blocks=[
            Table(
                id="exactness.checks",
                columns=[name if name == "seed" else Column(name=name) for name in names],
                rows=rows,
                caption=(
                    "Trainings, and checks in float64: ‖Jv - v‖ of weights from pixels that are always 0 and of equal "
                    "shifts of all logits (exact for plain gradient descent), relative distance to central differences "
                    "of two retrainings, and |⟨Jv, u⟩ / ⟨v, Jᵀu⟩ - 1|."
                ),
            )
        ],
        not_shown="That a derivative says anything of large steps: the chapter on the response does.",
        how=recipe(config, seeds),
    )


def _spectrum(seeds: Seeds, config: "TrainingJacobianConfig", command: str) -> Chapter:
    n = seeds[0]["n"]
    bulk = over(seeds, lambda each: each["regions"]["0.1"][1] / n)
    noise = over(seeds, lambda each: each["overlap"]["noise inputs"]["fraction"])
    half = n // 2
    aligned = over(seeds, lambda each: each["alignment"][:half].mean())
    loose = over(seeds, lambda each: each["alignment"][half:].mean())
    inside = over(seeds, lambda each: each["displacement"]["half"])
    share = f"{bulk.estimate:.0%} of the {n:,} directions leave training as they came, within a tenth."
    finding = Finding.of(
        bulk,
        id="spectrum.bulk",
        chapter="spectrum",
        sentence=share,
        metric="share of singular values with |σ - 1| < 0.1",
        control=Control.of("trained on noise inputs", noise),
        paper=Paper(0.6, "4,810 weights, one training", CITE),
        command=command,
        figures=("spectrum.sigma",),
    )
    alignment = Finding.of(
        aligned,
        id="spectrum.alignment",
        chapter="spectrum",
        sentence="Bulk directions point the same way before and after training.",
        metric="mean cos(u, v) over the more bulk-like half",
        better="higher",
        control=Control.of("the other half", loose),
        command=command,
        figures=("spectrum.alignment",),
    )
    moved = Finding.of(
        inside,
        id="spectrum.displacement",
        chapter="spectrum",
        sentence="Training moves the weights almost only outside the bulk.",
        metric="share of ‖θ_T - θ₀‖² in the more bulk-like half",
        better="lower",
        control=Control("a random half", 0.5),
        command=command,
        figures=("spectrum.displacement",),
    )
    ranks = sorted({round(i) for i in torch.linspace(0, n - 1, 160).tolist()})

    def sigma(values: torch.Tensor) -> list[float]:
        return values[ranks].clamp_min(_SEEN).tolist()

    rows = band(seeds, lambda each: sigma(each["sigma"]), ranks, "digits")
    rows += band(seeds, lambda each: sigma(each["overlap"]["noise inputs"]["sigma"]), ranks, "noise inputs")
    spectrum = lines(
        rows,
        control=("noise inputs",),
        log=True,
        title=f"{bulk.estimate:.0%} of the spectrum is at 1",
        subtitle=f"singular values of the training Jacobian in descending order; below {_SEEN:g} they are rounding",
        x_title="rank",
        y_title="σ",
    )
    parts = torch.arange(n).tensor_split(min(40, n))
    middles = [float(part.double().mean()) / n for part in parts]
    cosines = lines(
        band(seeds, lambda each: [float(each["alignment"][part].mean()) for part in parts], middles, "cos(u, v)")
        + flat(middles, [0.0] * len(middles), "random directions"),
        control=("random directions",),
        title=f"cos(u, v) is {aligned.estimate:.2f} in the more bulk-like half, {loose.estimate:.2f} in the rest",
        subtitle="means of directions that are alike in |σ - 1|",
        x_title="rank by |σ - 1|, as a share of all",
        y_title="cosine",
    )
    counts = seeds[0]["displacement"]["counts"]
    where = lines(
        band(seeds, lambda each: each["displacement"]["share"], counts, "this training")
        + flat(counts, [k / n for k in counts], "chance"),
        control=("chance",),
        title=f"The more bulk-like half holds {inside.estimate:.0%} of the way that training goes",
        subtitle="share of ‖θ_T - θ₀‖² inside the k most bulk-like directions",
        x_title="k",
        y_title="share",
    )
    blocks = [
        Figure(
            id="spectrum.sigma", chart=spectrum, caption="Chaotic directions on the left, bulk, stable on the right."
        ),
        Figure(id="spectrum.alignment", chart=cosines, caption="Alignment of initial and final directions."),
        Figure(id="spectrum.displacement", chart=where, caption="Where training went."),
        _regions(seeds),
    ]
    if len(seeds[0]["during"]) > 1:
        blocks.insert(1, _during(seeds))
    return Chapter(
        id="spectrum",
        question="What does training do to its starting point?",
        answer=share,
        findings=[finding, alignment, moved],
        blocks=blocks,
        not_shown=(
            "No theory sets the tolerance: the table has three. Inside the cluster at 1 single vectors are arbitrary, "
            "so only their subspace is compared."
        ),
        how="All columns of J by forward recursion of Hessian-vector products, one decomposition. "
        + recipe(config, seeds),
    )


def _during(seeds: Seeds) -> Figure:
    steps = [look["step"] for look in seeds[0]["during"]]
    rows = [
        row
        for t in TOLERANCES[::-1]
        for row in band(seeds, lambda each, t=t: [at[f"{t:g}"] for at in each["during"]], steps, f"within {t:g}")
    ]
    first, last = rows[0]["y"], rows[len(steps) - 1]["y"]
    chart = lines(
        rows,
        title=f"The bulk shrinks while training goes on: {first:.0%} at step {steps[0]}, {last:.0%} at the end"
        if last < first
        else f"The bulk on the way: {first:.0%} at step {steps[0]}, {last:.0%} at the end",
        subtitle="share of singular values of ∂θ_t/∂θ₀ this close to 1",
        x_title="step t",
        y_title="share",
    )
    return Figure(id="spectrum.during", chart=chart, caption="The Jacobian at steps on the way, from the same pass.")


def _regions(seeds: Seeds) -> Table:
    rows = []
    for key in seeds[0]["regions"]:
        for i, kind in enumerate(("chaotic", "bulk", "stable")):
            counts = [each["regions"][key][i] for each in seeds]
            rows.append([key, kind, sum(counts) / len(counts), min(counts), max(counts)])
    return Table(
        id="spectrum.regions",
        columns=["tolerance", "region", Column(name="mean", digits=4), "least", "most"],
        rows=rows,
        caption="Directions in each region, at three tolerances on |σ - 1|, over seeds.",
    )


def _response(seeds: Seeds, config: "TrainingJacobianConfig", command: str) -> Chapter:
    names = seeds[0]["response"]["names"]
    scales = seeds[0]["response"]["scale"]
    small = scales <= 1

    def ratio(each: dict[str, Any], i: int) -> torch.Tensor:
        return each["response"]["along"][i] / each["response"]["expected"][i]

    def off(i: int) -> Interval:
        return over(seeds, lambda each: float((ratio(each, i)[small] - 1).abs().max()))

    bulk, chaotic = off(names.index("bulk")), off(names.index("chaotic"))
    sentence = "A bulk direction answers linearly to steps of up to the length 1; the most amplified one does not."
    finding = Finding.of(
        bulk,
        id="response.linearity",
        chapter="response",
        sentence=sentence,
        metric="largest |r / sσ - 1| over 0.001 ≤ s ≤ 1, bulk direction",
        better="lower",
        control=Control.of("most chaotic direction", chaotic),
        command=command,
        figures=("response.ratio",),
    )
    xs = scales.log10().tolist()
    shown = ("bulk", "chaotic", "random")
    rows = [
        row
        for name in shown
        for row in band(seeds, lambda each, name=name: ratio(each, names.index(name)).nan_to_num().tolist(), xs, name)
    ]
    chart = lines(
        rows,
        control=("random",),
        title="The Jacobian foretells large steps in the bulk, small ones elsewhere",
        subtitle="answer of the final weights along u, over what the Jacobian says: 1 is linear",
        x_title="log₁₀ of the step s along v",
        y_title="r / sσ",
    )
    at = [0, 5, 10, 15, 20, 25, len(scales) - 1]
    table = Table(
        id="response.table",
        columns=["direction", Column(name="step"), Column(name="σ"), Column(name="r"), Column(name="across"),
                 Column(name="test loss")],
        rows=[
            [name, float(scales[j]), *(_mean(seeds, key, i, j) for key in ("sigma", "along", "across", "loss"))]
            for i, name in enumerate(names)
            for j in at
        ],
        caption="Means over seeds: r along u, what is orthogonal to it, the loss at the end of the perturbed training.",
    )  # fmt: skip
    return Chapter(
        id="response",
        question="Does the derivative foretell what a real change of the start does?",
        answer=sentence,
        findings=[finding],
        blocks=[Figure(id="response.ratio", chart=chart, caption="Retraining from θ₀ + s v, 30 sizes of s."), table],
        not_shown="One direction of each kind and seed; the stable one has σ next to 0.3, where an answer can be seen.",
        how="All perturbed trainings run as one batch. The random direction is held against its own Jv. "
        + recipe(config, seeds),
    )


def _mean(seeds: Seeds, key: str, i: int, j: int) -> float | None:
    values = [each["response"][key][i] if key == "sigma" else float(each["response"][key][i][j]) for each in seeds]
    mean = sum(values) / len(values)
    return mean if mean == mean else None
