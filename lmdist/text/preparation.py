"""What one machine and several have in common when they prepare text: the inputs, the tokenizer, progress, the end.

The imports are light, for the processes of a pool import them. This module does not know who counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lmdist.console import ProgressBar, duration, log
from lmdist.counted import counted
from lmdist.cpus import available_cpus
from lmdist.errors import FULL_DISK, DataError, MissingInputError, UsageError, require
from lmdist.settings import DEMO, LEARNED, SPLITS, PrepareSettings, TextSettings
from lmdist.storage.atomic import check_output_folder, refuse_to_replace_link
from lmdist.text.data_folder import META, write_meta
from lmdist.text.given_vocabulary import GivenVocabulary
from lmdist.text.rows import FILTERED
from lmdist.text.tokenizer import WordTokenizer, imported_late

if TYPE_CHECKING:
    from lmdist.text.counting import Sources
    from lmdist.text.merging import Merged

SECONDS_BETWEEN_LINES = 5.0

# One process tokenizes less than this before worker processes have started and filled their caches.
ONE_PROCESS_BYTES = {"word_tokenize": 40_000_000, "wordpunct": 60_000_000, "whitespace": 60_000_000, "characters": 60_000_000}
ONE_PROCESS_BYTES |= dict.fromkeys(("bpe", "unigram", "tokenizers", "sentencepiece"), 20_000_000)


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


@contextmanager
def errors_of_writing(output: Path) -> Iterator[None]:
    """Turn the errors of writing a folder into DataError, naming it."""
    try:
        yield
    except MissingInputError:
        raise
    except OSError as error:
        if error.errno in FULL_DISK:
            raise DataError(f"the disk that holds {output} is full: {error.strerror}; nothing was kept") from None
        raise DataError(f"{output} cannot be written: {error}") from None


def find_sources(settings: PrepareSettings, output: Path, *, in_parts: bool = False) -> Sources:
    """Find the files to read; write the demo corpus beside `output` where it is asked for.

    Raises UsageError where several machines are to read them `in_parts`, and one can only be read as a whole.
    """
    from lmdist.text.documents import Documents, find_files
    from lmdist.text.sources import ReadOptions, is_pipe

    inputs, group_by = settings.inputs, settings.group_by
    if inputs == [DEMO] and not Path(DEMO).is_file():
        inputs, group_by = [str(demo_csv(output.parent))], group_by or "title"
    patterns = {split: settings.files(split) for split in SPLITS if settings.files(split)} or {"": inputs}
    if not any(patterns.values()):
        raise UsageError("nothing to read: name a file (articles1.csv), give --train, or take the demo corpus: demo")
    options = ReadOptions.of(settings, settings.text, group_by)
    files = {split: find_files(names) for split, names in patterns.items()}
    for file in (file for found in files.values() for file in found):
        if in_parts and is_pipe(file):
            raise UsageError(f"{file} cannot be read again by each machine, nor in parts: name files, or prepare it on one")
    return {split: Documents(found, options) for split, found in files.items()}


def announce(sources: Sources, output: Path) -> None:
    """Say which files are read."""
    files = [file for documents in sources.values() for file in documents.files]
    log(f"reading {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''} into {output}")


def demo_csv(folder: Path) -> Path:
    """Return the demo corpus in `folder`, written if it does not exist."""
    path = folder / "demo.csv"
    if not path.exists():
        from lmdist.text.demo import write_demo

        log(f"writing the demo corpus to {path}")
        write_demo(path)
    return path


def num_processes(settings: PrepareSettings, sources: Sources) -> int:
    """Return how many processes share the work: one for little text, for the first rows, and for what can be read once."""
    from lmdist.text.sources import is_pipe

    size = sum(documents.bytes for documents in sources.values())
    alone = ONE_PROCESS_BYTES[settings.text.tokenizer]
    can_be_cut = not any(is_pipe(file) for documents in sources.values() for file in documents.files)
    if size <= alone or settings.rows or not can_be_cut:
        return 1
    # A shard reads its first file from the beginning: of small ones most would read, and not tokenize.
    return settings.workers or min(available_cpus(), 2 * size // alone)


NOTHING: Mapping[str, Any] = MappingProxyType({})


def with_given_words(
    settings: PrepareSettings, given: Mapping[str, Any] = NOTHING
) -> tuple[PrepareSettings, GivenVocabulary | None]:
    """Return the settings with those of the vocabulary that they name, and this vocabulary, if there is one.

    The pieces of a file are a vocabulary too. `given` are the settings that were given by hand, by which no text may be
    tokenized otherwise.
    """
    if settings.tokenizer in LEARNED:
        require("tokenizers", purpose=f"--tokenizer {settings.tokenizer} learns pieces by it: ")
    if settings.tokenizer_file:
        return settings, GivenVocabulary.of_pieces(settings)
    if not settings.vocabulary:
        return settings, None
    base = GivenVocabulary.load(Path(settings.vocabulary))
    return base.settings(settings, given), base


def learn_tokenizer(settings: TextSettings, sources: Sources, given: WordTokenizer | None) -> WordTokenizer:
    """Return the tokenizer of a base, or one that learns where sentences end from the beginning of the first source.

    It is the same whoever reads the rest.
    """
    if given:
        return given
    if settings.needs_sentences:
        log("learning where sentences end")
    return WordTokenizer.train(settings, (document.text for document in next(iter(sources.values()))))


def imports_of(settings: PrepareSettings, sources: Sources) -> list[str]:
    """Return the modules that counting imports when it needs them, which takes a second or two."""
    from lmdist.text.readers import PLAIN_TEXT, format_by_name

    names = [PurePath(file.name) for documents in sources.values() for file in documents.files]
    has_columns = any(format_by_name(name) is not PLAIN_TEXT for name in names)
    return [*imported_late(settings.text), *(["pandas"] if has_columns else [])]


def finish(folder: Path, merged: Merged, settings: PrepareSettings, sources: Sources) -> dict[str, Any]:
    """Write meta.json beside the other files of a data folder; return its content."""
    from lmdist.text.sources import size_of

    files = [(file, size_of(file)) for documents in sources.values() for file in documents.files]
    return write_meta(folder, merged.vocabulary_size, merged.splits, settings, merged.skipped, files, merged.more)


@contextmanager
def reading_progress(size: int) -> Iterator[ReadingProgress]:
    """Yield the progress of reading `size` bytes, shown on stderr."""
    with ProgressBar(size, "B", unit_scale=True, seconds_between_lines=SECONDS_BETWEEN_LINES) as bar:
        yield ReadingProgress(bar, size)


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
        found = counted(documents, "document")
        self.bar.show(
            f"{found}, {rate}",
            f"{bytes_read / 1e6:,.1f} of {self.size / 1e6:,.1f} MB  {found}  {counted(tokens, 'token')}  {rate}  "
            f"{duration(left)} left",
        )
        self.bar.update(bytes_read)


def summary(meta: Mapping[str, Any], output: Path) -> str:
    """Return the table at the end of the command."""
    lines = [f"{'':<8}{'documents':>12}{'tokens':>16}{'unknown':>10}"]
    lines += [
        f"{split:<8}{facts['documents']:>12,}{facts['tokens']:>16,}{facts['unknown_rate']:>10.2%}"
        for split, facts in meta["splits"].items()
    ]
    units = "pieces of words" if TextSettings(**meta["text"]).has_pieces else "words"
    lines.append(f"vocabulary: {meta['vocabulary_size']:,} {units}, including <unk> and <eos>")
    if given := meta.get("vocabulary"):
        lines.append(
            f"  {given['words']:,} are those of {given['from']}, which has {counted(given['shared'], 'word')} of this text; "
            f"{given['new']:,} of it are new, {given['dropped']:,} became <unk>"
        )
    if filtered := meta["skipped"].get(FILTERED):
        rows = sum(facts["documents"] for facts in meta["splits"].values()) + sum(meta["skipped"].values())
        lines.append(f"--where left {rows - filtered:,} of {counted(rows, 'row')}")
    if meta["skipped"]:
        lines.append("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items()))
    lines.append(f"written to {output}")
    return "".join(f"{line}\n" for line in lines)
