"""From a document to its words and back to text, the same in training and in sampling.

    tokenizer = WordTokenizer.train(TextSettings(), documents)      # once, by lmdist-prepare
    tokenizer.save(folder / "text.json")                            # copied to the checkpoint and the bundle
    words = WordTokenizer.load(folder / "text.json").tokenize("Mr. Smith went home.")

`word_tokenize` returns what NLTK returns, sentence splitting included. NLTK's sentence splitter, Punkt (Kiss and Strunk 2006),
is unsupervised: it learns from the corpus itself instead of a download, and its parameters are saved in text.json. This
module does not know about ids, files of documents or splits. words.py finds the same words as NLTK, only faster;
detokenizer.py turns words back into text. pieces.py does both for pieces of words, which leave a text as it is.

Text is put into Unicode's normal form C first, and characters that nobody sees are left out, so that two spellings of a word
that look alike are one word. `rules` in the settings says by which rules a text was split: those of a folder never change.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypedDict, cast

from lmdist.console import log
from lmdist.errors import DataError
from lmdist.settings import TextSettings
from lmdist.storage.reading import MAX_JSON_BYTES, as_json, parse_json, read_bytes
from lmdist.storage.schema import check_schema, check_version, dataclass_from_json
from lmdist.text import detokenizer
from lmdist.text.detokenizer import LINE_BREAK
from lmdist.text.markup import lines_of_html, text_of_html
from lmdist.text.pieces import Pieces, Saved, word_splitter
from lmdist.text.vocabulary import END, check_words

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
    """Splits a document into words or pieces of words, by fixed settings and the parameters of Punkt or a model of pieces."""

    def __init__(
        self,
        settings: TextSettings,
        punkt: dict[str, Any] | None = None,
        nltk_version: str | None = None,
        model: Pieces | None = None,
    ) -> None:
        if settings.needs_sentences and punkt is None:
            raise DataError("word_tokenize needs the parameters of Punkt, and there are none")
        self.settings = settings
        self.punkt = punkt
        self.nltk_version = nltk_version or installed_nltk()
        self.model = model
        """The model of pieces. None of words, and of pieces that are still to be learned: a text is split into their words."""

    @classmethod
    def train(cls, settings: TextSettings, documents: Iterable[str]) -> WordTokenizer:
        """Return a tokenizer for documents like these; it reads no more of them than Punkt needs."""
        return cls(settings, train_punkt(cleaned(text, settings) for text in documents) if settings.needs_sentences else None)

    def tokenize(self, document: str, *, continues: bool = False) -> list[str]:
        """Return the words of a document; `whitespace` puts an <eos> between two lines.

        A prompt is the beginning of a document that `continues`: an abbreviation at its end keeps its full stop, as it does
        in the middle of a document, where at the end of one NLTK splits "Mr." in two.

        A space at its end is left out where there are pieces: the next word brings it along.

        A `<eos>` or `<unk>` that stands in the text as a word of its own, which only `whitespace` can find, is that token:
        PTB and WikiText are written so. Raises DataError for the rare document that NLTK gives up.
        """
        text = cleaned(document, self.settings)
        if self.settings.has_pieces:
            return self._split(text.removesuffix(" ") if continues else text)
        if self.settings.line_breaks:
            return self._words_of_lines(text, continues=continues)
        return self._words(text, continues=continues)

    def spellings(self, text: str) -> list[list[str]]:
        """Return how a text may stand in another one: as words, or as pieces with and without a space before it."""
        if not self.settings.has_pieces:
            return [self.tokenize(text, continues=True)]
        found = [self.tokenize(text), self.tokenize(f" {text}")]
        return found[:1] if found[0] == found[1] else found

    def _words_of_lines(self, text: str, *, continues: bool) -> list[str]:
        """Return the words of each line, and a LINE_BREAK between two; a document has none at its ends, a prompt may."""
        words: list[str] = []
        lines = LINE_END.split(text if continues else text.strip())
        for number, line in enumerate(lines, 1):
            words += self._words(line, continues=continues or number < len(lines)) if line.strip() else []
            words += [LINE_BREAK] if number < len(lines) else []
        return words

    def _words(self, text: str, *, continues: bool) -> list[str]:
        """Return the words of a text that is cleaned."""
        continues = continues and self.settings.needs_sentences
        try:
            words = self._split(f"{text} {NEXT_WORD}")[:-1] if continues else self._split(text)
        except TimeoutError:  # NLTK limits each regular expression to 5 seconds; 100,000 dots with spaces between take more
            raise DataError(f"NLTK gave up on a document of {len(text):,} characters: {text[:60]!r}") from None
        return [word.lower() for word in words] if self.settings.lowercase else words

    def detokenize(self, words: Iterable[str]) -> str:
        """Return readable text; that of `words[:n]` is always a prefix of that of `words`, so text can be streamed."""
        return "".join(self.pieces(words))

    def pieces(self, words: Iterable[str | bytes], place: detokenizer.Place | None = None) -> Iterator[str]:
        """Yield the readable text of each word, with the space before it, as soon as the word is known.

        A piece of a word may be a part of a character: then "" is yielded, and the text when it is complete, or at the end. A
        word that is bytes is a part of a piece. A text goes on from its `place`, which is kept up to date.
        """
        check_words(words)
        if self.model:
            return self.model.texts(words, place)
        return detokenizer.pieces(cast("Iterable[str]", words), self.settings.tokenizer, place)

    def as_json(self) -> str:
        """Return the content of text.json."""
        return as_json(
            {
                "format": FORMAT,
                "version": VERSION,
                "settings": self.settings.stored(),
                "nltk": self.nltk_version,
                "punkt": self.punkt,
                **({"pieces": self.model and self.model.saved} if self.settings.has_pieces else {}),
            }
        )

    def save(self, path: Path) -> None:
        """Write text.json."""
        path.write_text(self.as_json(), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: Path) -> WordTokenizer:
        """Read text.json; raise MissingInputError or DataError, each naming the file."""
        return cls.parse(read_bytes(path, MAX_JSON_BYTES), path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> WordTokenizer:
        """Return the tokenizer that was read from `path`, as `load` does."""
        value = parse_json(content, path)
        check_version(value, (FORMAT, VERSION), path)
        check_schema(value, SAVED, path)
        settings = dataclass_from_json(TextSettings, {"rules": FIRST_RULES, **value["settings"]}, path, "settings")
        saved = saved_pieces(value, path) if settings.has_pieces else None
        try:
            model = Pieces(saved) if saved else None
            return cls(settings, value["punkt"], value["nltk"], model)
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from None

    @cached_property
    def _split(self) -> Callable[[str], list[str]]:
        """Return the function that splits a document into words."""
        if self.settings.has_pieces:
            return self.model.encode if self.model else word_splitter()
        if self.settings.tokenizer == "whitespace":
            return split_lines
        if self.settings.tokenizer == "wordpunct":
            return WORDPUNCT.findall if self.settings.rules == FIRST_RULES else split_wordpunct
        if self.settings.tokenizer == "characters":
            return split_characters
        if self.nltk_version.split(".")[:2] != installed_nltk().split(".")[:2]:
            log(f"warning: the text was tokenized by NLTK {self.nltk_version}; this is {installed_nltk()}, which may differ")
        from lmdist.text.words import WordFinder  # its regular expressions take as long to compile as a small model to open

        return WordFinder(self.punkt)


def saved_pieces(value: dict[str, Any], path: Path) -> Saved | None:
    """Return the model of pieces that text.json has, None where it is still to be learned, as in a shard; raise DataError."""
    check_schema(value, {"pieces": {} if value.get("pieces") else NoneType}, path)
    saved = value["pieces"]
    if saved is not None:
        check_schema(saved, {"library": Literal["tokenizers", "sentencepiece"]}, path, "pieces")
        check_schema(saved, {"model": {} if saved["library"] == "tokenizers" else str}, path, "pieces")
    return saved


def installed_nltk() -> str:
    """Return the version of NLTK on this machine."""
    from importlib.metadata import version  # as slow to import, and few tokenizers ask

    return version("nltk")


def imported_late(settings: TextSettings) -> list[str]:
    """Return the modules that are imported when words need them, for processes of lmdist's own."""
    return ["lmdist.text.light_nltk", "lmdist.text.words"] if settings.tokenizer == "word_tokenize" else []


def cleaned(document: str, settings: TextSettings) -> str:
    """Return a document as it is split: without what the settings leave out, and in one spelling."""
    if settings.clean == "html":
        document = (lines_of_html if settings.line_breaks or settings.has_pieces else text_of_html)(document)
    if settings.has_pieces:  # which write a text as it is
        document = document.lower() if settings.lowercase else document
    elif settings.rules > FIRST_RULES and not is_plain(document):
        if settings.tokenizer != "whitespace":  # text that is tokenized already: a sign that stands alone is a word
            document = INVISIBLE.sub("", document.replace("\u200b", " "))
        document = unicodedata.normalize("NFC", document)
    if settings.clean == "tutorial":
        document = document.translate(TUTORIAL).lower()
    return document


# --- characters and words -------------------------------------------------------------------------------------------

FIRST_RULES = 1
"""The rules of a text.json that names none: no normal form, and wordpunct splits before each combining mark."""

LINE_END = re.compile(r"\r\n?|\n")
NEXT_WORD = "Qxzq"
"""What follows a prompt: a name that no text has, so that Punkt decides by the word before it."""

# Soft hyphen, marks of direction, word joiner, byte order mark; the zero width space, which separates words, is a space.
INVISIBLE = re.compile("[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")

# nltk.tokenize.wordpunct_tokenize, without NLTK.
WORDPUNCT = re.compile(r"\w+|[^\w\s]+")
# The same, but what combines with a letter stays with it: accents, vowel signs, joiners. `re` has no class for these.
LETTER, MARK, WHITESPACE = r"\p{L}\p{N}_", r"\p{M}\u200c\u200d", r"\s\x1c-\x1f"
WORDPUNCT_MARKS = rf"[{LETTER}][{LETTER}{MARK}]*|[^{LETTER}{WHITESPACE}]+"
CHARACTER_MARKS = rf"[^{WHITESPACE}][{MARK}]*"
# Latin letters and typographic signs: in normal form C, visible, without marks, and the same to Python and to `regex`.
PLAIN = re.compile("[\x00-\xac\xae-\u02ff\u2002-\u200a\u2010-\u2029\u202f-\u205f\u20a0-\u20c0]*+")

TUTORIAL = str.maketrans("-", " ", string.punctuation.replace("-", ""))


def is_plain(document: str) -> bool:
    """Return whether a document has PLAIN characters only, as most English ones do: the quick way is enough then."""
    return document.isascii() or PLAIN.fullmatch(document) is not None


def split_wordpunct(document: str) -> list[str]:
    """Return runs of letters and digits with the marks on them, and runs of other characters."""
    return WORDPUNCT.findall(document) if is_plain(document) else pattern(WORDPUNCT_MARKS).findall(document)


def split_characters(document: str) -> list[str]:
    """Return each character with the marks on it, and a SPACE for whitespace between two."""
    text = detokenizer.SPACE.join(document.split())
    return list(text) if text.isascii() else pattern(CHARACTER_MARKS).findall(text)


# Long runs of scripts that write no space between words.
SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{M}]{8,}"


def lacks_spaces(words: Iterable[str]) -> bool:
    """Return whether many of the first 10,000 distinct words of a text are clauses of Chinese, Japanese, Thai or the like."""
    sample = list(islice(words, 10_000))
    return sum(not word.isascii() and pattern(SPACELESS).search(word) is not None for word in sample) > len(sample) / 5


@cache
def pattern(expression: str) -> Any:
    """Return a compiled pattern of the package `regex`, which NLTK matches with too; importing it takes 20 milliseconds."""
    import regex

    return regex.compile(expression)


def split_lines(document: str) -> list[str]:
    """Return the words between whitespace, and an <eos> between two lines; a line break at the very end begins no line."""
    lines = document.removesuffix("\n").split("\n")
    words = lines[0].split()
    for line in lines[1:]:
        words.append(END)
        words.extend(line.split())
    return words


# --- Punkt: the ends of sentences -----------------------------------------------------------------------------------

FLAGS = re.VERBOSE | re.MULTILINE | re.DOTALL | re.IGNORECASE
"""Of a regular expression, with the same meaning and number in the package `regex`."""


def train_punkt(documents: Iterable[str]) -> dict[str, Any]:
    """Return the parameters that Punkt learns from the first PUNKT_CHARACTERS of the documents, in a fixed order."""
    from lmdist.text.light_nltk import punkt

    PunktLanguageVars, PunktToken, PunktTrainer = punkt.PunktLanguageVars, punkt.PunktToken, punkt.PunktTrainer
    find_words = ascii_first(PunktLanguageVars()._word_tokenizer_re(), "findall")
    matches_ellipsis = cache(ascii_first(PunktToken._RE_ELLIPSIS, "match"))
    matches_initial = cache(ascii_first(PunktToken._RE_INITIAL, "match"))
    matches_letters = cache(ascii_first(PunktToken._RE_ALPHA, "match"))
    is_number = ascii_first(PunktToken._RE_NUMERIC, "match")  # the whole word, or nothing of it
    type_of = cache(lambda word: "##number##" if is_number(word.lower()) else word.lower())
    case_of = cache(lambda letter: "lower" if letter.islower() else "upper" if letter.isupper() else "none")

    class Token(PunktToken):
        """A token for which NLTK's properties are found once for each spelling; they would take most of the time."""

        __slots__ = ()
        is_ellipsis = property(lambda self: matches_ellipsis(self.tok))  # pyright: ignore[reportIncompatibleMethodOverride]
        is_initial = property(lambda self: matches_initial(self.tok))  # pyright: ignore[reportIncompatibleMethodOverride]
        is_alpha = property(lambda self: matches_letters(self.tok))  # pyright: ignore[reportIncompatibleMethodOverride]
        first_case = property(lambda self: case_of(self.tok[0]))  # pyright: ignore[reportIncompatibleMethodOverride]

        def __init__(self, tok: str, parastart: Any = None, linestart: Any = None) -> None:
            self.tok, self.type, self.period_final = tok, type_of(tok), tok.endswith(".")
            self.parastart, self.linestart = parastart, linestart
            self.sentbreak = self.abbr = self.ellipsis = None

    class LanguageVars(PunktLanguageVars):
        def word_tokenize(self, s: str) -> list[str]:
            return find_words(s)

    class Trainer(PunktTrainer):
        def _unique_types(self, tokens: Any) -> Any:
            # A set has a different order in every process, and an abbreviation may depend on those before it.
            return sorted(super()._unique_types(tokens))

    trainer = Trainer(lang_vars=LanguageVars(), token_cls=Token)
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


def ascii_first(pattern: Any, method: str) -> Callable[[str], Any]:
    """Return a method of a pattern of NLTK's, which for ASCII is that of Python's `re`.

    NLTK's package `regex` takes three times as long. Both find the same in ASCII, but for some SEPARATORs.
    """
    from lmdist.text.words import SEPARATOR

    own, other = getattr(re.compile(pattern.pattern, pattern.flags & FLAGS), method), getattr(pattern, method)
    return lambda text: own(text) if text.isascii() and not SEPARATOR.search(text) else other(text)
