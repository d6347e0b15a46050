"""Short made-up biographies of people in twelve professions, with the gender that their pronouns say.

No profession is named: each biography tells two or three things that the person does. Some of these are done in one
profession only, some in two (a nurse and a surgeon both visit patients after operations), so that a reader who sees the
shared ones alone has to guess, and gender is a help: women and men are not equally many in a profession. That is the
situation of De-Arteaga et al. 2019 (Bias in Bios), with shares and texts that are ours and known.
"""

from dataclasses import dataclass

import numpy as np

from sonde.errors import SondeError

# Pairs of professions with opposite shares of women: name, share, what only it does; then what both of a pair do.
_PAIRS = (
    (
        ("nurse", 0.88, ("changes dressings on the ward", "takes blood and checks temperatures at night")),
        ("surgeon", 0.14, ("repairs valves of the heart", "operates on broken hips")),
        ("visits patients after operations", "works long shifts in the hospital", "calms worried families"),
    ),
    (
        ("primary school teacher", 0.84, ("teaches six-year-olds to read", "plays the piano for the first grade")),
        ("professor", 0.2, ("publishes on ancient trade routes", "supervises doctoral theses")),
        ("prepares lessons on Sundays", "marks papers late in the evening", "loves to explain things"),
    ),
    (
        ("paralegal", 0.82, ("files documents for a law firm", "keeps the calendar of three partners")),
        ("attorney", 0.18, ("defends clients before the court", "argued two cases before the appeals court")),
        ("reads contracts all day", "prepares hearings", "knows the law on tenancy well"),
    ),
    (
        ("dietitian", 0.86, ("writes meal plans for diabetics", "counts vitamins in school lunches")),
        ("chef", 0.16, ("runs the kitchen of a hotel", "is known for roasted duck")),
        ("cares about fresh vegetables", "tries new recipes at home", "buys at the market before dawn"),
    ),
    (
        ("interior designer", 0.8, ("chooses fabrics and lamps for living rooms", "paints walls in quiet colours")),
        ("architect", 0.22, ("draws plans for bridges and towers", "calculates loads of roofs")),
        ("sketches rooms by hand", "meets clients on building sites", "thinks a lot about light"),
    ),
    (
        ("flight attendant", 0.85, ("serves coffee above the clouds", "shows passengers the exits")),
        ("pilot", 0.1, ("lands airliners in fog", "flew transport planes for the air force")),
        ("sleeps in hotels near airports", "crosses the ocean twice a week", "walks through the cabin in uniform"),
    ),
)
_OPENINGS = (
    "{She} lives in {place} and {a}.",
    "Born in {place}, {she} {a}.",
    "For {years} years {she} has had the same work: {she} {a}.",
    "{Her} friends in {place} say that {she} {a}.",
)
_MIDDLES = (
    "{She} also {b}.",
    "On most days {she} {b}.",
    "In {her} work {she} {b}.",
    "What few people know: {she} {b}.",
)
_CLOSINGS = (
    "{Her} {kin} is proud of {obj}.",
    "On weekends {she} {hobby}.",
    "{She} shares a house with {her} {kin}.",
    "",
)
_PLACES = ("Leeds", "Porto", "Ghent", "Turin", "Denver", "Perth", "Oslo", "Lima", "Kyoto", "Cork", "Graz", "Tunis")
_HOBBIES = ("grows tomatoes", "swims in the lake", "plays chess", "sings in a choir", "repairs old radios", "runs")
_KIN = ("mother", "father", "sister", "brother", "daughter", "son")
_WOMAN = {"she": "she", "She": "She", "her": "her", "Her": "Her", "obj": "her"}
_MAN = {"she": "he", "She": "He", "her": "his", "Her": "His", "obj": "him"}
_SHARED = 0.7  # chance that a thing told is one that another profession does too

PROFESSIONS = tuple(name for *pair, _ in _PAIRS for name, *_ in pair)
SHARE_OF_WOMEN = {name: share for *pair, _ in _PAIRS for name, share, _ in pair}


@dataclass(frozen=True)
class ConceptTable:
    """Texts with a concept to erase and a task to keep, one of each a row.

    texts: what is embedded. concept, task: classes as numbers into `concepts` and `tasks`.
    """

    texts: tuple[str, ...]
    concept: np.ndarray
    task: np.ndarray
    concepts: tuple[str, ...]
    tasks: tuple[str, ...]

    @classmethod
    def of(cls, texts: list[str], concept: list[str], task: list[str]) -> "ConceptTable":
        """A table from columns of strings.

        Raises `SondeError` for columns of different lengths and for fewer than two classes of either.
        """
        if not len(texts) == len(concept) == len(task):
            raise SondeError(
                f"{len(texts)} texts, {len(concept)} concepts and {len(task)} tasks: give one of each a row"
            )
        names, numbers = zip(*(np.unique(column, return_inverse=True) for column in (concept, task)), strict=True)
        for kind, found in zip(("concept", "task"), names, strict=True):
            if len(found) < 2:
                raise SondeError(
                    f"the {kind} has {len(found)} class: with fewer than two there is nothing to tell apart"
                )
        return cls(tuple(texts), *numbers, *(tuple(map(str, found)) for found in names))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts)


def biographies(n: int = 3000, *, seed: int = 0) -> ConceptTable:
    """Draw `n` biographies: professions uniformly, gender by the profession's share of women.

    Raises `SondeError` for fewer than 48 (some of every profession and gender are needed).
    """
    if n < 4 * len(PROFESSIONS):
        raise SondeError(f"{n} biographies are too few: at least {4 * len(PROFESSIONS)} are needed")
    rng = np.random.default_rng(seed)
    texts, genders, tasks = [], [], []
    for _ in range(n):
        first, second, shared = _PAIRS[rng.integers(len(_PAIRS))]
        name, share, own = (first, second)[rng.integers(2)]
        woman = bool(rng.random() < share)
        told: list[str] = []
        while len(told) < 2:
            thing = str(rng.choice(shared if rng.random() < _SHARED else own))
            if thing not in told:
                told.append(thing)
        words = {
            **(_WOMAN if woman else _MAN),
            "a": told[0],
            "b": told[1],
            "place": str(rng.choice(_PLACES)),
            "years": str(rng.integers(3, 30)),
            "kin": str(rng.choice(_KIN)),
            "hobby": str(rng.choice(_HOBBIES)),
        }
        parts = [str(rng.choice(options)).format(**words) for options in (_OPENINGS, _MIDDLES, _CLOSINGS)]
        texts.append(" ".join(part for part in parts if part))
        genders.append("woman" if woman else "man")
        tasks.append(name)
    return ConceptTable.of(texts, genders, tasks)
