"""What lmdist-prepare reads, by how many processes, and how it is tokenized: what the settings and the first text decide.

The imports are light, for worker processes import this. This module does not know who counts, nor what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lmdist.console import log
from lmdist.cpus import available_cpus
from lmdist.errors import UsageError, require
from lmdist.settings import DEMO, LEARNED, SPLITS, PrepareSettings, TextSettings
from lmdist.text.given_vocabulary import GivenVocabulary
from lmdist.text.tokenizer import WordTokenizer, imported_late

if TYPE_CHECKING:
    from lmdist.text.counting import Sources

# One process tokenizes less than this before worker processes have started and filled their caches.
ONE_PROCESS_BYTES = {"word_tokenize": 40_000_000, "wordpunct": 60_000_000, "whitespace": 60_000_000, "characters": 60_000_000}
ONE_PROCESS_BYTES |= dict.fromkeys(("bpe", "unigram", "tokenizers", "sentencepiece"), 20_000_000)

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""No setting was given by hand."""


def find_sources(settings: PrepareSettings, output: Path, *, in_parts: bool = False) -> Sources:
    """Find the files to read; write the demo corpus beside `output` where it is asked for.

    Raises UsageError where several machines are to read them `in_parts`, and one can only be read as a whole.
    """
    from lmdist.text.documents import Documents
    from lmdist.text.finding import find_files
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


def with_given_words(settings: PrepareSettings, given: Mapping[str, Any]) -> tuple[PrepareSettings, GivenVocabulary | None]:
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
