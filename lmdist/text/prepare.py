"""From text to a data folder: `lmdist-prepare articles1.csv [MORE ...] -o data/news`.

    data/news/
        train.bin  valid.bin  test.bin   words as ids, little-endian uint16 or uint32, an end mark after each document
        vocab.txt                        the words of the train split by falling frequency: line number = id
        text.json                        how words were found, for prompts to be read the same way
        meta.json                        counts, rates of unknown words, settings, sources, sha256 sums

Documents are read by documents.py, words found by text.py, numbered and split by corpus.py; here are the settings, the
command and the folder. This module does not know about models. Its imports are light: training reads the settings too.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import errno
import inspect
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmdist import __version__
from lmdist.cpus import available_cpus
from lmdist.errors import CommandParser, DataError, MissingInputError, UsageError, exit_on_error
from lmdist.settings import DEMO, SPLITS, PrepareSettings
from lmdist.storage.atomic import atomic_folder
from lmdist.storage.checksums import checksums
from lmdist.storage.reading import write_json
from lmdist.text.data_folder import FORMAT, VERSION
from lmdist.text.tokenizer import WordTokenizer

if TYPE_CHECKING:
    from lmdist.text.documents import Documents


# Less than this is tokenised before worker processes have started, and have asked NLTK for what they do not know.
ONE_PROCESS_BYTES = {"word_tokenize": 40_000_000, "wordpunct": 60_000_000, "whitespace": 60_000_000}


def prepare(settings: PrepareSettings, output: Path, *, overwrite: bool = False) -> None:
    """Make the data folder `output`, whole or not at all."""
    check_output(output, overwrite=overwrite)
    try:
        sources = open_sources(settings, output)
        files = [file for documents in sources.values() for file in documents.files]
        say(f"reading {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''} into {output}")
        for documents in sources.values():
            documents.check()
        with atomic_folder(output) as folder:
            meta = fill(folder, settings, sources)
    except MissingInputError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"the disk that holds {output} is full: {error.strerror}; nothing was kept") from None
        raise DataError(f"{output} cannot be written: {error}") from None
    for documents in sources.values():
        for note in documents.notes:
            say(f"note: {note}")
    sys.stdout.write(summary(meta, output))
    sys.stdout.flush()


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError where `output` must not be written."""
    if not output.exists():
        return
    if not overwrite:
        raise UsageError(f"{output} is there already: give --overwrite to replace it, or another -o")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "meta.json").is_file()):
        raise UsageError(f"{output} is not a data folder, so --overwrite does not replace it: give another -o")


def open_sources(settings: PrepareSettings, output: Path) -> dict[str, Documents]:
    """The documents to read: of the given splits, or of the inputs under the name ""."""
    from lmdist.text.documents import Documents, find_files
    from lmdist.text.readers import ReadOptions

    inputs, group_by = settings.inputs, settings.group_by
    if inputs == [DEMO] and not Path(DEMO).is_file():
        demo = output.parent / "demo.csv"
        if not demo.exists():
            from lmdist.text.demo import write_demo

            say(f"writing the demo corpus to {demo}")
            write_demo(demo)
        inputs, group_by = [str(demo)], group_by or "title"
    given = {split: [getattr(settings, split)] for split in SPLITS if getattr(settings, split)} or {"": inputs}
    if not any(given.values()):
        raise UsageError("nothing to read: name a file (articles1.csv), give --train, or take the demo corpus: demo")
    options = ReadOptions(
        text_column=settings.text_column,
        group_by=group_by,
        lines=settings.tokenizer == "whitespace",
        rows=settings.rows,
        encoding=settings.encoding,
    )
    return {split: Documents(find_files(patterns), options) for split, patterns in given.items()}


def fill(folder: Path, settings: PrepareSettings, sources: dict[str, Documents]) -> dict[str, Any]:
    """Write the files of a data folder; gives what meta.json says."""
    from lmdist.text.corpus import Corpus

    if settings.text.needs_sentences:
        say("learning where sentences end")
    tokenizer = WordTokenizer.train(settings.text, (document.text for document in next(iter(sources.values()))))
    tokenizer.save(folder / "text.json")

    corpus = Corpus(folder / "words.spool", settings.seed)
    read_all(corpus, settings, sources, folder / "text.json")
    splits = corpus.given_splits() if settings.train else corpus.split_by_key(settings.valid_fraction, settings.test_fraction)

    say("numbering the words")
    own_unknown = settings.unknown == "file"
    min_count = 1 if own_unknown else settings.min_count
    vocabulary = corpus.vocabulary(splits, min_count, settings.vocabulary_size, own_unknown=own_unknown)
    if len(vocabulary) < 3:
        raise DataError(f"no word comes {min_count} times in the text to train on: take more text, or a lower --min-count")
    vocabulary.save(folder / "vocab.txt")
    dtype = "<u2" if len(vocabulary) <= 1 << 16 else "<u4"
    facts = {}
    for index, split in enumerate(SPLITS):
        documents = splits == index
        if documents.any():
            facts[split] = corpus.write(folder / f"{split}.bin", documents, vocabulary, dtype)
    for split in sources:
        if split and split not in facts:
            raise DataError(f"{getattr(settings, split)} has no text for {split}")
    corpus.spool.unlink()

    skipped = sum((documents.skipped for documents in sources.values()), corpus.skipped)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "lmdist": __version__,
        "dtype": "uint16" if dtype == "<u2" else "uint32",
        "vocabulary_size": len(vocabulary),
        "splits": facts,
        "skipped": dict(sorted(skipped.items())),
        "text": dataclasses.asdict(settings.text),
        "prepare": dataclasses.asdict(settings),
        "sources": [
            {"name": str(file), "bytes": file.stat().st_size} for documents in sources.values() for file in documents.files
        ],
        "files": checksums(folder),
    }
    write_json(folder / "meta.json", meta)
    return meta


def read_all(corpus: Any, settings: PrepareSettings, sources: dict[str, Documents], text_json: Path) -> None:
    """Put the words of all sources into the corpus; raises DataError where there are none."""
    size = sum(documents.bytes for documents in sources.values())
    workers = (settings.workers or available_cpus()) if size > ONE_PROCESS_BYTES[settings.tokenizer] else 1
    with progress(size) as tell:
        done = 0
        for split, documents in sources.items():
            corpus.read(
                documents,
                split,
                text_json,
                workers,
                keep_empty=settings.tokenizer == "whitespace",
                tell=lambda position, before=done: tell(before + position, len(corpus.lengths), corpus.tokens),
            )
            done += documents.bytes
    if not corpus.tokens:
        skipped = sum((documents.skipped for documents in sources.values()), corpus.skipped)
        counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        raise DataError(f"there is no text in what was read{f': rows skipped: {counts}' if counts else ''}")


# --- what a person sees --------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print a line."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Tell(Protocol):
    """Takes how far the work is."""

    def __call__(self, bytes_read: int, documents: int, words: int) -> None:
        """Show it, if it is time to."""


@contextmanager
def progress(size: int) -> Iterator[Tell]:
    """Shows how far the reading of `size` bytes is: a bar on a terminal, a line every 5 seconds elsewhere."""
    from tqdm import tqdm

    from lmdist.console import duration

    began = shown = 0.0
    first_words = first_bytes = 0
    terminal = sys.stderr.isatty()
    bar = tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, disable=not terminal)

    def tell(bytes_read: int, documents: int, words: int) -> None:
        nonlocal began, shown, first_words, first_bytes
        now = time.perf_counter()
        if not began:  # What came before were imports.
            began = shown = now
            first_words, first_bytes = words, bytes_read
        seconds = max(1e-9, now - began)
        rate = (words - first_words) / seconds
        if terminal:
            bar.set_postfix_str(f"{documents:,} documents, {rate:,.0f} words/s", refresh=False)
            bar.update(bytes_read - bar.n)
        elif now - shown >= 5:
            shown = now
            left = seconds * (size - bytes_read) / max(1, bytes_read - first_bytes)
            say(
                f"{bytes_read / 1e6:,.1f} of {size / 1e6:,.1f} MB  {documents:,} documents  {words:,} words  "
                f"{rate:,.0f} words/s  {duration(left)} left"
            )

    with bar:
        yield tell


def summary(meta: dict[str, Any], output: Path) -> str:
    """The table at the end."""
    lines = [f"{'':<8}{'documents':>12}{'words':>16}{'unknown':>10}"]
    lines += [
        f"{split:<8}{fact['documents']:>12,}{fact['tokens']:>16,}{fact['unknown_rate']:>10.2%}"
        for split, fact in meta["splits"].items()
    ]
    lines.append(f"vocabulary: {meta['vocabulary_size']:,} words, <unk> and <eos> among them")
    if meta["skipped"]:
        lines.append("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items()))
    lines.append(f"written to {output}")
    return "".join(f"{line}\n" for line in lines)


# --- the command ---------------------------------------------------------------------------------------------------


def field_help() -> dict[str, str]:
    """What stands under each field of PrepareSettings."""
    [definition] = ast.parse(inspect.getsource(PrepareSettings)).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for node, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            texts[node.target.id] = ast.literal_eval(after.value)
    return texts


def parser() -> argparse.ArgumentParser:
    """The command line of lmdist-prepare: a flag for each field of PrepareSettings."""
    made = CommandParser(
        prog="lmdist-prepare",
        usage="lmdist-prepare INPUT [INPUT ...] -o FOLDER [--flag VALUE ...]",
        description="Turn text into a data folder that lmdist.train reads: words, split into train, valid and test, as ids.",
        epilog="Examples: lmdist-prepare demo -o data/demo;  lmdist-prepare 'news/*.csv.gz' -o data/news --lowercase;  "
        "lmdist-prepare --train wiki.train.tokens --valid wiki.valid.tokens --test wiki.test.tokens "
        "--tokenizer whitespace --unknown file -o data/wikitext2",
        argument_default=argparse.SUPPRESS,
    )
    texts = field_help()
    made.add_argument("inputs", nargs="*", metavar="INPUT", help=texts["inputs"])
    made.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the data folder to make")
    made.add_argument("--overwrite", action="store_true", default=False, help="replace a data folder that is there")
    made.add_argument("--recipe", type=Path, default=None, metavar="FILE.toml", help="take [prepare] of a recipe; flags win")
    for setting in dataclasses.fields(PrepareSettings)[1:]:
        flag, text = f"--{setting.name.replace('_', '-')}", texts[setting.name].rstrip(".")
        if isinstance(setting.default, bool):
            made.add_argument(flag, action=argparse.BooleanOptionalAction, help=f"{text} (default: {setting.default})")
        else:
            shown = f" (default: {setting.default})" if setting.default else ""
            made.add_argument(flag, type=type(setting.default), metavar="VALUE", help=(text + shown).replace("%", "%%"))
    return made


def from_recipe(path: Path) -> dict[str, Any]:
    """The section [prepare] of a recipe; raises an error naming the file and what is wrong in it."""
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"the recipe {path} is not there") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise UsageError(f"{path} is not a recipe: {error}") from None
    section = recipe.get("prepare", {})
    if not isinstance(section, dict):
        raise UsageError(f"{path}: [prepare] is expected to be a section")
    defaults = dataclasses.asdict(PrepareSettings())
    for key, value in section.items():
        if key not in defaults:
            raise UsageError(f"{path}: [prepare] has no {key}; it has {', '.join(defaults)}")
        if isinstance(defaults[key], float) and type(value) is int:
            section[key] = float(value)
        elif type(value) is not type(defaults[key]) or (key == "inputs" and not all(isinstance(name, str) for name in value)):
            raise UsageError(f"{path}: prepare.{key} is {value!r}; a {type(defaults[key]).__name__} is expected")
    return section


def main(argv: Sequence[str] | None = None) -> None:
    """Make a data folder."""
    arguments = vars(parser().parse_args(argv))
    output, overwrite, recipe = (arguments.pop(name) for name in ("output", "overwrite", "recipe"))
    with exit_on_error("lmdist-prepare"):
        # As Ctrl-C does: half a folder and the workers go away.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if not arguments.get("inputs"):
            arguments.pop("inputs", None)
        values = from_recipe(recipe) if recipe else {}
        if "inputs" in arguments:
            values = {key: value for key, value in values.items() if key not in SPLITS}
        elif "train" in arguments:
            values.pop("inputs", None)
        values |= arguments
        if values.get("unknown") == "file" and values.get("min_count", 1) > 1:
            raise UsageError("min_count makes unknown words, and unknown is file: give one or the other")
        prepare(PrepareSettings(**values), output, overwrite=overwrite)
        sys.stdout.write(f"next: lmdist-train --data.folder {output}\n")


if __name__ == "__main__":
    main()
