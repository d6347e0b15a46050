"""A small synthetic report with every kind of block, for the tests of pages and for looking at."""

import numpy as np

from sonde.runs import charts
from sonde.runs.blocks import Appendix, Chapter, Column, Figure, Header, Prose, Statistic, Table, TokenView
from sonde.runs.finding import Control, Finding, Paper

HOSTILE = "</script><img src=x onerror=alert(1)>"
PASSAGE = (
    "An OR pattern matches each of its subpatterns in turn to the subject value, until one succeeds.\n\n"
    "   or_pattern ::= closed_pattern\nOtherwise, if none of the subpatterns succeed, the OR pattern fails. "
)
LAYERS = ["embed", "0", "1", "2", "3", "4", "5"]


def header() -> Header:
    return Header(
        id="audit-pebble", title="What does organism:pebble know, and where?", study="audit", model="organism:pebble",
        model_hash="4f1c9a7702d8" + "0" * 52, params=2_613_248, text="Python's documentation (pydoc topics)",
        tokens=65_536, text_hash="ab" * 32, seed=0, sonde="0.1.0", created="2026-11-21T09:41:00", seconds=161.2,
        command="sonde audit organism:pebble --seed 0", config_sha256="cd" * 32,
    )  # fmt: skip


def findings() -> list[Finding]:
    command = "sonde run tuned-lens --model organism:pebble --seed 0"
    return [
        Finding(
            id="loss.bits-per-byte", chapter="loss", metric="loss on unseen text", unit="bits per byte", estimate=2.214,
            interval=(2.189, 2.241), interval_method="bootstrap", n=65_536, better="lower", command=command,
            sentence="The model predicts text it has not seen clearly better than counting word sequences does.",
            control=Control("5-gram", 2.871, (2.84, 2.90)), figures=["loss"],
        ),
        Finding(
            id="depth.tuned-kl", chapter="depth", metric="mean divergence from the final prediction at layer 2",
            unit="bits", estimate=0.16, interval=(0.14, 0.18), interval_method="bootstrap", n=2048, better="lower",
            sentence="Half-way through, a tuned lens already reads most of the final prediction.", command=command,
            control=Control("logit lens", 0.86, (0.81, 0.92)), figures=["depth"], tables=["depth"],
            paper=Paper(0.5, "Pythia 410M, layer 12", "Belrose et al. 2023, https://arxiv.org/abs/2303.08112"),
        ),
        Finding(
            id="depth.erased", chapter="depth", metric="added loss on verbs", unit="bits", estimate=0.031,
            interval=(-0.012, 0.074), interval_method="bootstrap", n=310, better="higher", command=command,
            sentence="Whether erasing “verb” hurts verbs more than a random direction does is open.",
            control=Control("random direction", 0.02, (0.0, 0.05)),
        ),
        Finding(
            id="depth.refused", chapter="depth", metric="rank", command=command,
            sentence="Nothing can be said about the recurrent state.", refused="this model has no recurrent state.",
        ),
    ]  # fmt: skip


def lens_rows() -> list[dict]:
    rows = []
    for name, start, rate in (("tuned lens", 1.4, 0.4), ("logit lens", 4.6, 0.3), ("unigram", 5.4, 0.0)):
        for layer in range(7):
            mean = start * np.exp(-rate * layer)
            rows.append(
                {"layer": layer, "kl": float(mean), "low": float(0.93 * mean), "high": float(1.06 * mean), "lens": name}
            )
    return rows


def depth_chart():
    return charts.lines(
        lens_rows(), x="layer", y="kl", low="low", high="high", series="lens", control=["unigram"], x_labels=LAYERS,
        title="The tuned lens is closer to the final prediction than the logit lens at every layer",
        subtitle="Mean KL divergence from the final prediction in bits, lower is closer; bands are 95 % intervals",
        x_title="layer", y_title="bits from the final prediction",
    )  # fmt: skip


def calibration_chart():
    rows = [
        {"stated": i / 10 + 0.05, "right": i / 10 + 0.03, "low": i / 10, "high": i / 10 + 0.06, "tokens": 900 - 80 * i}
        for i in range(10)
    ]
    return charts.points(
        rows, x="stated", y="right", low="low", high="high", size="tokens", diagonal="perfect calibration",
        title="When the model says 70 %, it is right 68 % of the time",
        subtitle="Share of correct top predictions by stated probability; area shows how many tokens",
        x_title="probability the model states", y_title="share that was right",
    )  # fmt: skip


def token_view(seed: int = 0, n_layers: int = 7, k: int = 5) -> TokenView:
    rng = np.random.default_rng(seed)
    words: list[str] = []
    for piece in PASSAGE.replace("\n\n   ", "\n\n|   |").split(" "):
        words += [part for part in (" " + piece).replace("\n\n|", "|\n\n|").split("|") if part]
    words = [words[0].lstrip(), *words[1:], HOSTILE, "\t", "\u202e", "⟨E2 80⟩", "é"]
    n_tokens = len(words)
    ids = {text: i for i, text in enumerate(dict.fromkeys([*words, "\n", "   "]))}
    target = np.array([ids[text] for text in words])
    depth = np.arange(n_layers)[:, None] / (n_layers - 1)
    surprisal = np.clip(
        rng.gamma(2.0, 1.6, n_tokens)[None] * (1.7 - depth) + rng.normal(0, 0.2, (n_layers, n_tokens)), 0.02, 20
    )
    rank = np.clip(np.round(2 ** (surprisal - 1)), 1, 4000).astype(int)
    top = np.empty((n_layers, n_tokens, k), dtype=int)
    log2p = -np.sort(rng.gamma(2.0, 1.5, (n_layers, n_tokens, k)), axis=2) - 0.2
    for layer, token in np.ndindex(n_layers, n_tokens):
        others = [i for i in np.argsort(rng.random(len(ids))) if i != target[token]]
        others.insert(rank[layer, token] - 1, target[token])
        top[layer, token] = others[:k]
    surprisal[:, 0], log2p[:, 0], top[:, 0], rank[:, 0] = np.nan, np.nan, -1, 0
    return TokenView(
        id="passage", title="One passage, token by token",
        caption="The deeper the colour, the more surprised the model was by the token at the chosen layer.",
        tokens=words, sites=LAYERS[:n_layers], target_ids=target.tolist(), top=top, top_log2p=log2p, rank=rank,
        vocabulary={i: text for text, i in ids.items()}, start=(7, -1),
        statistics=[
            Statistic(name="surprisal", unit="bits", values=surprisal),
            Statistic(name="entropy", unit="bits", values=np.abs(surprisal * 0.7 + 1)),
            Statistic(
                name="tuned minus logit", unit="bits", values=surprisal - np.nanmean(surprisal), scale="diverging"
            ),
            Statistic(name="frequency", unit="", values=rng.random(n_tokens)),
        ],
    )  # fmt: skip


def chapters() -> list[Chapter]:
    loss, kl, erased, refused = findings()
    worst = Table(
        id="worst", caption="Tokens with the highest loss",
        columns=[Column(name="token", code=True), Column(name="loss", unit="bits"), Column(name="times"), "where"],
        rows=[
            ["\n\n", 11.234, 4, "topics/if"],
            [" the", 0.5, 1200, "everywhere"],
            [HOSTILE, 14.0, 1, "made up"],
            ["  ", None, 12, "lists"],
        ],
    )  # fmt: skip
    long = Table(
        id="long", caption="A long table", columns=["step", "loss"], rows=[[i, 5 / (i + 1)] for i in range(450)]
    )
    return [
        Chapter(
            id="loss", question="How well does it predict?", findings=[loss],
            answer="It spends 2.21 bits on a byte of unseen text, a 5-gram 2.87; its probabilities can be trusted.",
            blocks=[
                Figure(id="calibration", chart=calibration_chart(), caption="Points lie close below the diagonal."),
                worst,
            ],
            not_shown="Text unlike the Python documentation may be predicted better or worse.",
            how="Loss is the mean of -log2 p(token), divided by the bytes of the text.\n\nSee https://arxiv.org/abs/1706.04599.",
        ),
        Chapter(
            id="depth", question="At which layer is the prediction made?", findings=[kl, erased, refused],
            answer="Half of the predictions are settled by layer 2; the logit lens reads them three layers later.",
            blocks=[
                Figure(id="depth", chart=depth_chart(), caption="Blue lies below orange at every layer."),
                token_view(),
                long,
                Prose(heading="A remark", text="The last layer's lens is the model itself."),
            ],
            not_shown="A lens reads what a linear map can read; the model may use it otherwise.",
            how="KL(final || lens) per token, mean over 2,048 tokens, bootstrap over documents.",
        ),
        Chapter(id="state", question="What does the state remember?", failed="The model has no recurrent state."),
    ]  # fmt: skip


def appendix() -> Appendix:
    return Appendix(
        config={"model": "organism:pebble", "seed": 0, "chapters": ["loss", "depth"]},
        environment={"python": "3.12", "torch": "2.13", "threads": 2},
        timings=[("load", 0.8), ("stream", 132.4)],
        skipped=[("state", "the model has no recurrent state")],
        files=[("metrics.jsonl", 48_211, "ef" * 32), ("weights/lens.safetensors", 1_222_333, "01" * 32)],
    )
