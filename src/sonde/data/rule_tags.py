"""Labels that any text has: class of token, capitalisation, and a modest part of speech, by rules.

`tagged(texts, "pos")` marks words with the tags of Universal Dependencies: closed classes from lists, the rest by
suffix, capital and the word before (Brill 1992, "A simple rule-based part of speech tagger", is the idea; the rules are
our own and few). On the test part of UD English-EWT 85 % of words get the treebank's tag: enough to ask whether a model
knows about parts of speech, not enough to study one of them. English only; in other languages use a treebank.
"""

import re
from collections.abc import Callable, Iterable

from sonde.data.labels import LabelledText, Spans
from sonde.errors import SondeError

_PIECE = re.compile(r"(?P<word>[^\W\d_]+(?:[-'’][^\W\d_]+)*)|(?P<number>\d+(?:[.,:/]\d+)*)|(?P<other>\S)")
_CONTRACTED = re.compile(r"(?P<stem>[^\W\d_]+?)(?P<rest>n['’]t|['’](?:s|re|ve|ll|d|m))", re.IGNORECASE)
_SENTENCE_END = frozenset('.!?:;\n•*-–—"“(')
_SYMBOLS = frozenset("$%&+=<>^~|€£§°©®™#@/*\\_`")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLOSED = {
    "DET": "the a an this these those every each some any no another all both either neither such half",
    "PRON": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself "
    "yourself himself herself itself ourselves themselves who whom whose what something anything nothing everything "
    "someone anyone everyone nobody somebody anybody everybody none there one which",
    "ADP": "of in for on with at by from about into through during after before over under between against without "
    "within upon among across behind beyond near since until toward towards along off up out around above below "
    "beside besides despite except like via per than inside outside onto",
    "AUX": "is are was were be been being am have has had do does did will would can could should may might must shall "
    "ca wo ai",
    "CCONJ": "and or but nor plus &",
    "SCONJ": "that if because although though while whether unless whereas as",
    "PART": "to not n't 's",
    "ADV": "very so too also just now then here never always often again still already even only more most less least "
    "well soon later quite rather almost perhaps maybe however therefore when where why how ever once yet away back "
    "together instead otherwise else far long today yesterday tomorrow much",
    "NUM": "two three four five six seven eight nine ten eleven twelve twenty thirty fifty hundred thousand million "
    "billion zero",
    "INTJ": "yes oh hello hi please thanks wow hey ok okay ah yeah no",
    "VERB": "go went gone going get got take took taken make made see saw seen know knew known think thought come came "
    "give gave given say said tell told find found want use used try ask work call need feel felt become leave left "
    "put mean keep kept let begin began begun seem help show shown hear heard play run ran move live believe hold held "
    "bring brought write wrote written sit sat stand stood lose lost pay paid meet met include continue set learn lead "
    "led understand understood watch follow stop create speak spoke read spend spent grow grew open walk win won teach "
    "taught offer remember consider appear buy bought serve die send sent build built stay fall fell cut reach kill "
    "raise pass sell sold decide return explain hope develop carry break broke receive agree support hit produce eat "
    "ate cover catch caught draw drew choose chose recommend love provide allow contain define specify happen ran sent",
    "ADJ": "good new first last great little own other old right big high different small large next early young "
    "important few public bad same able best better sure free full nice easy hard special happy whole many several "
    "certain clear recent possible main low short single red white black available real true false open second third "
    "political military local national american current necessary major strong friendly wonderful worst clean fresh "
    "hot cold warm dark light deep wide long poor rich safe fast slow quick dead live final total federal human "
    "personal private professional medical central common similar simple "
    "single specific serious cheap expensive fine fun glad sorry "
    "sick tired busy ready wrong right entire due extra foreign general global heavy huge nuclear okay perfect pretty "
    "quiet rude sweet tiny top ugly unique usual various wild worth young legal financial social former original "
    "previous interested amazing excellent awesome great super late chinese iraqi russian british french english "
    "japanese indian german israeli iranian european african italian spanish average complete direct independent "
    "international modern native negative positive patient present recent sad secret senior sharp silly smart soft "
    "sure thin thick typical wet dry",
    "NOUN": "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "body information nothing parent face level office door health person art war history party result change morning "
    "reason research girl guy moment air teacher force education food",
}
_LEXICON = {word: tag for tag, words in reversed(list(_CLOSED.items())) for word in words.split()}
_BE_OR_HAVE = _words("is are was were be been being am have has had 's 're 've 'm ’s ’re ’ve ’m get got")
_HELPERS = _words("do does did will would can could should may might must shall ca wo to 'll 'd ’ll ’d n't n’t not")
_LIGHT = _words("have has had do does did")
_SUBJECTS = _words("i you he she we they it who")
_NOUN_ENDINGS = (
    *("tion", "tions", "sion", "sions", "ment", "ments", "ness", "ity", "ities", "ance", "ence", "ances", "ences"),
    *("ship", "ism", "ist", "ists", "er", "ers", "or", "ors", "age", "ages", "dom", "hood", "logy", "graphy", "ure"),
    *("ures", "cy"),
)
_ADJECTIVE_ENDINGS = (
    *("ous", "ful", "less", "able", "ible", "ive", "ic", "ical", "ish", "ary", "al", "ial", "ian", "ese", "like"),
)
_VERB_ENDINGS = ("ize", "izes", "ise", "ises", "ify", "ifies", "ate", "ates")


def tagged(texts: Iterable[str], concept: str) -> LabelledText:
    """Label texts by rule.

    Args:
        texts: the documents.
        concept: "pos" (tags of Universal Dependencies), "capitals" (of words: lower, Capitalised, UPPER, mixed) or
            "class" (of tokens: word start, word continuation, number, punctuation, symbol, line break).

    Raises:
        SondeError: for another concept, and for texts without a single word.

    """
    if concept not in _TAGGERS:
        raise SondeError(f"there is no rule for {concept!r}: choose {', '.join(_TAGGERS)}, or give labels of your own")
    tagger = _TAGGERS[concept]
    rule = "first" if concept == "class" else "agree"
    return LabelledText.of(((text, tagger(text)) for text in texts), concept=_CONCEPTS[concept], rule=rule)


def _classes(text: str) -> Spans:
    for found in re.finditer(_PIECE.pattern + r"|(?P<line>\n\s*)", text):
        start, end = found.span()
        if found["line"]:
            yield start, end, "line break"
        elif found["number"]:
            yield start, end, "number"
        elif found["other"]:
            yield start, end, "symbol" if found["other"] in _SYMBOLS else "punctuation"
        else:
            yield start, start + 1, "word start"
            if end > start + 1:
                yield start + 1, end, "word continuation"


def _capitals(text: str) -> Spans:
    for found in _PIECE.finditer(text):
        word = found["word"]
        if not word:
            continue
        if word.islower():
            kind = "lower"
        elif word.isupper() and len(word) > 1:
            kind = "UPPER"
        elif word[0].isupper() and (len(word) == 1 or word[1:].islower()):
            kind = "Capitalised"
        else:
            kind = "mixed"
        yield *found.span(), kind


def _parts_of_speech(text: str) -> Spans:
    before, tag_before, opens = "", "", True
    pieces = list(_pieces(text))
    for place, (start, end, kind) in enumerate(pieces):
        word = text[start:end]
        after = text[pieces[place + 1][0] : pieces[place + 1][1]] if place + 1 < len(pieces) else ""
        if kind == "other":
            tag = "SYM" if word in _SYMBOLS else "PUNCT"
        elif kind == "number":
            tag = "NUM"
        else:
            tag = _tag(word, before.lower(), tag_before, after, opens=opens)
        yield start, end, tag
        gap = text[end : end + 2]
        opens = (kind == "other" and word in _SENTENCE_END) or "\n" in gap
        before, tag_before = word, tag


def _pieces(text: str) -> Iterable[tuple[int, int, str]]:
    """Words, numbers and other characters; contractions are cut as treebanks cut them ("do" + "n't")."""
    for found in _PIECE.finditer(text):
        start, end = found.span()
        kind = found.lastgroup or "other"
        cut = _CONTRACTED.fullmatch(found["word"]) if found["word"] else None
        if cut:
            middle = start + len(cut["stem"])
            yield start, middle, kind
            yield middle, end, kind
        else:
            yield start, end, kind


def _tag(word: str, before: str, tag_before: str, after: str, *, opens: bool) -> str:
    low = word.lower()
    follows = _LEXICON.get(after.lower(), "PROPN" if after[:1].isupper() else "")
    if low[0] in "'’":
        return "PART" if low[1:] == "s" and tag_before in ("NOUN", "PROPN") else "AUX"
    known = _LEXICON.get(low)
    if known in ("DET", "PRON", "ADP", "AUX", "CCONJ", "SCONJ", "PART", "ADV", "NUM", "INTJ"):
        if low == "that" and (tag_before in ("ADP", "") or before in ("is", "was", "of", "do", "did")):
            return "PRON"
        if low == "no":
            return "INTJ" if opens else "DET"
        if low == "to" and (follows in ("DET", "PRON", "PROPN", "NUM", "NOUN", "ADJ") or after[:1].isdigit()):
            return "ADP"
        if low in _LIGHT and (follows in ("DET", "ADJ", "NUM", "NOUN", "PRON", "ADP") or not after[:1].isalpha()):
            question = low in ("do", "does", "did") and follows == "PRON"
            return "AUX" if question else "VERB"
        return known
    if word[0].isupper() and low != "i" and not (opens and (known or _by_ending(low) != "NOUN")):
        return "PROPN" if not opens or not known else known
    guess = known or _by_ending(low)
    if guess in ("VERB", "NOUN") and tag_before in ("DET", "ADJ", "NUM") and not low.endswith("ing"):
        return "NOUN" if known != "ADJ" else "ADJ"
    if before in _HELPERS and guess in ("NOUN", "VERB"):
        return "VERB"
    if before in _SUBJECTS and guess == "NOUN":
        return "VERB"
    if before in _BE_OR_HAVE and low.endswith(("ed", "ing", "en")):
        return "VERB"
    if before in ("my", "your", "his", "her", "its", "our", "their", "of") and guess == "VERB":
        return "NOUN"
    return guess


def _by_ending(low: str) -> str:
    if low.endswith("ly") and len(low) > 4:
        return "ADV"
    if low.endswith(("ing", "ed")) and len(low) > 4:
        return "VERB"
    if low.endswith(_NOUN_ENDINGS) and len(low) > 4:
        return "NOUN"
    if low.endswith(_ADJECTIVE_ENDINGS) and len(low) > 4:
        return "ADJ"
    if low.endswith(_VERB_ENDINGS) and len(low) > 4:
        return "VERB"
    stem = low[:-1] if low.endswith("s") and not low.endswith("ss") else low
    return _LEXICON.get(stem, "NOUN") if stem != low and _LEXICON.get(stem) == "VERB" else "NOUN"


_TAGGERS: dict[str, Callable[[str], Spans]] = {"class": _classes, "capitals": _capitals, "pos": _parts_of_speech}
_CONCEPTS = {"class": "class of token", "capitals": "capitals", "pos": "part of speech"}
RULES = tuple(_TAGGERS)
