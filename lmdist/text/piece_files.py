"""Read a model of pieces from a file: a tokenizer.json of Hugging Face's `tokenizers`, or a SentencePiece .model.

    pieces = read_pieces(Path("tokenizer.json"))

What is read is checked as a file of a stranger. Its ids become those of lmdist: `<unk>` is 0 and `<eos>` is 1. They are the
file's own where its first two are marks too, as the blank and the end of a speech recognizer's; else they come behind the two.
This module does not know how pieces are found in a text.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from lmdist.console import log
from lmdist.errors import DataError
from lmdist.storage.reading import MAX_JSON_BYTES, parse_json, read_bytes
from lmdist.text.pieces import Pieces, Saved
from lmdist.text.vocabulary import END, UNKNOWN

MAX_MODEL_BYTES = MAX_JSON_BYTES * 3 // 4
"""Of a SentencePiece model, which text.json has in base64."""
MARKS = (f"{UNKNOWN}\uffff", f"{END}\uffff")
"""The names of lmdist's two marks in a file that has none; U+FFFF is no character, so no text has them."""
PROBE = "It is 5 o'clock; naïve café, 日本語 🙂\nA  new line."
"""What a model should give back as it was."""


def read_pieces(path: Path) -> Pieces:
    """Return the model of a file; raise MissingInputError, or DataError for a damaged one and for one without bytes."""
    pieces = read_sentencepiece(path) if path.suffix == ".model" else read_tokenizer_json(path)
    found = "".join(pieces.texts(pieces.encode(PROBE)))
    if found != PROBE:
        log(f"note: {path} changes texts: {PROBE!r} comes back as {found!r}")
    return pieces


# --- tokenizer.json ------------------------------------------------------------------------------------------------


def read_tokenizer_json(path: Path) -> Pieces:
    """Return the model of a tokenizer.json."""
    value = parse_json(read_bytes(path, MAX_JSON_BYTES), path)
    try:
        saved: Saved = {"library": "tokenizers", "model": with_marks(value)}
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path} is no tokenizer.json of Hugging Face's tokenizers, with a model of BPE or Unigram") from None
    pieces = named(path, saved)
    if len({content for content in pieces.entries.contents if len(content) == 1}) < 256:
        raise DataError(
            f"{path} has no pieces for all bytes (byte fallback, or ByteLevel), so texts would become <unk>: take another one, "
            "or have pieces learned from your text by --tokenizer bpe"
        )
    return pieces


def with_marks(value: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json whose first two entries are marks; it adds no marks to a text, and neither cuts nor pads it."""
    model, added = value["model"], value.get("added_tokens") or []
    for name in ("end_of_word_suffix", "continuing_subword_prefix"):
        if model.get(name):
            raise DataError(f"{name} {model[name]!r} is written into its pieces, and so into every text: take another file")
    value = value | {"added_tokens": added, "truncation": None, "padding": None, "post_processor": None}
    special = {token["id"] for token in added if token["special"]}
    own = dict(model["vocab"]) if model["type"] == "BPE" else {name: number for number, (name, _) in enumerate(model["vocab"])}
    if {0, 1} <= special or any((own.get(unknown), own.get(end)) == (0, 1) for unknown, end in ((UNKNOWN, END), MARKS)):
        return value
    shift = len(MARKS)
    added = [token | {"id": token["id"] + shift} for token in added]
    if model["type"] == "BPE":
        vocab: Any = dict(zip(MARKS, range(shift), strict=True)) | {name: token + shift for name, token in own.items()}
        return value | {"added_tokens": added, "model": model | {"vocab": vocab}}
    lowest = min(score for _, score in model["vocab"])
    unknown = None if model.get("unk_id") is None else model["unk_id"] + shift
    vocab = [*([name, lowest] for name in MARKS), *model["vocab"]]
    return value | {"added_tokens": added, "model": model | {"vocab": vocab, "unk_id": unknown}}


# --- SentencePiece -------------------------------------------------------------------------------------------------


def read_sentencepiece(path: Path) -> Pieces:
    """Return the model of a SentencePiece file."""
    content = read_bytes(path, MAX_MODEL_BYTES)
    # pieces, trainer_spec and normalizer_spec of sentencepiece_model.proto; a file that was cut off ends before the last two.
    if not {1, 2, 3} <= fields_of(content):
        raise DataError(f"{path} is no SentencePiece model, or was cut off: copy it again")
    pieces = named(path, {"library": "sentencepiece", "model": base64.b64encode(content).decode()})
    if len({content for content in pieces.entries.contents if len(content) == 1}) < 256:
        log(f"note: {path} has no byte fallback: what it does not know becomes <unk>")
    return pieces


def named(path: Path, saved: Saved) -> Pieces:
    """Return a model that was read from `path`, which the error names."""
    try:
        pieces = Pieces(saved)
        pieces.encode(PROBE)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return pieces


def fields_of(content: bytes) -> set[int]:
    """Return the numbers of the fields of a message in protobuf's encoding, all of them with a length; none for another one."""
    found: set[int] = set()
    place = 0
    while place < len(content):
        tag, place = varint(content, place)
        length, place = varint(content, place)
        place += length
        if tag & 7 != 2 or place > len(content):
            return set()
        found.add(tag >> 3)
    return found


def varint(content: bytes, place: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and the place behind it; at the end of the content what there is of it."""
    value = shift = 0
    while place < len(content):
        byte = content[place]
        value |= (byte & 127) << shift
        shift += 7
        place += 1
        if byte < 128:
            break
    return value, place
