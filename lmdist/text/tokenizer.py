"""From a document to its words and back to text, the same in training and in sampling.

    tokenizer = WordTokenizer.train(TextSettings(), documents)      # once, by lmdist-prepare
    tokenizer.save(folder / "text.json")                            # copied to the checkpoint and the bundle
    words = WordTokenizer.load(folder / "text.json").tokenize("Mr. Smith went home.")

`word_tokenize` returns what NLTK returns, sentence splitting included. NLTK's sentence splitter, Punkt (Kiss and Strunk 2006),
is unsupervised: it learns from the corpus itself instead of a download, and its parameters are saved in text.json. This
module does not know about ids, files of documents or splits. words.py finds the same words as NLTK, only faster.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from lmdist.console import log
from lmdist.errors import DataError
from lmdist.settings import TextSettings
from lmdist.storage.reading import read_json, write_json
from lmdist.storage.schema import check_schema, check_version, dataclass_from_json
from lmdist.text.vocabulary import END

FORMAT = "lmdist text"
VERSION = 1


class Punkt(TypedDict):
    """The parameters of Punkt."""

    abbreviations: list[str]
    collocations: list[list[str]]
    sentence_starters: list[str]
    contexts: dict[str, int]


SAVED = {"settings": {}, "nltk": str, "punkt": Punkt | None}

# How much text Punkt learns from, and how much at a time: 5 seconds. Five times as much changes 2 words in 10,000.
PUNKT_CHARACTERS = 1_500_000
PUNKT_CHUNK = 500_000

# Punkt takes a word for an abbreviation where it hardly ever occurs without its full stop, so a few hundred articles
# with some "Mr" among the "Mr." are too few to learn from. These are abbreviations in any corpus.
ABBREVIATIONS = """
    mr mrs ms dr prof rev hon sen rep gov pres gen col maj capt lt sgt adm st jr sr
    jan feb aug sept oct nov dec inc corp ltd co vs etc e.g i.e u.s u.k u.n d.c a.m p.m
""".split()


class WordTokenizer:
    """Splits a document into words, by fixed settings and the parameters of Punkt."""

    def __init__(self, settings: TextSettings, punkt: dict[str, Any] | None = None, nltk_version: str | None = None) -> None:
        if settings.needs_sentences and punkt is None:
            raise DataError("word_tokenize needs the parameters of Punkt, and there are none")
        self.settings = settings
        self.punkt = punkt
        self.nltk_version = nltk_version or installed_nltk()

    @classmethod
    def train(cls, settings: TextSettings, documents: Iterable[str]) -> WordTokenizer:
        """Return a tokenizer for documents like these; it reads no more of them than Punkt needs."""
        return cls(settings, train_punkt(documents) if settings.needs_sentences else None)

    def tokenize(self, document: str) -> list[str]:
        """Return the words of a document; `whitespace` puts an <eos> between two lines.

        A `<eos>` or `<unk>` that stands in the text as a word of its own, which only `whitespace` can find, is that token:
        PTB and WikiText are written so. Raises DataError for the rare document that NLTK gives up.
        """
        if self.settings.clean == "tutorial":
            document = document.translate(TUTORIAL).lower()
        try:
            words = self._split(document)
        except TimeoutError:  # NLTK limits each regular expression to 5 seconds; 100,000 dots with spaces between take more
            raise DataError(f"NLTK gave up on a document of {len(document):,} characters: {document[:60]!r}") from None
        return [word.lower() for word in words] if self.settings.lowercase else words

    def detokenize(self, words: Iterable[str]) -> str:
        """Return readable text; that of `words[:n]` is always a prefix of that of `words`, so text can be streamed."""
        return detokenize(words, self.settings.tokenizer)

    def pieces(self, words: Iterable[str]) -> Iterator[str]:
        """Yield the readable text of each word, with the space before it, as soon as the word is known."""
        return pieces(words, self.settings.tokenizer)

    def save(self, path: Path) -> None:
        """Write text.json."""
        write_json(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "settings": dataclasses.asdict(self.settings),
                "nltk": self.nltk_version,
                "punkt": self.punkt,
            },
        )

    @classmethod
    def load(cls, path: Path) -> WordTokenizer:
        """Read text.json; raise MissingInputError or DataError, each naming the file."""
        value = read_json(path)
        check_version(value, (FORMAT, VERSION), path)
        check_schema(value, SAVED, path)
        settings = dataclass_from_json(TextSettings, value["settings"], path, "settings")
        try:
            return cls(settings, value["punkt"], value["nltk"])
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from None

    @cached_property
    def _split(self) -> Callable[[str], list[str]]:
        """Return the function that splits a document into words."""
        if self.settings.tokenizer == "whitespace":
            return split_lines
        if self.settings.tokenizer == "wordpunct":
            return WORDPUNCT.findall
        if self.nltk_version.split(".")[:2] != installed_nltk().split(".")[:2]:
            log(f"warning: the text was tokenized by NLTK {self.nltk_version}; this is {installed_nltk()}, which may differ")
        from lmdist.text.words import WordFinder  # its regular expressions take as long to compile as a small model to open

        return WordFinder(self.punkt)


def installed_nltk() -> str:
    """Return the version of NLTK on this machine."""
    from importlib.metadata import version  # as slow to import, and few tokenizers ask

    return version("nltk")


# nltk.tokenize.wordpunct_tokenize, without NLTK.
WORDPUNCT = re.compile(r"\w+|[^\w\s]+")

TUTORIAL = str.maketrans("-", " ", string.punctuation.replace("-", ""))


def split_lines(document: str) -> list[str]:
    """Return the words between whitespace, and an <eos> between two lines; a line break at the very end begins no line."""
    lines = document.removesuffix("\n").split("\n")
    words = lines[0].split()
    for line in lines[1:]:
        words.append(END)
        words.extend(line.split())
    return words


# --- Punkt: the ends of sentences -----------------------------------------------------------------------------------


def train_punkt(documents: Iterable[str]) -> dict[str, Any]:
    """Return the parameters that Punkt learns from the first PUNKT_CHARACTERS of the documents, in a fixed order."""
    from nltk.tokenize.punkt import PunktTrainer

    class Trainer(PunktTrainer):
        def _unique_types(self, tokens: Any) -> Any:
            # A set has a different order in every process, and an abbreviation may depend on those before it.
            return sorted(super()._unique_types(tokens))

    trainer = Trainer()
    chunk: list[str] = []
    read = characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document)
        if characters >= PUNKT_CHUNK:
            trainer.train("\n\n".join(chunk), finalize=False)
            read += characters
            chunk, characters = [], 0
            if read >= PUNKT_CHARACTERS:
                break
    if chunk:
        trainer.train("\n\n".join(chunk), finalize=False)
    # Only initials and numbers may form collocations, NLTK's default. INCLUDE_ABBREV_COLLOCS keeps 8 more full stops on
    # their abbreviations in 200,000 words of news; INCLUDE_ALL_COLLOCS leaves 150 on ordinary words: "topic.", "post.".
    parameters = trainer.get_params()
    return {
        "abbreviations": sorted({*parameters.abbrev_types, *ABBREVIATIONS}),
        "collocations": sorted(map(list, parameters.collocations)),
        "sentence_starters": sorted(parameters.sent_starters),
        "contexts": dict(sorted(parameters.ortho_context.items())),
    }


# --- back to text --------------------------------------------------------------------------------------------------

OPENING = frozenset("([{<«“‘„¿¡$£€#@")
CLOSING = frozenset(")]}>»”’.,:;?!%…")
CLITICS = frozenset({"'s", "'m", "'d", "'ll", "'re", "'ve", "n't"})
# NLTK splits these in two.
PAIRS = frozenset(
    {("can", "not"), ("d", "'ye"), ("gim", "me"), ("gon", "na"), ("got", "ta"), ("lem", "me"), ("more", "'n")}
    | {("wan", "na"), ("'t", "is"), ("'t", "was")}
)
# What follows the apostrophe of a word that was split at it: it's, don't, we'll.
AFTER_APOSTROPHE = frozenset({"s", "t", "m", "d", "ll", "re", "ve"})


def detokenize(words: Iterable[str], tokenizer: str) -> str:
    """Join words into text."""
    return "".join(pieces(words, tokenizer))


def pieces(words: Iterable[str], tokenizer: str) -> Iterator[str]:
    """Yield each word as it is written in text; the space before it depends on earlier words, never on later ones."""
    open_quotes: set[str] = set()
    before = ""  # the word before
    glue = True  # whether the next word follows without a space
    for word in words:
        if word == END:
            yield "\n" if tokenizer == "whitespace" else "\n\n"
            open_quotes.clear()
            before, glue = "", True
            continue
        text, left, right = word, False, False
        if word in ('"', "'"):
            # An apostrophe that belongs to the word before: the boys' books, or, in wordpunct, it ' s.
            plural = word == "'" and before[-1:].isalnum() and (tokenizer == "wordpunct" or before[-1] in "sS")
            if word in open_quotes or plural:
                left = True
                open_quotes.discard(word)
            else:
                right = True
                open_quotes.add(word)
        elif word == "``":
            text, right = '"', True
        elif word == "''":
            text, left = '"', True
        elif len(word) == 3 and word[0] == word[2] == "@":  # WikiText's notation for a - , or . inside a word or number
            text, left, right = word[1], True, True
        elif tokenizer == "wordpunct" and word in ("-", "/", "_"):
            left = right = before != ""
        elif not any(map(str.isalnum, word)):
            left = word[0] in CLOSING
            right = word[-1] in OPENING
            if '"' in word:  # wordpunct's runs: (" opens, ," closes, and so does ",
                right = '"' not in open_quotes and word[-1] == '"' and not left
                left = not right
                (open_quotes.add if right else open_quotes.discard)('"')
        else:
            lower = word.lower()
            left = (
                lower in CLITICS
                or (before.lower(), lower) in PAIRS
                or (lower == "'t" and before[-1:] in ("n", "N"))
                or (before in ("'", "’") and lower in AFTER_APOSTROPHE)
            )
        yield text if left or glue else f" {text}"
        before, glue = word, right
