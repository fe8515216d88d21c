"""The words that NLTK finds, most of them found without NLTK: a document's sentences, then the words of each.

    finder = WordFinder(punkt)
    finder("Mr. Smith went home.")      # ["Mr.", "Smith", "went", "home", "."]

NLTK finds some 50,000 words/s. Yet whether punctuation ends a sentence depends only on the word before it and the word after
it, and the words in a chunk (what stands between two spaces) depend on the chunk alone, except at the ends of a sentence. So
NLTK is called once for each context and each chunk, and its result is cached; a chunk as plain as most words needs no call. A
sentence that NLTK's rules do not treat chunk by chunk goes to NLTK as it is. tests/text/test_words.py compares all of it with
NLTK, word for word.

This holds for the rules of NLTK 3.10; with any other NLTK all words come from NLTK. It is imported when it is first called.
This module does not know about settings, nor how Punkt learns.
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

# How many results of each kind are cached, 10 to 30 MB, and the longest text that is cached.
MAX_CACHED = 100_000
MAX_CHARACTERS = 100

# Whitespace to Python, but not to the package `regex`, with which NLTK matches: such a document is left to NLTK.
SEPARATOR = re.compile("[\x1c-\x1f]")

# --- sentences -----------------------------------------------------------------------------------------------------

CLOSERS = "\"')\\]}\u2018\u2019\u201c\u201d\xab\xbb"
# Punctuation that may end a sentence, as PunktLanguageVars has it: more punctuation follows, or whitespace and a word.
MARK = re.compile(rf"[.?!](?=[{CLOSERS};*:@({{\[?!]|\s+(\S+))")
# What follows the punctuation and belongs to the sentence before it.
CLOSING = re.compile(rf"[{CLOSERS}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
# The whitespace that separates words for Punkt, beside " "; all of it is unprintable.
WHITESPACE = re.compile(r"[\t\n\r\x0b\x0c]")
# What always ends a sentence: a bracket or quote with a full stop, or a word with punctuation. Such a word is no initial and
# no number; that it is no abbreviation and starts no collocation must be checked.
ORDINARY = re.compile(r"(?:\S*[)\]}\"]\.|([^\W\d_]{2,})[.?!])[\s\"'”’)]")

# --- words ---------------------------------------------------------------------------------------------------------

# A quote opens after " " and closes after a line break; an apostrophe is split off first before " ", last before a line break.
ACROSS = re.compile(r"""[^\S ]["']|'[^\S ]""")
# A full stop followed by nothing but these and whitespace is the last of a sentence, and is split off.
AFTER_FULL_STOP = "])}>\"'»”’"
FULL_STOP = re.compile(r"(.*[^.])\.([\])}>\"»”’]*)", re.DOTALL)

# What plain text consists of: characters that no rule touches, clitics, and punctuation that is always split off. A quote opens
# as the first character and closes elsewhere, but not after an opening bracket: NLTK puts spaces around some of these first.
OPENERS = "(\\[{<«“‘„"
ALWAYS_SPLIT = rf"{OPENERS}\])}}>»”’;@#$%&*?!\u2012-\u2015"
LETTER = rf"(?:[^\s\"'`:,.{ALWAYS_SPLIT}-]|(?<!\.)\.(?!\.)|(?<!-)-(?!-)|[,:](?=[0-9]))"
CLITIC = rf"(?:n't|N'T|'(?:[sSmMdD]|ll|LL|re|RE|ve|VE))(?=[\"{ALWAYS_SPLIT}]|[,:](?!\d)|\.\.|--|\Z)"
CUT = rf"[{ALWAYS_SPLIT}]|[,:](?![\d,:])|\.{{2,}}|(?<!-)--(?!-)|\A\"(?!\")|(?<![{OPENERS}])(?<!\A)\""
PIECE = re.compile(rf"(?=.*'){LETTER}+?(?={CLITIC})|{CLITIC}|{LETTER}+|{CUT}")
# These are split in two.
CONTRACTED = re.compile("cannot|gimme|gonna|gotta|lemme|wanna", re.IGNORECASE)

Result = TypeVar("Result")


class Cache(dict[str, Result]):
    """The results of a function by its argument; cleared when there are too many. A dict's lookup costs no Python call."""

    def __init__(self, function: Callable[[str], Result]) -> None:
        self.function = function

    def __missing__(self, argument: str) -> Result:
        result = self.function(argument)
        if len(self) >= MAX_CACHED:
            self.clear()
        if len(argument) <= MAX_CHARACTERS:
            self[argument] = result
        return result


class WordFinder:
    """Finds the words that NLTK's word_tokenize finds, with the parameters of Punkt."""

    def __init__(self, punkt: dict[str, Any] | None) -> None:
        """Without `punkt` a document is one sentence: its punctuation was removed."""
        self.punkt = punkt
        self.unusual = {*punkt["abbreviations"], *(pair[0] for pair in punkt["collocations"] if pair)} if punkt else set[str]()
        """Words whose punctuation may not end a sentence."""
        self.has_rules = version("nltk").split(".")[:2] == RULES
        self.breaks = Cache(lambda context: self.nltk_punkt.text_contains_sentbreak(context))
        """Whether punctuation ends a sentence, by the word before it, itself, and what follows it."""
        self.inner = Cache(lambda chunk: plain(chunk) or tuple(self.nltk_words(f"x {chunk} x")[1:-1]))
        """The words of a chunk inside a sentence."""
        self.first = Cache(lambda chunk: plain(chunk) or tuple(self.nltk_words(f"{chunk} x")[:-1]))
        """The words of a chunk that begins a sentence."""
        self.last = Cache(self._last)
        """The words of a chunk that ends a sentence."""
        self.uncut = Cache(lambda sentence: tuple(self.nltk_words(sentence)))
        """The words of a sentence that cannot be treated chunk by chunk."""

    def __call__(self, document: str) -> list[str]:
        """Return the words of a document; raise TimeoutError where NLTK gives up."""
        if self.has_rules and not SEPARATOR.search(document):
            sentences = self.sentences(document) if self.punkt else [document.strip()]
            return list(chain.from_iterable(map(self.words, sentences)))
        sentences = self.nltk_punkt.tokenize(document) if self.punkt else [document]
        return list(chain.from_iterable(map(self.nltk_words, sentences)))

    def sentences(self, document: str) -> list[str]:
        """Return the sentences of a document without SEPARATOR, as PunktSentenceTokenizer.tokenize does."""
        spaced = document if document.isprintable() else WHITESPACE.sub(" ", document)
        candidates: list[tuple[int, re.Match[str]]] = []
        word = mark = 0
        for match in MARK.finditer(document):
            space = spaced.rfind(" ", mark, match.start())
            if space > mark:
                word = space + 1
            if word < mark:  # of several in a word the last counts
                candidates.pop()
            mark = match.start()
            candidates.append((word, match))

        starts, stops = [], []
        for word, match in candidates:
            space_follows = match[1] is not None
            context = document[word : match.end(1) if space_follows else match.end() + 1]
            ordinary = ORDINARY.match(context)
            if (ordinary and (ordinary[1] or ".").lower() not in self.unusual) or self.breaks[context]:
                stops.append(match.end())
                starts.append(match.start(1) if space_follows else match.end())
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
        """Return the words of a sentence without SEPARATOR and trailing whitespace, as NLTKWordTokenizer.tokenize does."""
        *chunks, last = sentence.split() or [""]
        if not last.strip(AFTER_FULL_STOP) or (not sentence.isprintable() and ACROSS.search(sentence)):
            return [*self.uncut[sentence]]
        words: list[str] = []
        if sentence[0] in "\"'.":  # any other beginning is treated as it is after " "
            if not chunks:
                return [*self.uncut[sentence]]
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
        """Return NLTK's sentence splitter."""
        from lmdist.text import light_nltk

        assert self.punkt is not None
        return light_nltk.punkt.PunktSentenceTokenizer(punkt_parameters(self.punkt))

    @cached_property
    def nltk_words(self) -> Callable[[str], list[str]]:
        """Return NLTK's function that splits a sentence into words."""
        from lmdist.text import light_nltk

        return light_nltk.destructive.NLTKWordTokenizer().tokenize


def plain(chunk: str) -> tuple[str, ...]:
    """Return the words of a chunk that is not long and consists of PIECEs, else none."""
    words: list[str] = PIECE.findall(chunk[:MAX_CHARACTERS])
    if "".join(words) != chunk or CONTRACTED.search(chunk):
        return ()
    if words[0] == '"':
        words[0] = "``"
    return tuple("''" if word == '"' else word for word in words)


def punkt_parameters(punkt: dict[str, Any]) -> PunktParameters:
    """Return NLTK's PunktParameters from the JSON of `tokenizer.train_punkt`."""
    from lmdist.text import light_nltk

    parameters = light_nltk.punkt.PunktParameters()
    parameters.abbrev_types = set(punkt["abbreviations"])
    parameters.collocations = set(map(tuple, punkt["collocations"]))
    parameters.sent_starters = set(punkt["sentence_starters"])
    # Not a defaultdict as in NLTK, which grows by every unknown word that is looked up.
    parameters.ortho_context = Counter(punkt["contexts"])  # pyright: ignore[reportAttributeAccessIssue]
    return parameters
