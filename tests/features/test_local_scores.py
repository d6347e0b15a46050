"""Embedding and surprisal tell a true explanation from another latent's, on latents whose truth is planted."""

import dataclasses

import numpy as np
import pytest
import torch
from copier import copier
from latent_worlds import planted

from sonde.errors import SondeError
from sonde.features.embedding_scores import WordOverlap, embedding_score, example_embedding_score
from sonde.features.local_scores import ranking
from sonde.features.samplers import LatentExamples, Sampling, examples
from sonde.features.surprisal import EXPLAINED, SurprisalScorer
from sonde.lm.model import LanguageModel

LATENTS = 12
SMALL = Sampling(length=16, min_examples=60, train=20, test=30, negatives=30, train_negatives=20)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return copier(210)  # the last ten words stand in no window


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[list[LatentExamples], list[str]]:
    """Twelve latents that fire on five words each, and their true explanations."""
    rng = np.random.default_rng(0)
    sets = rng.permutation(200)[: 5 * LATENTS].reshape(LATENTS, 5)
    cache = planted(tmp_path_factory.mktemp("cache"), [tuple(one) for one in sets], sequences=600)
    found = [examples(cache, "planted", latent, config=SMALL) for latent in range(LATENTS)]
    assert all(isinstance(one, LatentExamples) for one in found)
    return found, [words(one) for one in sets]  # type: ignore[return-value]


def words(ids) -> str:
    """Tokens of the copier are words with numbers one lower."""
    return " ".join(f"w{i - 1}" if i else "<end>" for i in ids)


def aucs(score, found: list[LatentExamples], explanations: list[str], shift: int) -> list[float]:
    return [score(explanations[(i + shift) % LATENTS], one).auc for i, one in enumerate(found)]


def test_embedding_tells_the_true_explanation_from_a_shuffled_one(world):
    found, explanations = world

    def score(explanation, one):
        return embedding_score(f"fires on {explanation}", one, words)

    assert np.mean(aucs(score, found, explanations, 0)) > 0.9
    assert abs(np.mean(aucs(score, found, explanations, 1)) - 0.5) < 0.1


def test_surprisal_tells_the_true_explanation_from_a_shuffled_one(lm, world):
    found, explanations = world
    scorer = SurprisalScorer(lm, explained="{explanation}", unrelated=words(range(202, 207)), batch=7)
    assert np.mean(aucs(scorer.score, found, explanations, 0)) > 0.9
    assert abs(np.mean(aucs(scorer.score, found, explanations, 1)) - 0.5) < 0.1


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_surprisal_is_the_difference_of_whole_runs(lm, world, batch):
    one, explanation = world[0][0], world[1][0]
    nothing = words(range(50, 56))
    found = SurprisalScorer(lm, explained="{explanation}", unrelated=nothing, batch=batch).score(explanation, one)
    for window, value in list(zip((*one.test, *one.negatives), found.values, strict=True))[::9]:
        losses = []
        for prompt in (nothing, explanation):
            ids = torch.tensor([[*lm.encode(prompt), *window.tokens.tolist()]])
            logits = lm(ids).logits
            assert logits is not None
            logp = logits.log_softmax(-1)[0, -len(window.tokens) - 1 : -1]
            losses.append(-logp.gather(-1, ids[0, -len(window.tokens) :, None]).mean())
        assert abs(float(losses[0] - losses[1]) - value) < 1e-4


def test_windows_of_one_latent_are_nearer_to_each_other(world, tmp_path):
    cache = planted(tmp_path, [(word,) for word in range(10, 18)], sequences=600)
    drawn = [examples(cache, "planted", latent, config=SMALL) for latent in range(8)]
    found = [example_embedding_score(one, words) for one in drawn if isinstance(one, LatentExamples)]
    assert [len(one.values) for one in found] == [60] * 8
    above = np.array([one.auc for one in found]) - 0.5
    assert above.mean() > 3 * above.std() / np.sqrt(8)
    one = drawn[0]
    assert isinstance(one, LatentExamples)
    texts = [[words(w.tokens) for w in part] for part in (one.train, one.train_negatives, one.test[:1])]
    embed = WordOverlap([*texts[0], *texts[1]])
    query = embed(texts[2])[0]
    means = [np.mean([query @ vector for vector in embed(part)]) for part in texts[:2]]
    assert np.isclose(found[0].values[0], means[0] - means[1])
    no_train = dataclasses.replace(world[0][0], train_negatives=[])
    with pytest.raises(SondeError, match="sample both"):
        example_embedding_score(no_train, words)


def test_word_overlap_weighs_rare_words_and_knows_no_others():
    embed = WordOverlap(["the cat", "the dog", "the cow"])
    vectors = embed(["the cat", "cat", "the", "unicorn"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] > 0


def test_an_empty_explanation_is_not_scored(lm, world):
    one = world[0][0]
    with pytest.raises(SondeError, match="stored as failed and not scored"):
        embedding_score("  ", one, words)
    with pytest.raises(SondeError, match="stored as failed and not scored"):
        SurprisalScorer(lm).score("", one)


def test_a_prompt_without_its_place_or_too_long_to_fit_is_an_error(lm, world):
    with pytest.raises(SondeError, match=r"needs \{explanation\} in it"):
        SurprisalScorer(lm, explained="nothing")
    with pytest.raises(SondeError, match=r"prompt and window take 26\d tokens, copier has 256 positions"):
        SurprisalScorer(lm, explained=EXPLAINED, unrelated="w1").score("w2 " * 240, world[0][0])


def test_a_score_that_is_undefined_says_why():
    both = ranking(np.array([2.0, 3.0] * 4), np.array([0.0, 1.0] * 4))
    interval = both.interval()
    assert both.auc == 1 and interval is not None and interval.estimate == 1
    assert ranking(np.ones(3), np.zeros(0)).reason == "no window is silent"
    assert ranking(np.zeros(0), np.ones(3)).auc is None
    assert ranking(np.array([np.nan]), np.ones(3)).reason == "a window's value is not finite"
