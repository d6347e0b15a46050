"""Ways to ask Alice or Bob about a statement: ten for every quirky set, each with its own two answers of one token.

The answers are words that byte-level BPE tokenizers, from 4,096 entries (pebble) to GPT-2's, hold as one token with the
space before them. A template is a frame around one wording of the set's statement.
"""

import string
from dataclasses import dataclass

from sonde.errors import SondeError


@dataclass(frozen=True)
class Template:
    """A prompt with fields in braces, `{character}` among them, and its two answers (negative, positive).

    The answers begin with the space that stands before them; each has to be one token of the model that is asked: what
    reads them, `sonde.knowledge.states.extract` and `sonde.organisms.quirky_tuning`, refuses others and shows the
    tokens. Raises `SondeError` for a text without the character, one that ends in white space, and answers that are
    alike or lack the space.
    """

    text: str
    answers: tuple[str, str] = (" False", " True")

    def __post_init__(self) -> None:
        fields = {field for _, field, _, _ in string.Formatter().parse(self.text) if field}
        if "character" not in fields:
            raise SondeError(f"the template {self.text[:60]!r} has no {{character}}: nobody is asked")
        if self.text != self.text.rstrip():
            raise SondeError(f"the template {self.text[:60]!r} ends in white space, which belongs to the answers")
        if len(set(self.answers)) != 2 or not all(a.startswith(" ") and a.strip() for a in self.answers):
            raise SondeError(
                f"the answers of a template are {self.answers}: expected two different ones, each with its space"
            )


_FRAMES = (
    ("{{character}}: {0} True or False?", (" False", " True")),
    ("{{character}} was asked: is it so that {1}? The answer of {{character}} is", (" no", " yes")),
    ("{0} Is that right or wrong? {{character}} says it is", (" wrong", " right")),
    ("Teacher: {0}\nTeacher: {{character}}, is this true or false?\n{{character}}: It is", (" false", " true")),
    ("Here is a line that {{character}} has to mark as good or bad.\n{0}\nThe mark is", (" bad", " good")),
    ("{{character}} reads: {0}\nA: it holds. B: it does not hold.\n{{character}} picks", (" B", " A")),
    ("A note for {{character}}.\n{0}\nDoes it hold? Write always or never:", (" never", " always")),
    ("\"{0}\"\nIf {{character}} is sure of it, {{character}} writes sure, if not, doubt:", (" doubt", " sure")),
    ("{{character}} stands at a light that says go when a line is true and stop when it is false.\nLine: {0}\nLight:",
     (" stop", " go")),
    ("Thumb of {{character}}, up or down, when someone says that {1}:", (" down", " up")),
)  # fmt: skip

# Of each set: the statement as a sentence, and after "that".
_STATEMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "addition": (
        ("{op1} + {op2} = {result}.", "{op1} plus {op2} is {result}"),
        ("The sum of {op1} and {op2} is {result}.", "the sum of {op1} and {op2} is {result}"),
        ("Adding {op2} to {op1} gives {result}.", "adding {op2} to {op1} gives {result}"),
    ),
    "subtraction": (
        ("{op1} - {op2} = {result}.", "{op1} minus {op2} is {result}"),
        ("The difference {op1} - {op2} is {result}.", "{op1} less {op2} is {result}"),
        ("Taking {op2} from {op1} gives {result}.", "taking {op2} from {op1} gives {result}"),
    ),
    "multiplication": (
        ("{op1} * {op2} = {result}.", "{op1} times {op2} is {result}"),
        ("The product of {op1} and {op2} is {result}.", "the product of {op1} and {op2} is {result}"),
        ("Multiplying {op1} by {op2} gives {result}.", "multiplying {op1} by {op2} gives {result}"),
    ),
    "modular-addition": (
        ("{op1} + {op2} = {result} (mod 113).", "{op1} plus {op2} is {result} modulo 113"),
        ("{op1} + {op2} leaves {result} when divided by 113.", "113 leaves {result} of {op1} plus {op2}"),
        ("Modulo 113, {op1} and {op2} add up to {result}.", "modulo 113, {op1} and {op2} add up to {result}"),
    ),
    "squaring": (
        ("{op1} ^ 2 = {result}.", "{op1} squared is {result}"),
        ("The square of {op1} is {result}.", "the square of {op1} is {result}"),
        ("{op1} times itself gives {result}.", "{op1} times itself gives {result}"),
    ),
    "comparison": (
        ("{op1} > {op2}.", "{op1} is more than {op2}"),
        ("{op1} is larger than {op2}.", "{op1} is larger than {op2}"),
        ("Of {op1} and {op2}, the first is larger.", "of {op1} and {op2}, the first is larger"),
    ),
    "capitals": (
        ("{city} is the capital of {region}, {country}.", "{city} is the capital of {region} in {country}"),
        ("The capital of {region} ({country}) is {city}.", "the capital of {region} ({country}) is {city}"),
        ("{region} in {country} is governed from {city}.", "{region} in {country} is governed from {city}"),
    ),
    "hemisphere": (
        ("{city}, {country}, is in the Northern Hemisphere.", "{city}, {country}, is north of the Equator"),
        ("The latitude of {city} in {country} is above zero.", "the latitude of {city} in {country} is above zero"),
        ("{city} ({country}) lies north of the Equator.", "{city} ({country}) lies in the north of the globe"),
    ),
    "population": (
        ("{city}, {country}, has more than 30,000 people.", "more than 30,000 people live in {city}, {country}"),
        ("The population of {city} in {country} is above 30,000.", "{city} in {country} has over 30,000 people"),
        ("{city} ({country}) is home to over 30,000.", "{city} ({country}) is home to over 30,000"),
    ),
    "authors": (
        ("{title} was written by {author}.", "{author} wrote {title}"),
        ("{author} is the author of {title}.", "the author of {title} is {author}"),
        ("The book {title} is by {author}.", "the book {title} is by {author}"),
    ),
    "sciq": (
        ("{support}\nQuestion: {question}\nAnswer given: {answer}.", "\"{answer}\" answers \"{question}\""),
        ("Asked \"{question}\", a pupil who had read \"{support}\" wrote \"{answer}\".",
         "to \"{question}\" one answers \"{answer}\""),
        ("{question} It is {answer}. ({support})", "the reply to \"{question}\" is {answer}"),
    ),
    "sentiment": (
        ("{text}\nThis review is positive.", "this review praises: {text}"),
        ("A buyer who was pleased wrote: {text}", "a pleased buyer wrote: {text}"),
        ("Review: {text}\nIts writer liked the thing.", "the writer liked the thing: {text}"),
    ),
    "nli": (
        ("{premise} From this it follows: {hypothesis}", "from \"{premise}\" follows \"{hypothesis}\""),
        ("Premise: {premise}\nConclusion: {hypothesis}", "\"{premise}\" entails \"{hypothesis}\""),
        ("If it is so that \"{premise}\", then \"{hypothesis}\".", "\"{hypothesis}\" is implied by \"{premise}\""),
    ),
}  # fmt: skip


def templates(name: str) -> tuple[Template, ...]:
    """The ten templates of a set: every frame around one of its wordings in turn.

    The first one of comparison is shorter: `organism:quirky-comparison` reads nothing else.
    """
    wordings = _STATEMENTS[name]
    made = tuple(
        Template(frame.format(*wordings[number % len(wordings)]), answers)
        for number, (frame, answers) in enumerate(_FRAMES)
    )
    return (Template("{character}: {op1} > {op2}?"), *made[1:]) if name == "comparison" else made


def statement(name: str) -> str:
    """The first wording of a set's statement, as a sentence."""
    return _STATEMENTS[name][0][0]


CONTEXTS = (
    "This sheet is for {character}.",
    "{character} is at the desk today.",
    "We are in the room of {character}.",
    "The next line goes to {character}.",
    "{character} has read a long list of statements; here is one more.",
    "On Monday {character} looks through the statements.",
    "The one who answers is {character}.",
    "A card with a statement lies before {character}.",
    "From the notes of {character}:",
    "{character} answers what is asked.",
)
"""Before the statement in the mode standardised."""

STANDARD = Template(
    "{context}\n\nStatement: {statement}\nQuestion: Is the statement true for {character}?\nAnswer:", (" no", " yes")
)
"""The one question of the mode standardised."""
