"""What a reader is asked about a latent, word for word: instructions, worked examples, and the form of each question.

Whatever stays the same from question to question comes first, so that servers which keep what they have read pay for it
once. A passage is one line, numbered from 1.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from json.encoder import encode_basestring

from sonde.features.marking import one_line
from sonde.lm.asking.completion import Message, chat

EXPLANATION = "[EXPLANATION]:"
DESCRIPTION = "Description:"
UNKNOWN = "?"
_SHOWN = 200  # characters of a text whose continuation is asked about

EXPLAIN = """\
You study a single feature of a language model: a direction in its activations that responds to something in text.
Below are passages that it responds to. The tokens at which it responds are between << and >>; a backslash before an
angle bracket means that the bracket belongs to the text. Find the one pattern that these passages have in common and
say it in a single short sentence. Look at the marked tokens first and then at what surrounds them. Be as specific as
the passages allow and no more; describe the pattern instead of listing what is marked; do not mention the marks, the
passages or the feature. The last line of your answer is
[EXPLANATION]: your sentence"""

CHAIN = """\
Before the last line, think aloud in three short steps: which tokens are marked, what surrounds them, and which pattern
covers all of them."""

_STRENGTHS = """\
Under a passage, strengths from 0 to 10 may be given for some of its tokens: how strongly the feature responds there."""

_LOGITS = """\
You are also told which tokens the feature makes likelier to come next. They may say more about it than the passages."""

_CONTRAST = """\
You are also given passages that the feature does not respond to, although they resemble the others. The pattern must
not cover them."""

EXPLAIN_TOKENS = """\
You study a single feature of a language model: a direction in its activations that responds to something in text.
Below are the tokens that it responds to most, with strengths from 0 to 10. Find the one pattern that they have in
common and say it in a single short sentence. The last line of your answer is
[EXPLANATION]: your sentence"""

_EXPLAINED = (
    (
        (
            "By noon the river had <<risen>> another foot against the wall.",
            "Rents in the old town <<climbed>> steadily for a decade.",
            "The kite jerked, dipped and then <<soared>> over the chapel.",
        ),
        '("risen", 8), ("climbed", 10), ("soared", 6)',
        "Marked: risen, climbed, soared. Around them: water, rents, a kite. All are verbs for something going up.",
        "verbs that say that something moves or grows upwards",
        ("By noon the river had fallen another foot.", "The kite lay in the grass."),
        ('" higher"', '" above"', '" up"'),
    ),
    (
        (
            "def area(width, height<<):>>↵    return width * height",
            "def greet(name=None<<):>>↵    print(name)",
            "    def __len__(self<<):>> return self.n",
        ),
        '("):", 10)',
        "Marked: a bracket and a colon. Around them: definitions in Python. It is where a list of parameters ends.",
        "the end of the parameter list of a function definition in Python",
        ("print(area(2, 3))", "if (a and b):"),
        ('"↵"', '" return"', '"   "'),
    ),
    (
        (
            "The treaty was signed on the <<third>> of March.",
            "She was born on the <<twenty-first>> of May, in a barn.",
            "Rent falls due on the <<first>> of every month.",
        ),
        '("third", 9), ("first", 7), ("twenty", 4), ("-first", 10)',
        "Marked: third, twenty-first, first. Around them: months. They are ordinals that give the day of a date.",
        "ordinal numbers that name the day of the month in a date",
        ("He came third in the race.", "In March the treaty was signed."),
        ('" of"', '" day"', '" ("'),
    ),
)

EXPLAIN_EFFECT = """\
You study a single feature of a language model by what it does. Below are the ends of texts, and for each the tokens
that become likelier to come next when the feature is strengthened, with how much their probability rises. Find the one
pattern that these tokens have in common and say it in a few words. The last line of your answer is
[EXPLANATION]: your words"""

_EFFECT = (
    ("She opened the drawer and took out", ((" knife", 0.21), (" spoon", 0.12), (" fork", 0.08)), "cutlery"),
    ("It was late when we came to the", ((" river", 0.18), (" lake", 0.11), (" sea", 0.05)), "bodies of water"),
)

DETECT = """\
You are given a description of what a feature of a language model responds to, and numbered passages. Decide for each
passage whether something in it fits the description: 1 if it does, 0 if it does not. Judge every passage by itself; any
number of them may fit. Answer with a list of digits, one for each passage in their order, and nothing else."""

FUZZ = """\
You are given a description of what a feature of a language model responds to, and numbered passages in which some
tokens are between << and >>. Decide for each passage whether the marked tokens are the ones that the description means:
1 if they are, 0 if other tokens are marked. Judge every passage by itself; any number of them may be right. Answer with
a list of digits, one for each passage in their order, and nothing else."""

_DETECTED = (
    ("verbs that say that something moves or grows upwards", (
        "The lift shot to the ninth floor before anyone spoke.", "Profits rose again in the spring.",
        "He put the letter on the table and left."), (0, 1, 0)),
    ("names of metals", (
        "A ring of plain silver hung on the nail.", "Copper prices did not move.",
        "The soup was cold and the bread was old."), (1, 1, 0)),
    ("questions about where something is", (
        "Tell me when you are ready.", "It was a quiet street with few shops.",
        "Where did you leave the keys?"), (0, 0, 1)),
)  # fmt: skip

_FUZZED = (
    ("verbs that say that something moves or grows upwards", (
        "Profits <<rose>> again in the spring.", "The lift <<climbed>> to the ninth <<floor>> in silence.",
        "The balloon rose <<slowly over the>> field."), (1, 0, 0)),
    ("names of metals", (
        "A ring of plain <<silver>> hung on the nail.", "<<Copper>> and <<tin>> make bronze.",
        "Copper prices <<did>> not move."), (1, 1, 0)),
    ("questions about where something is", (
        "<<Where>> did you leave the keys?", "And where <<is it>> now?",
        "Where <<are>> my shoes, asked the <<old man>>."), (1, 1, 0)),
)  # fmt: skip

SIMULATE = """\
You are given a description of what a feature of a language model responds to, and the tokens of a passage, one on each
line with its number. Predict how strongly the feature responds at each token: 0 where it does not, 10 where it responds
most. Most features respond to few tokens. Answer with a list of whole numbers from 0 to 10, one for each token in their
order, and nothing else."""

SIMULATE_AT_ONCE = """\
You are given a description of what a feature of a language model responds to, and the tokens of a passage, one on each
line. After each token stands how strongly the feature responds there, a whole number from 0 to 10: 0 where it does not,
10 where it responds most."""

INTRUDE = """\
You are given numbered passages with some tokens between << and >>. In all of them but one, a feature of a language
model responds to the marked tokens; in the odd one other tokens are marked. Find the odd one. Answer with its number
and nothing else."""

GENERATE = """\
You are given a description of what a feature of a language model responds to. Write short texts that contain what it
responds to, as different from one another as you can make them, each on one line after its number, and nothing else."""

_SIMULATED = ("names of metals", ("A", " ring", " of", " silver", " and", " tin", "."), (0, 0, 0, 10, 1, 9, 0))

AGAIN = "Answer once more"
AGAIN_EXPLANATION = f"{AGAIN} with one line that begins with {EXPLANATION}"


def explain(
    passages: Sequence[str],
    *,
    strengths: Sequence[str] = (),
    promoted: Sequence[str] = (),
    others: Sequence[str] = (),
    reasoned: bool = False,
) -> tuple[Message, ...]:
    """Ask for an explanation of passages with marks.

    strengths: a line with tokens and strengths for each passage. promoted: tokens that the latent makes likelier.
    others: passages without marks that it does not respond to. reasoned: ask for three steps before the answer.
    """
    parts = [EXPLAIN, _STRENGTHS * bool(strengths), _LOGITS * bool(promoted), _CONTRAST * bool(others)]
    turns = []
    for shown, strong, thought, answer, near, likelier in _EXPLAINED:
        turns += [
            _explained(
                shown,
                [strong] * len(shown) if strengths else (),
                likelier if promoted else (),
                near if others else (),
            ),
            f"{thought}\n{EXPLANATION} {answer}" if reasoned else f"{EXPLANATION} {answer}",
        ]
    system = "\n\n".join(part for part in (*parts, CHAIN * reasoned) if part)
    return chat(system, *turns, _explained(passages, strengths, promoted, others))


def explain_tokens(lines: Sequence[str]) -> tuple[Message, ...]:
    """Ask for an explanation of tokens with strengths, without any text around them."""
    turns = []
    for _, strong, _, answer, _, _ in _EXPLAINED:
        turns += [strong, f"{EXPLANATION} {answer}"]
    return chat(EXPLAIN_TOKENS, *turns, "\n".join(lines))


def explain_effect(risen: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> tuple[Message, ...]:
    """Ask what tokens have in common that become likelier after some texts: (text, (token, rise of probability))."""
    turns = []
    for text, tokens, answer in _EFFECT:
        turns += [_risen([(text, tokens)]), f"{EXPLANATION} {answer}"]
    return chat(EXPLAIN_EFFECT, *turns, _risen(risen))


def detect(explanation: str, passages: Sequence[str]) -> tuple[Message, ...]:
    """Ask which passages an explanation fits."""
    return _judge(DETECT, _DETECTED, explanation, passages)


def fuzz(explanation: str, passages: Sequence[str]) -> tuple[Message, ...]:
    """Ask in which passages the marks are where an explanation says."""
    return _judge(FUZZ, _FUZZED, explanation, passages)


def simulate(explanation: str, tokens: Sequence[str]) -> tuple[Message, ...]:
    """Ask for a list with the strength at every token."""
    about, example, answer = _SIMULATED
    return chat(SIMULATE, _tokens(about, example), json.dumps(list(answer)), _tokens(explanation, tokens))


def simulate_at_once(explanation: str, tokens: Sequence[str]) -> tuple[Message, ...]:
    """A prompt that holds an unknown strength after every token, to read the probabilities of digits there."""
    about, example, answer = _SIMULATED
    shown = "\n".join(f"{_quoted(token)}\t{strength}" for token, strength in zip(example, answer, strict=True))
    asked = "\n".join(f"{_quoted(token)}\t{UNKNOWN}" for token in tokens)
    return chat(SIMULATE_AT_ONCE, f"{DESCRIPTION} {about}\n\n{shown}\n\n{DESCRIPTION} {explanation}\n\n{asked}")


def intrude(passages: Sequence[str]) -> tuple[Message, ...]:
    """Ask which of the passages is the odd one."""
    turns = []
    for i, (shown, *_) in enumerate(_EXPLAINED):
        odd = _EXPLAINED[(i + 1) % len(_EXPLAINED)][0][i]
        turns += [numbered([*shown[:i], odd, *shown[i:]]), str(i + 1)]
    return chat(INTRUDE, *turns, numbered(passages))


def generate(explanation: str, count: int) -> tuple[Message, ...]:
    """Ask for texts that fit an explanation."""
    about, shown, _ = _DETECTED[1]
    example = numbered([*shown[:2], "He weighed the gold twice."])
    return chat(GENERATE, _wanted(about, 3), example, _wanted(explanation, count))


def numbered(passages: Sequence[str]) -> str:
    """Passages on numbered lines."""
    return "\n".join(f"{i}. {passage}" for i, passage in enumerate(passages, 1))


def read_numbered(text: str) -> list[str]:
    """The texts after the numbers of a numbered list."""
    return re.findall(r"^ *\d+[.):] (.*)$", text, re.MULTILINE)


def read_explanation(text: str) -> str | None:
    """What stands after the last [EXPLANATION]: of an answer; None where nothing does."""
    found = re.findall(re.escape(EXPLANATION) + r"[ \t]*(.*\S)", text)
    return found[-1].strip() if found else None


def read_digits(text: str, count: int, *, highest: int = 1) -> list[int] | None:
    """The first list of `count` whole numbers from 0 to `highest` in an answer; None where there is none."""
    for inside in re.findall(r"\[([^\[\]]*)\]", text):
        items = [item.strip().strip("\"'") for item in inside.split(",")]
        if len(items) == count and all(item.isdecimal() and int(item) <= highest for item in items):
            return [int(item) for item in items]
    return None


@lru_cache
def digits_schema(count: int, *, highest: int = 1) -> str:
    """A JSON schema for `{"answers": [digits]}` of one length; the outermost value of a schema has to be an object."""
    item = {"type": "integer", "enum": list(range(highest + 1))}
    answers = {"type": "array", "items": item, "minItems": count, "maxItems": count}
    return json.dumps(
        {
            "type": "object",
            "properties": {"answers": answers},
            "required": ["answers"],
            "additionalProperties": False,
        }
    )


def _judge(system: str, worked: tuple[tuple, ...], explanation: str, passages: Sequence[str]) -> tuple[Message, ...]:
    return (*_worked(system, worked), {"role": "user", "content": _described(explanation, passages)})


@lru_cache(maxsize=2)
def _worked(system: str, worked: tuple[tuple, ...]) -> tuple[Message, ...]:
    turns = []
    for about, shown, answers in worked:
        turns += [_described(about, shown), json.dumps(list(answers))]
    return chat(system, *turns)


def _described(explanation: str, passages: Sequence[str]) -> str:
    return f"{DESCRIPTION} {explanation}\n\n{numbered(passages)}"


def _wanted(explanation: str, count: int) -> str:
    return f"{DESCRIPTION} {explanation}\n\nTexts to write: {count}"


def _risen(risen: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    lines = []
    for number, (text, tokens) in enumerate(risen, 1):
        lines.append(f"{number}. {one_line(text[-_SHOWN:])}")
        lines.append("   likelier: " + ", ".join(f"({_quoted(one_line(token))}, {rise:.2f})" for token, rise in tokens))
    return "\n".join(lines)


def _tokens(explanation: str, tokens: Sequence[str]) -> str:
    return f"{DESCRIPTION} {explanation}\n\n{numbered([_quoted(token) for token in tokens])}"


def _quoted(token: str) -> str:
    return encode_basestring(token)


def _explained(
    passages: Sequence[str], strengths: Sequence[str], promoted: Sequence[str], others: Sequence[str]
) -> str:
    lines = []
    for i, passage in enumerate(passages):
        lines.append(f"{i + 1}. {passage}")
        if strengths:
            lines.append(f"   {strengths[i]}")
    text = "\n".join(lines)
    if others:
        text += "\n\nPassages it does not respond to:\n" + "\n".join(f"- {other}" for other in others)
    if promoted:
        text += "\n\nTokens it makes likelier: " + ", ".join(promoted)
    return text
