"""Walks on boards: what they claim about themselves is what following them finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra

from sonde.data.pathfinding import follow, walks
from sonde.errors import SondeError


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_following_a_walk_finds_its_end_its_hits_and_its_length(seed, size):
    (walk,) = walks(1, size=size, seed=seed)
    outcome = follow(walk.board, walk.moves)
    assert (outcome.reached, outcome.hits, outcome.legal) == (walk.solvable, walk.hits, True)
    assert outcome.steps == len(walk.moves) - 1
    assert walk.extra >= walk.hits  # a move into a wall is a move too many
    assert len(walk.board.split("\n")) == size


def test_moves_beyond_the_shortest_way_are_counted_from_the_distance_that_scipy_finds():
    for walk in walks(100, size=5, seed=1):
        board = np.array([list(row) for row in walk.board.split("\n")])
        free = board.ravel() != "X"
        near = [(a, b) for a in range(25) for b in (a + 1, a + 5) if b < 25 and (b == a + 5 or b % 5)]
        edges = [(a, b) for a, b in near if free[a] and free[b]]
        graph = coo_array((np.ones(len(edges)), tuple(np.array(edges).T.reshape(2, -1))), shape=(25, 25))
        start, goal = (int(np.flatnonzero(board.ravel() == sign)[0]) for sign in "AB")
        far = dijkstra(graph, directed=False, indices=start, unweighted=True)[goal]
        assert walk.solvable == bool(np.isfinite(far))
        if walk.solvable:
            assert len(walk.moves) - 1 - walk.extra == far


def test_boards_are_as_the_task_has_them():
    many = walks(300, seed=0)
    assert {len(walk.board) for walk in many} == {8 * 8 + 7}
    assert 0.3 < sum(walk.solvable for walk in many) / len(many) < 0.9
    assert max(walk.board.count("X") for walk in many) <= 48
    assert any(walk.hits for walk in many) and any(walk.extra > walk.hits for walk in many)
    assert walks(3, seed=5) == walks(3, seed=5) != walks(3, seed=6)


def test_every_sign_can_be_a_token_of_its_own():
    walk = walks(1, size=2, seed=0)[0]
    assert walk.context() == "".join(c if c == "\n" else f" {c}" for c in walk.board) + "\nMoves:\n"
    assert walk.context(spaces=False) == walk.board + "\nMoves:\n"
    assert walk.target().replace(" ", "") == walk.moves
    assert follow(walk.context().removesuffix("\nMoves:\n"), walk.target()) == follow(walk.board, walk.moves)


def test_what_is_no_walk_is_seen():
    board = "AO\nXB"
    assert follow(board, "ESD").reached
    assert not follow(board, "ES").reached  # it never says that it is done
    assert follow(board, "SWESD").hits == 2
    assert not follow(board, "E?").legal
    with pytest.raises(SondeError, match="one A and one B"):
        follow("OO\nOB", "E")
    with pytest.raises(SondeError, match="0 walks on boards of 8 x 8"):
        walks(0, seed=0)
