"""The choice of rows against other packages for active learning, on the same probabilities."""

import warnings

import numpy as np
import pytest
import torch

from sonde.knowledge.label_choice import Entropy, Margin, entropy, margin, probabilities

pytestmark = pytest.mark.peer
SCORES = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def peer(name):
    # Other packages warn of their own dependencies while they are imported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


class Known:
    """A classifier whose probabilities are given."""

    def predict_proba(self, rows, **_):
        return probabilities(SCORES).numpy()


@pytest.mark.parametrize(("function", "choice"), [("entropy_sampling", Entropy()), ("margin_sampling", Margin())])
def test_the_most_uncertain_rows_are_those_of_modal(function, choice):
    query = getattr(peer("modAL.uncertainty"), function)
    theirs = query(Known(), np.zeros((300, 1)), n_instances=25)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert set(np.asarray(theirs).tolist()) == set(choice.choose(SCORES, 25).tolist())


def test_scores_rank_rows_as_scikit_activeml_does():
    uncertainty_scores = peer("skactiveml.pool").uncertainty_scores
    p = probabilities(SCORES).numpy()
    assert np.allclose(uncertainty_scores(p, method="entropy"), entropy(SCORES).numpy())
    theirs = uncertainty_scores(p, method="margin_sampling")
    assert (np.argsort(theirs, kind="stable") == np.argsort(margin(SCORES).numpy(), kind="stable")).all()
