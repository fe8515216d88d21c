"""Pieces of words: any text as tokens of a fixed vocabulary, and back, by a model of `tokenizers` or of SentencePiece.

    pieces = Pieces({"library": "tokenizers", "model": {...}})      # the content of a tokenizer.json
    pieces.encode("We said it.")                                    # ["We", "▁said", "▁it", "."]
    "".join(pieces.texts(["We", "▁said"]))                          # "We said"

A piece is a sequence of bytes, and a character may lie in several, so text is written as soon as its bytes are complete. The
model travels in text.json. Its ids are those of vocab.txt: 0 is `<unk>` and 1 `<eos>`, which it never finds in a text.

vocab.txt has one word a line and no control characters. So a space is written as ▁, SentencePiece's sign, and a control
character, whitespace or a byte that is no character by itself as <0x0A>. Where two pieces are spelled alike, the second has an
apostrophe more: only `Pieces` turns a word back into bytes. This module does not know how pieces are learned (learning.py), nor
how foreign files are read (piece_files.py).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import islice, takewhile
from typing import Any, Literal, NamedTuple, TypedDict

from lmdist.errors import DataError, one_line
from lmdist.text.detokenizer import Place
from lmdist.text.vocabulary import END, END_ID, UNKNOWN, UNKNOWN_ID, well_formed
from lmdist.text.words import Cache

SPACE = "\u2581"
"""How SentencePiece writes a space in a piece, and how vocab.txt does."""
UNPRINTABLE = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f\u2581]|[\udc80-\udcff]")
"""What has no spelling of its own in vocab.txt: control characters, whitespace, ▁ itself, and bytes that are no character."""
MAX_GAPS = 10_000
"""Ids without an entry; each takes a row of the model."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells the byte of a character that has no piece."""


class Saved(TypedDict):
    """What text.json has of a model of pieces."""

    library: Literal["tokenizers", "sentencepiece"]
    model: dict[str, Any] | str
    """The content of a tokenizer.json, or that of a SentencePiece model in base64."""


class Entries(NamedTuple):
    """A model of pieces as its library has it."""

    names: list[str]
    """Its entries, by the ids of lmdist; "" is no entry."""
    contents: list[bytes]
    """The text of each."""
    encode: Callable[[str], list[int]]
    """From a text to the ids of lmdist."""


class Pieces:
    """A model that turns text into pieces; raise DataError for one that its library cannot read."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        with errors_of_library(f"the model of {saved['library']}"):
            self.entries = (of_tokenizers if saved["library"] == "tokenizers" else of_sentencepiece)(saved["model"])
            self.found: dict[bytes, tuple[int, ...]] = {}
            """What `beginning_with` has found: after a space it is half of the vocabulary, and each prompt asks."""
            self.adds_space = b"".join(self.entries.contents[token] for token in self.entries.encode("a"))[:1] == b" "
        """Whether the model puts a space before a text, which is not part of it."""

    def __reduce__(self) -> tuple[type[Pieces], tuple[Saved]]:
        """Return what another process makes the model of."""
        return Pieces, (self.saved,)

    @cached_property
    def words(self) -> list[str]:
        """Return the words of vocab.txt: how each piece is spelled."""
        words = {UNKNOWN: None, END: None}
        for number, content in enumerate(self.entries.contents[END_ID + 1 :], END_ID + 1):
            word = spelled(content) or f"<unused-{number}>"
            while word in words:
                word += "'"
            words[word] = None
        return [*words]

    @cached_property
    def content_of(self) -> dict[str, bytes]:
        """Return the text of each word of vocab.txt."""
        return dict(zip(self.words, self.entries.contents, strict=True)) | {UNKNOWN: UNKNOWN.encode()}

    def encode(self, text: str) -> list[str]:
        """Return the pieces of a text, as vocab.txt spells them; `<unk>` only by a model without bytes."""
        with errors_of_library("a text"):
            return [self.words[token] for token in self.entries.encode(well_formed(text))]

    @cached_property
    def sorted_ids(self) -> list[int]:
        """Return the ids of the pieces, without the two marks, in the order of their bytes."""
        return sorted(range(END_ID + 1, len(self.entries.contents)), key=self.entries.contents.__getitem__)

    def beginning_with(self, content: bytes) -> tuple[int, ...]:
        """Return the ids of the pieces whose bytes begin with these, one at least; looked for once for each content."""
        if (found := self.found.get(content)) is None:
            ids, contents = self.sorted_ids, self.entries.contents
            first = bisect_left(ids, content, key=contents.__getitem__)
            found = tuple(sorted(takewhile(lambda token: contents[token].startswith(content), islice(ids, first, None))))
            self.found[content] = found
        return found

    def texts(self, words: Iterable[str | bytes], place: Place | None = None) -> Iterator[str]:
        """Yield what each piece adds to the text, "" while a character is incomplete; at the end what is left, if anything.

        A word that is bytes is a part of a piece. Bytes that are no UTF-8, which a model may generate, are U+FFFD. A text goes
        on from its `place`, which is kept up to date.
        """
        place = place or Place()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.setstate((place.incomplete, 0))
        for word in words:
            at_start, place.glue = place.glue, word == END
            if word == END:
                text = decoder.decode(b"", final=True) + "\n\n"
                decoder.reset()
            else:
                content = word if isinstance(word, bytes) else self.content_of.get(word, word.encode())
                text = decoder.decode(content.removeprefix(b" ") if at_start and self.adds_space else content)
            place.incomplete = decoder.getstate()[0]
            yield text
        if rest := decoder.decode(b"", final=True):
            yield rest


def spelled(content: bytes) -> str:
    """Return how vocab.txt spells a piece."""
    text = UNPRINTABLE.sub(byte_by_byte, content.decode("utf-8", "surrogateescape"))
    return text.replace(" ", SPACE)


def byte_by_byte(match: re.Match[str]) -> str:
    """Return the bytes of a match as SentencePiece spells them."""
    return "".join(f"<0x{byte:02X}>" for byte in match[0].encode("utf-8", "surrogateescape"))


@contextmanager
def errors_of_library(of: str) -> Iterator[None]:
    """Turn what a library says of a model or of a text into DataError; a panic of Rust is a BaseException."""
    try:
        yield
    except (ImportError, DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{of} cannot be read: {one_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{of} cannot be read: the library gave up") from None


# --- words, of which pieces are learned ------------------------------------------------------------------------------

WORD = (
    r"\r?\n|\r"  # each line break by itself: a prompt may end with one
    r"|['’](?:s|t|m|d|ll|re|ve)(?![\p{L}\p{M}])"
    "| ?\\p{L}[\\p{L}\\p{M}\u200c\u200d]*"
    r"| ?\p{N}+"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[^\S\r\n]+(?!\S)|[^\S\r\n]+"
)
"""The words: as GPT-2's, but what combines with a letter stays with it, and a line break is a word. It is read alike by the
package `regex`, which is fast, and by `tokenizers`, for others who read the file."""


def byte_level_tokenizer(model: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json: words in GPT-2's alphabet, in which `model` finds its pieces."""
    alphabet = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, alphabet]},
        "post_processor": None,
        "decoder": alphabet,
        "model": model,
    }


def word_splitter() -> Callable[[str], list[str]]:
    """Return the function that splits a text into words in GPT-2's alphabet."""
    find, spell = find_words(), Cache(to_byte_level)
    return lambda text: [spell[word] for word in find(well_formed(text))]


@cache
def find_words() -> Callable[[str], list[str]]:
    """Return the function that splits a text into words."""
    import regex  # which takes 20 milliseconds

    return regex.compile(WORD).findall


def to_byte_level(word: str) -> str:
    """Return a word in GPT-2's alphabet."""
    return word.encode().decode("latin-1").translate(SIGN_OF)


# --- the libraries -------------------------------------------------------------------------------------------------


def of_tokenizers(model: dict[str, Any] | str) -> Entries:
    """Return the entries of a tokenizer.json, whose ids are those of lmdist."""
    from tokenizers import Tokenizer

    assert isinstance(model, dict)
    tokenizer = Tokenizer.from_str(json.dumps(model))
    tokenizer.encode_special_tokens = True  # a "</s>" that stands in a text is text, as it is to SentencePiece
    ids = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(ids.values(), default=END_ID)
    if largest > len(ids) + MAX_GAPS:
        raise DataError(f"its largest id is {largest:,}, and it has {len(ids):,} entries")
    names = [""] * (largest + 1)
    for name, token in ids.items():
        names[token] = name
    # What a file adds stands for itself; Gemma's runs of ▁ are pieces of its model too, and spaces.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    added -= {name for name in tokenizer.get_vocab(with_added_tokens=False) if not name.strip(SPACE)}
    read = from_byte_level if is_byte_level(model) else from_byte_fallback
    contents = [name.encode() if name in added else read(name) for name in names]
    if model | {"model": {}} != byte_level_tokenizer({}):
        return Entries(names, contents, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    # Learned by lmdist: the words are found as they were counted, and each is split into pieces once.
    of_word = Cache(lambda word: [token.id for token in tokenizer.model.tokenize(to_byte_level(word))])
    find = find_words()
    return Entries(names, contents, lambda text: [token for word in find(text) for token in of_word[word]])


def is_byte_level(model: Any) -> bool:
    """Return whether a tokenizer.json writes each byte as a character, as GPT-2's does."""
    steps = model["pre_tokenizer"] or {}
    return any(step["type"] == "ByteLevel" for step in steps.get("pretokenizers", [steps]) if step)


def byte_level() -> dict[str, int]:
    """Return the byte that each character of GPT-2's alphabet stands for (encoder.py of its repository)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = byte_level()
SIGN_OF = {byte: sign for sign, byte in BYTE_OF.items()}


def from_byte_level(name: str) -> bytes:
    """Return the bytes of a piece in GPT-2's alphabet; a character that is none of it is itself."""
    return b"".join(bytes([BYTE_OF[sign]]) if sign in BYTE_OF else sign.encode() for sign in name)


def from_byte_fallback(name: str) -> bytes:
    """Return the bytes of a piece of SentencePiece's kind: a byte by its number, or text with ▁ for a space."""
    byte = BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, " ").encode()


def of_sentencepiece(model: dict[str, Any] | str) -> Entries:
    """Return the entries of a SentencePiece model in base64.

    Its ids are those of lmdist where its first two are marks, as `<blk>` and `<sos/eos>` of a speech recognizer or `<unk>` and
    `<s>`; else they come behind the two of lmdist.
    """
    from sentencepiece import SentencePieceProcessor  # pyright: ignore[reportMissingImports]

    assert isinstance(model, str)
    try:
        content = base64.b64decode(model, validate=True)
    except binascii.Error as error:
        raise DataError(f"the model of sentencepiece is not in base64: {error}") from None
    processor: Any = SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    numbers = range(processor.get_piece_size())
    names = [processor.id_to_piece(number) for number in numbers]
    marks = [processor.is_control(number) or processor.is_unknown(number) for number in numbers]
    is_mark = [mark or (name[:1] == "<" and not BYTE.match(name)) for mark, name in zip(marks, names, strict=True)]
    shift = 0 if all(is_mark[: END_ID + 1]) else END_ID + 1
    contents = [b"" if mark else from_byte_fallback(name) for mark, name in zip(marks, names, strict=True)]
    of_id = [UNKNOWN_ID if processor.is_unknown(number) else number + shift for number in numbers]

    def encode(text: str) -> list[int]:
        return [of_id[number] for number in processor.encode(text)]

    return Entries([*[""] * shift, *names], [*[b""] * shift, *contents], encode)
