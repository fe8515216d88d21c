"""NLTK's own words, most of them found without NLTK: a document's sentences, then the words of each.

    finder = WordFinder(punkt)
    finder("Mr. Smith went home.")      # ["Mr.", "Smith", "went", "home", "."]

NLTK finds some 50,000 words a second. But whether a mark ends a sentence follows from the word before it and the one after it,
and the words in what stands between two blanks follow from that alone, but at the ends of a sentence. So NLTK is asked once for
each, the answer is kept, and what is as plain as most words are needs no asking. A sentence with something in it that NLTK's
rules look at across a blank goes to NLTK whole. tests/test_words.py compares all of it with NLTK, token for token.

This holds for the rules of NLTK 3.10; any other NLTK finds all words itself. Importing it takes 1.5 seconds, so that waits
until it is asked. This module does not know about settings, nor how Punkt learns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

RULES = ["3", "10"]

# How many answers of each kind are kept, 10 to 30 MB, and the longest text that one is kept for.
ANSWERS = 100_000
LONGEST = 100

# Blanks to Python, but not to the package `regex`, with which NLTK matches: such a document is left to NLTK.
SEPARATOR = re.compile("[\x1c-\x1f]")

# --- sentences -----------------------------------------------------------------------------------------------------

CLOSERS = "\"')\\]}\u2018\u2019\u201c\u201d\xab\xbb"
# A mark that may end a sentence, as PunktLanguageVars has it: another mark follows, or blanks and a word.
MARK = re.compile(rf"[.?!](?=[{CLOSERS};*:@({{\[?!]|\s+(\S+))")
# What stands after the mark and goes with the sentence before it.
CLOSING = re.compile(rf"[{CLOSERS}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
# The blanks that part words for Punkt; all but " " are unprintable.
BLANK = re.compile(r"[\t\n\r\x0b\x0c]")
# What always ends a sentence: a bracket or quote with a full stop, or a word with a mark. Such a word is neither an initial nor
# a number; that it is no abbreviation, and belongs to no words after it, must be seen to.
ORDINARY = re.compile(r"(?:\S*[)\]}\"]\.|([^\W\d_]{2,})[.?!])[\s\"'”’)]")

# --- words ---------------------------------------------------------------------------------------------------------

# A quote after " " opens and after a line break it closes; an apostrophe before " " is cut off first, before a line break last.
ACROSS = re.compile(r"""[^\S ]["']|'[^\S ]""")
# A full stop with nothing but these and blanks behind it is the last of a sentence, and cut off.
AFTER_FULL_STOP = "])}>\"'»”’"
FULL_STOP = re.compile(r"(.*[^.])\.([\])}>\"»”’]*)", re.DOTALL)

# What plain text consists of: characters that no rule touches, clitics, and marks that are always cut off. A quote opens where
# it is the first character and closes elsewhere, but not after a mark that opens: around some of these NLTK puts blanks first.
OPENERS = "(\\[{<«“‘„"
ALWAYS_CUT = rf"{OPENERS}\])}}>»”’;@#$%&*?!\u2012-\u2015"
LETTER = rf"(?:[^\s\"'`:,.{ALWAYS_CUT}-]|(?<!\.)\.(?!\.)|(?<!-)-(?!-)|[,:](?=[0-9]))"
CLITIC = rf"(?:n't|N'T|'(?:[sSmMdD]|ll|LL|re|RE|ve|VE))(?=[\"{ALWAYS_CUT}]|[,:](?!\d)|\.\.|--|\Z)"
CUT = rf"[{ALWAYS_CUT}]|[,:](?![\d,:])|\.{{2,}}|(?<!-)--(?!-)|\A\"(?!\")|(?<![{OPENERS}])(?<!\A)\""
PIECE = re.compile(rf"(?=.*'){LETTER}+?(?={CLITIC})|{CLITIC}|{LETTER}+|{CUT}")
# These are cut in two.
CONTRACTED = re.compile("cannot|gimme|gonna|gotta|lemme|wanna", re.IGNORECASE)

Answer = TypeVar("Answer")


class Answers(dict[str, Answer]):
    """Answers to questions; a new question is asked, and when there are too many answers all are forgotten."""

    def __init__(self, ask: Callable[[str], Answer]) -> None:
        self.ask = ask

    def __missing__(self, question: str) -> Answer:
        answer = self.ask(question)
        if len(self) >= ANSWERS:
            self.clear()
        if len(question) <= LONGEST:
            self[question] = answer
        return answer


class WordFinder:
    """Finds the words that NLTK's word_tokenize finds, with what Punkt has learnt."""

    def __init__(self, punkt: dict[str, Any] | None) -> None:
        """Without `punkt` a document is one sentence: its marks were taken away."""
        self.punkt = punkt
        self.unusual = {*punkt["abbreviations"], *(pair[0] for pair in punkt["collocations"] if pair)} if punkt else set[str]()
        """Words whose mark may not end a sentence."""
        self.has_rules = version("nltk").split(".")[:2] == RULES
        self.breaks = Answers(lambda context: self.nltk_punkt.text_contains_sentbreak(context))
        """Whether a mark ends a sentence, by the word that it follows, itself, and what follows it."""
        self.inner = Answers(lambda chunk: plain(chunk) or tuple(self.nltk_words(f"x {chunk} x")[1:-1]))
        """The words in what stands between two blanks."""
        self.first = Answers(lambda chunk: plain(chunk) or tuple(self.nltk_words(f"{chunk} x")[:-1]))
        """... and begins a sentence."""
        self.last = Answers(self._last)
        """... and ends a sentence."""
        self.whole = Answers(lambda sentence: tuple(self.nltk_words(sentence)))
        """The words of a sentence that cannot be cut at its blanks."""

    def __call__(self, document: str) -> list[str]:
        """The words of a document; raises TimeoutError where NLTK gives up."""
        if self.has_rules and not SEPARATOR.search(document):
            sentences = self.sentences(document) if self.punkt else [document.strip()]
            return list(chain.from_iterable(map(self.words, sentences)))
        sentences = self.nltk_punkt.tokenize(document) if self.punkt else [document]
        return list(chain.from_iterable(map(self.nltk_words, sentences)))

    def sentences(self, document: str) -> list[str]:
        """The sentences of a document without SEPARATOR, as PunktSentenceTokenizer.tokenize gives them."""
        blanks = document if document.isprintable() else BLANK.sub(" ", document)
        candidates: list[tuple[int, re.Match[str]]] = []
        word = mark = 0
        for match in MARK.finditer(document):
            blank = blanks.rfind(" ", mark, match.start())
            if blank > mark:
                word = blank + 1
            if word < mark:  # of several marks in a word the last counts
                candidates.pop()
            mark = match.start()
            candidates.append((word, match))

        starts, stops = [], []
        for word, match in candidates:
            blank_follows = match[1] is not None
            context = document[word : match.end(1) if blank_follows else match.end() + 1]
            ordinary = ORDINARY.match(context)
            if (ordinary and (ordinary[1] or ".").lower() not in self.unusual) or self.breaks[context]:
                stops.append(match.end())
                starts.append(match.start(1) if blank_follows else match.end())
        stops.append(len(document.rstrip()))

        sentences = []
        start = 0
        for stop, following, limit in zip(stops, starts, stops[1:], strict=False):
            closing = CLOSING.match(document, following, limit)
            sentences.append(document[start : following + len(closing[0].rstrip()) if closing else stop])
            start = closing.end() if closing else following
        sentences.append(document[start : stops[-1]])
        return [sentence for sentence in sentences if sentence]

    def words(self, sentence: str) -> list[str]:
        """The words of a sentence without SEPARATOR and with no blank at its end, as NLTKWordTokenizer.tokenize gives them."""
        *chunks, last = sentence.split() or [""]
        if not last.strip(AFTER_FULL_STOP) or (not sentence.isprintable() and ACROSS.search(sentence)):
            return [*self.whole[sentence]]
        words: list[str] = []
        if sentence[0] in "\"'.":  # on what else a sentence begins with, no rule does what it would not do after " "
            if not chunks:
                return [*self.whole[sentence]]
            words += self.first[chunks.pop(0)]
        words += chain.from_iterable(map(self.inner.__getitem__, chunks))
        words += self.last[last]
        return words

    def _last(self, chunk: str) -> tuple[str, ...]:
        full_stop = FULL_STOP.fullmatch(chunk)
        if full_stop:
            return (*self.inner[full_stop[1]], ".", *("''" if mark == '"' else mark for mark in full_stop[2]))
        return plain(chunk) or tuple(self.nltk_words(f"x {chunk}")[1:])

    @cached_property
    def nltk_punkt(self) -> PunktSentenceTokenizer:
        """NLTK's finder of sentences."""
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        assert self.punkt is not None
        return PunktSentenceTokenizer(punkt_parameters(self.punkt))

    @cached_property
    def nltk_words(self) -> Callable[[str], list[str]]:
        """NLTK's finder of a sentence's words."""
        from nltk.tokenize.destructive import NLTKWordTokenizer

        return NLTKWordTokenizer().tokenize


def plain(chunk: str) -> tuple[str, ...]:
    """The words in what stands between blanks, where it is not long and consists of PIECEs; else none."""
    words: list[str] = PIECE.findall(chunk[:LONGEST])
    if "".join(words) != chunk or CONTRACTED.search(chunk):
        return ()
    if words[0] == '"':
        words[0] = "``"
    return tuple("''" if word == '"' else word for word in words)


def punkt_parameters(punkt: dict[str, Any]) -> PunktParameters:
    """NLTK's PunktParameters from the JSON of `text.train_punkt`."""
    from nltk.tokenize.punkt import PunktParameters

    parameters = PunktParameters()
    parameters.abbrev_types = set(punkt["abbreviations"])
    parameters.collocations = set(map(tuple, punkt["collocations"]))
    parameters.sent_starters = set(punkt["sentence_starters"])
    # Not the defaultdict that NLTK has: that one grows by every word it is asked for and does not know.
    parameters.ortho_context = Counter(punkt["contexts"])  # pyright: ignore[reportAttributeAccessIssue]
    return parameters
