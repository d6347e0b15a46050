"""Boards with walls and walks from A to B: a task with a known answer and two knobs, how far astray and how clumsy.

A board of `size` x `size` cells holds a start A, a goal B, walls X and free cells O; up to three quarters of it are
walls. The walk takes a shortest way by W, E, S, N, but at each step, with a chance drawn for the walk, it goes anywhere
instead, into walls and over the edge as well. It ends with D (done) or, where no way is, with U (unsolvable). What
a prompt can be asked for is the pair (moves beyond the shortest, moves that hit something). The task of Nordby,
arXiv:2505.14943 (8 x 8), rebuilt from its description.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from sonde.errors import SondeError

_MOVES = {"W": (-1, 0), "E": (1, 0), "S": (0, 1), "N": (0, -1)}
_CHANCES = (2, 8)  # a walk strays at one step in this many, drawn from [low, high)
_CUE = "\nMoves:\n"

Cell = tuple[int, int]


@dataclass(frozen=True)
class Walk:
    """A board, a walk on it and the two conditions.

    board: rows of cells joined by line breaks. moves: letters of the walk and its end, D or U. extra: moves beyond the
    shortest way (of a board without one: all moves). hits: moves that met a wall or the edge.
    """

    board: str
    moves: str
    extra: int
    hits: int

    @property
    def solvable(self) -> bool:
        """Whether there is a way from A to B."""
        return self.moves.endswith("D")

    def context(self, *, spaces: bool = True) -> str:
        """The board and the cue, as a model reads them: a space before every cell makes it a token of its own."""
        return _spaced(self.board, spaces) + _CUE

    def target(self, *, spaces: bool = True) -> str:
        """The moves, as a model should write them."""
        return _spaced(self.moves, spaces)


@dataclass(frozen=True)
class Outcome:
    """Where moves led: `reached` B and said so with D; `steps` taken, `hits` among them; `legal` if all are moves."""

    reached: bool
    steps: int
    hits: int
    legal: bool


def walks(n: int, *, size: int = 8, seed: int) -> list[Walk]:
    """`n` boards, each with one walk. Raises `SondeError` for fewer than one and for boards under 2 x 2."""
    if n < 1 or size < 2:
        raise SondeError(f"{n} walks on boards of {size} x {size}: ask for 1 or more, on 2 x 2 or larger")
    rng = np.random.default_rng((seed, size))
    return [_walk(rng, size) for _ in range(n)]


def follow(board: str, moves: str) -> Outcome:
    """Walk `moves` (letters, spaces between them or not) on a board, to the first D, U or foreign letter."""
    free, start, goal = _read(board)
    place, steps, hits, letters = start, 0, 0, moves.replace(" ", "")
    for letter in letters:
        if letter not in _MOVES:
            return Outcome(letter == "D" and place == goal, steps, hits, legal=letter in "DU")
        there = _step(place, letter)
        place, steps, hits = (there if there in free else place), steps + 1, hits + (there not in free)
    return Outcome(False, steps, hits, legal=True)


def _walk(rng: np.random.Generator, size: int) -> Walk:
    cells = [(x, y) for y in range(size) for x in range(size)]
    taken = rng.permutation(size * size)[: int(rng.integers(size * size * 3 // 4)) + 2]
    goal, start, *blocks = (cells[i] for i in taken)
    walls = set(blocks)
    signs = dict.fromkeys(walls, "X") | {start: "A", goal: "B"}
    board = "\n".join("".join(signs.get((x, y), "O") for x in range(size)) for y in range(size))
    free = set(cells) - walls
    far = _distances(free, goal)
    place, letters, hits = start, "", 0
    strays = int(rng.integers(*_CHANCES))
    while place != goal:
        if rng.integers(strays) == 0:
            letter = "WESN"[rng.integers(4)]
        elif place in far:
            letter = min(_MOVES, key=lambda move: far.get(_step(place, move), np.inf))
        else:
            return Walk(board, letters + "U", len(letters), hits)
        there = _step(place, letter)
        place, letters, hits = (there if there in free else place), letters + letter, hits + (there not in free)
    return Walk(board, letters + "D", len(letters) - far[start], hits)


def _distances(free: set[Cell], goal: Cell) -> dict[Cell, int]:
    """Moves to the goal from every free cell that has a way to it."""
    far, waiting = {goal: 0}, deque([goal])
    while waiting:
        place = waiting.popleft()
        for move in _MOVES:
            there = _step(place, move)
            if there in free and there not in far:
                far[there] = far[place] + 1
                waiting.append(there)
    return far


def _step(place: Cell, move: str) -> Cell:
    return place[0] + _MOVES[move][0], place[1] + _MOVES[move][1]


def _read(board: str) -> tuple[set[Cell], Cell, Cell]:
    rows = board.replace(" ", "").split("\n")
    signs = {(x, y): sign for y, row in enumerate(rows) for x, sign in enumerate(row)}
    ends = [[cell for cell, sign in signs.items() if sign == end] for end in "AB"]
    if [len(found) for found in ends] != [1, 1]:
        raise SondeError(f"a board has one A and one B, not {len(ends[0])} and {len(ends[1])}")
    return {cell for cell, sign in signs.items() if sign != "X"}, ends[0][0], ends[1][0]


def _spaced(text: str, spaces: bool) -> str:
    return "".join(f" {sign}" if sign.isalpha() else sign for sign in text) if spaces else text
