"""From text to a data folder: `lmdist-prepare articles1.csv [MORE ...] -o data/news`.

Documents are read by documents.py, tokenized by tokenizer.py, counted, split and written by corpus.py; here are the command
and the order of the work. This module does not know about models. Its imports are light, for worker processes import it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import ProgressBar, duration, log, next_line, unused
from lmdist.cpus import available_cpus
from lmdist.errors import FULL_DISK, DataError, MissingInputError, UsageError
from lmdist.settings import DEMO, SPLITS, PrepareSettings
from lmdist.storage.atomic import atomic_folder, check_output_folder, refuse_to_replace_link
from lmdist.text.data_folder import META, TEXT, VOCABULARY, token_file, write_meta
from lmdist.text.rows import FILTERED
from lmdist.text.tokenizer import WordTokenizer, lacks_spaces

if TYPE_CHECKING:
    from lmdist.text.corpus import Corpus
    from lmdist.text.documents import Documents
    from lmdist.text.vocabulary import Vocabulary

    Sources = Mapping[str, Documents]
    """The documents of each given split, or of the inputs under the name ""."""

COMMAND = "lmdist-prepare"

# One process tokenizes less than this before worker processes have started and filled their caches.
ONE_PROCESS_BYTES = {"word_tokenize": 40_000_000, "wordpunct": 60_000_000, "whitespace": 60_000_000, "characters": 60_000_000}

SECONDS_BETWEEN_LINES = 5.0


def prepare(settings: PrepareSettings, output: Path, *, overwrite: bool = False, flag: str = "-o") -> None:
    """Write the data folder `output`, which `flag` names, atomically."""
    check_output(output, flag, overwrite=overwrite)
    meta = write(settings, output, overwrite=overwrite)
    sys.stdout.write(summary(meta, output))
    sys.stdout.flush()


def write(settings: PrepareSettings, output: Path, sources: Sources | None = None, *, overwrite: bool) -> dict[str, Any]:
    """Write a data folder of the sources, by default those that the settings name; return the content of meta.json."""
    try:
        sources = sources or documents_of(settings, output)
        files = [file for documents in sources.values() for file in documents.files]
        log(f"reading {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''} into {output}")
        for documents in sources.values():
            documents.check()
        with atomic_folder(output, replace=overwrite) as folder:
            return write_data_folder(folder, settings, sources)
    except MissingInputError:
        raise
    except OSError as error:
        if error.errno in FULL_DISK:
            raise DataError(f"the disk that holds {output} is full: {error.strerror}; nothing was kept") from None
        raise DataError(f"{output} cannot be written: {error}") from None


def check_output(output: Path, flag: str, *, overwrite: bool) -> None:
    """Raise UsageError where `output` must not be written, or cannot be."""
    refuse_to_replace_link(output)
    check_output_folder(flag, output.absolute().parent)  # where it is written under another name first
    if not output.exists():
        return
    if not overwrite:
        raise UsageError(f"{output} exists: give --overwrite to replace it, or another -o")
    if not output.is_dir() or (any(output.iterdir()) and not (output / META).is_file()):
        raise UsageError(f"{output} is not a data folder, so --overwrite does not replace it: give another -o")


def documents_of(settings: PrepareSettings, output: Path) -> Sources:
    """Find the files to read; write the demo corpus beside `output` where it is asked for."""
    from lmdist.text.documents import Documents, find_files
    from lmdist.text.sources import ReadOptions

    inputs, group_by = settings.inputs, settings.group_by
    if inputs == [DEMO] and not Path(DEMO).is_file():
        inputs, group_by = [str(demo_csv(output.parent))], group_by or "title"
    patterns = {split: settings.files(split) for split in SPLITS if settings.files(split)} or {"": inputs}
    if not any(patterns.values()):
        raise UsageError("nothing to read: name a file (articles1.csv), give --train, or take the demo corpus: demo")
    options = ReadOptions.of(settings, settings.text, group_by)
    return {split: Documents(find_files(names), options) for split, names in patterns.items()}


def demo_csv(folder: Path) -> Path:
    """Return the demo corpus in `folder`, written if it does not exist."""
    path = folder / "demo.csv"
    if not path.exists():
        from lmdist.text.demo import write_demo

        log(f"writing the demo corpus to {path}")
        write_demo(path)
    return path


def write_data_folder(folder: Path, settings: PrepareSettings, sources: Sources) -> dict[str, Any]:
    """Write the files of a data folder; return the content of meta.json."""
    from lmdist.text.corpus import Corpus
    from lmdist.text.sources import size_of

    if settings.text.needs_sentences:
        log("learning where sentences end")
    tokenizer = WordTokenizer.train(settings.text, (document.text for document in next(iter(sources.values()))))
    tokenizer.save(folder / TEXT)

    corpus = Corpus(folder / "tokens.tmp", settings.seed)
    read_all(corpus, settings, sources, folder / TEXT)
    if settings.train:
        splits = corpus.given_splits()
    else:
        advice = "" if settings.lines else ", or --lines where each line of plain text is a document"
        splits = corpus.split_by_key(settings.valid_fraction, settings.test_fraction, advice)

    log("building the vocabulary and the token files")
    own_unknown = settings.unknown == "file"
    min_count = 1 if own_unknown else settings.min_count
    vocabulary = corpus.vocabulary(splits, min_count, settings.vocabulary_size, own_unknown=own_unknown)
    advice = advice_on(settings, corpus, vocabulary)
    if len(vocabulary) < 3:
        advice = advice or "take more text, or a lower --min-count"
        raise DataError(f"no word occurs {min_count} times in the text to train on: {advice}")
    if advice:
        log(f"note: {advice}")
    vocabulary.save(folder / VOCABULARY)
    facts = {
        split: corpus.write(folder / token_file(split), splits == index, vocabulary)
        for index, split in enumerate(SPLITS)
        if (splits == index).any()
    }
    for split in sources:
        if split and split not in facts:
            raise DataError(f"{', '.join(settings.files(split))} has no text for {split}")
    corpus.temporary_file.unlink()
    files = [(file, size_of(file)) for documents in sources.values() for file in documents.files]
    return write_meta(folder, len(vocabulary), facts, settings, skipped(corpus, sources), files)


def advice_on(settings: PrepareSettings, corpus: Corpus, vocabulary: Vocabulary) -> str:
    """Return which setting suits a text better, judged by the words that were found in it, or ""."""
    if settings.tokenizer in ("word_tokenize", "wordpunct") and lacks_spaces(corpus.ids):
        return "the words of this text are not separated by spaces; --tokenizer characters takes each character for a word"
    frequent = set(vocabulary.words[:100])
    if settings.clean == "none" and ">" in frequent and frequent & {"<", "</"}:
        return "this text seems to be HTML, whose tags are among its most frequent words; --clean html drops them"
    return ""


def read_all(corpus: Corpus, settings: PrepareSettings, sources: Sources, text_json: Path) -> None:
    """Tokenize all sources into the corpus; raise DataError where they have no text."""
    size = sum(documents.bytes for documents in sources.values())
    workers = (settings.workers or available_cpus()) if size > ONE_PROCESS_BYTES[settings.tokenizer] else 1
    with ProgressBar(size, "B", unit_scale=True, seconds_between_lines=SECONDS_BETWEEN_LINES) as bar:
        progress = ReadingProgress(bar, size)
        bytes_before = 0
        for split, documents in sources.items():
            for bytes_read in corpus.read(documents, split, text_json, workers, keep_empty=settings.text.line_by_line):
                progress.show(bytes_before + bytes_read, len(corpus.lengths), corpus.tokens)
            bytes_before += documents.bytes
    for documents in sources.values():
        documents.check_losses()
        for note in documents.notes:
            log(f"note: {note}")
    if not corpus.tokens:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped(corpus, sources).items())
        raise DataError(f"there is no text in what was read{f': rows skipped: {counts}' if counts else ''}")


def skipped(corpus: Corpus, sources: Sources) -> Counter[str]:
    """Return the number of rows without a document, by reason."""
    return sum((documents.skipped for documents in sources.values()), corpus.skipped)


class ReadingProgress:
    """How far the reading of `size` bytes is, how fast it goes and how long it will take."""

    def __init__(self, bar: ProgressBar, size: int) -> None:
        self.bar = bar
        self.size = size
        self.first: tuple[float, int, int] | None = None
        """Time, bytes and tokens after the first chunk; before it were imports."""

    def show(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Show the progress after a chunk."""
        now = time.perf_counter()
        self.first = self.first or (now, bytes_read, tokens)
        began, first_bytes, first_tokens = self.first
        seconds = max(1e-9, now - began)
        rate = f"{(tokens - first_tokens) / seconds:,.0f} tokens/s"
        left = seconds * (self.size - bytes_read) / max(1, bytes_read - first_bytes)
        self.bar.show(
            f"{documents:,} documents, {rate}",
            f"{bytes_read / 1e6:,.1f} of {self.size / 1e6:,.1f} MB  {documents:,} documents  {tokens:,} tokens  "
            f"{rate}  {duration(left)} left",
        )
        self.bar.update(bytes_read)


def summary(meta: Mapping[str, Any], output: Path) -> str:
    """Return the table at the end of the command."""
    lines = [f"{'':<8}{'documents':>12}{'tokens':>16}{'unknown':>10}"]
    lines += [
        f"{split:<8}{facts['documents']:>12,}{facts['tokens']:>16,}{facts['unknown_rate']:>10.2%}"
        for split, facts in meta["splits"].items()
    ]
    lines.append(f"vocabulary: {meta['vocabulary_size']:,} words, including <unk> and <eos>")
    if filtered := meta["skipped"].get(FILTERED):
        rows = sum(facts["documents"] for facts in meta["splits"].values()) + sum(meta["skipped"].values())
        lines.append(f"--where left {rows - filtered:,} of {rows:,} rows")
    if meta["skipped"]:
        lines.append("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items()))
    lines.append(f"written to {output}")
    return "".join(f"{line}\n" for line in lines)


# --- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the command line of lmdist-prepare: a flag for each field of PrepareSettings."""
    from lmdist.config import add_flags, recipe_names

    built = CommandParser(
        prog=COMMAND,
        usage="lmdist-prepare INPUT [INPUT ...] -o FOLDER [--flag VALUE ...]",
        description="Turn text into a data folder that lmdist.train reads: token ids, split into train, valid and test.",
        epilog="Examples: lmdist-prepare demo -o data/demo;  lmdist-prepare 'news/*.csv.gz' -o data/news --lowercase;  "
        "lmdist-prepare news.csv -o data/vox --where \"publication == 'Vox' and year >= 2016\";  "
        "lmdist-prepare --train wiki.train.tokens --valid wiki.valid.tokens --test wiki.test.tokens "
        "--tokenizer whitespace --unknown file -o data/wikitext2",
        argument_default=argparse.SUPPRESS,
    )
    built.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the data folder to write")
    built.add_argument("--overwrite", action="store_true", default=False, help="replace a data folder that exists")
    built.add_argument(
        "--recipe",
        default=None,
        metavar="RECIPE",
        help=f"take [prepare] of a recipe, a file or one of {', '.join(recipe_names())}; flags win",
    )
    add_flags(built, PrepareSettings)
    return built


def resolve(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> PrepareSettings:
    """Return the settings: defaults < [prepare] of a recipe < flags.

    Flags that name inputs replace the splits of the recipe, and the other way round. A min_count that was given contradicts
    unknown = file; the default does not.
    """
    values = dict(recipe)
    if "inputs" in flags:
        values = {key: value for key, value in values.items() if key not in SPLITS}
    elif "train" in flags:
        values.pop("inputs", None)
    values |= flags
    if values.get("unknown") == "file" and values.get("min_count", 1) > 1:
        raise UsageError("min_count creates unknown words, and unknown is file: give one or the other")
    return PrepareSettings(**values)


def main(argv: Sequence[str] | None = None) -> None:
    """Write a data folder."""
    with exit_on_error(COMMAND):
        from lmdist.config import read_section

        flags = vars(parser().parse_args(argv))
        output, overwrite, recipe = (flags.pop(name) for name in ("output", "overwrite", "recipe"))
        if not flags.get("inputs"):
            flags.pop("inputs", None)
        settings = resolve(read_section(recipe, "prepare", PrepareSettings) if recipe else {}, flags)
        prepare(settings, output, overwrite=overwrite)
        name = output.resolve().name
        train = ["lmdist-train", *(["--config", recipe] if recipe else []), "--data.folder", output]
        sys.stdout.write(f"{next_line([*train, '--run_folder', unused(Path('runs') / name)])}\n")


if __name__ == "__main__":
    main()
