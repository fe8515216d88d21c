"""`merge`, the second of three steps, and what leads to the third: shards that are counted become the files of a data folder.

    merged = merge(folder, shards, settings, sources, run)      # text.json, vocab.txt, train.bin, valid.bin, test.bin

This module does not know who has counted the shards, nor who runs the functions.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmdist.console import log
from lmdist.counted import counted
from lmdist.errors import DataError
from lmdist.settings import SPLITS, PrepareSettings
from lmdist.storage.reading import read_json
from lmdist.text.corpus import Corpus, Run, vocabulary_of
from lmdist.text.counting import Sources
from lmdist.text.data_folder import TEXT, VOCABULARY, SplitFacts
from lmdist.text.given_vocabulary import GivenVocabulary
from lmdist.text.learning import learn, respell
from lmdist.text.pieces import Pieces
from lmdist.text.shard_files import READ
from lmdist.text.token_writer import write_token_files
from lmdist.text.tokenizer import WordTokenizer, lacks_spaces
from lmdist.text.vocabulary import Vocabulary

NUM_PIECES = 8_000
"""That are learned where no number is given."""
RESPELLED = "respelled"
"""The folder of the shards in pieces, until the token files are written."""


class Merged(NamedTuple):
    """What meta.json says of the files."""

    vocabulary_size: int
    splits: dict[str, SplitFacts]
    skipped: Counter[str]
    """Rows without a document, by reason."""
    more: dict[str, Any]
    """Of the tokenizer and of a vocabulary that was given."""


def merge(
    folder: Path,
    shards: Sequence[Path],
    settings: PrepareSettings,
    sources: Sources,
    run: Run,
    base: GivenVocabulary | None = None,
) -> Merged:
    """Write the files of a data folder but for meta.json, its words those of the `base` if there is one.

    Raises DataError where the text does not suffice.
    """
    say_what_was_read(shards, sources)
    tokenizer = take_tokenizer(shards, folder)
    corpus = Corpus(shards, keep_empty=settings.text.line_by_line)
    skipped = sum((documents.skipped for documents in sources.values()), corpus.skipped)
    if not corpus.tokens:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        raise DataError(f"there is no text in what was read{f': rows skipped: {counts}' if counts else ''}")
    splits = corpus.split(
        settings.valid_fraction,
        settings.test_fraction,
        "" if settings.lines else ", or --lines where each line of plain text is a document",
    )

    log("building the vocabulary and the token files")
    counts = corpus.counts(splits, run)
    more: dict[str, Any] = {"text": tokenizer.settings.stored()}
    if base is None and tokenizer.settings.has_pieces:
        corpus, vocabulary = learn_pieces(folder, corpus, counts, settings, run)
    elif base is None:
        vocabulary = own_vocabulary(settings, counts)
    else:
        all_words, frequent = (vocabulary_of(counts, least) for least in (1, settings.min_count))
        vocabulary, more["vocabulary"] = base.applied(
            all_words, frequent if settings.extend else None, settings.vocabulary_size
        )
    for split in sources:
        if split and not (splits == SPLITS.index(split)).any():
            raise DataError(f"{', '.join(settings.files(split))} has no text for {split}")
    vocabulary.save(folder / VOCABULARY)
    facts = write_token_files(folder, corpus, splits, len(vocabulary), run)
    shutil.rmtree(folder / RESPELLED, ignore_errors=True)
    return Merged(len(vocabulary), facts, skipped, more)


def say_what_was_read(shards: Sequence[Path], sources: Sources) -> None:
    """Add up what the shards say of each source; raise DataError for too many lines that cannot be read."""
    for documents in sources.values():
        documents.forget()
    for shard in shards:
        for split, facts in read_json(shard / READ).items():
            sources[split].add(facts)
    for documents in sources.values():
        documents.check_losses()
        for note in documents.notes:
            log(f"note: {note}")


def take_tokenizer(shards: Sequence[Path], folder: Path) -> WordTokenizer:
    """Copy the tokenizer of the shards, and return it; raise DataError where they have several."""
    shutil.copyfile(shards[0] / TEXT, folder / TEXT)
    content = (folder / TEXT).read_bytes()
    for shard in shards:
        if (shard / TEXT).read_bytes() != content:
            raise DataError(
                f"{shards[0]} and {shard} were tokenized differently, by two versions of NLTK or of lmdist: "
                "count both again by the same ones"
            )
    return WordTokenizer.load(folder / TEXT)


def learn_pieces(
    folder: Path, corpus: Corpus, counts: Mapping[str, int], settings: PrepareSettings, run: Run
) -> tuple[Corpus, Vocabulary]:
    """Learn pieces from the words of the train split, for text.json; return the corpus in pieces, and these."""
    log("learning pieces of words")
    model = Pieces(learn(settings.tokenizer, counts, settings.vocabulary_size or NUM_PIECES))
    WordTokenizer(settings.text, model=model).save(folder / TEXT)
    shards = [folder / RESPELLED / str(number) for number in range(len(corpus.shards))]
    for shard in shards:
        shard.mkdir(parents=True)
    for _ in run(respell, ((*pair, model.saved) for pair in zip(corpus.shards, shards, strict=True))):
        pass
    return Corpus(shards, keep_empty=settings.text.line_by_line), Vocabulary(model.words)


def own_vocabulary(settings: PrepareSettings, counts: Mapping[str, int]) -> Vocabulary:
    """Return the words of the train split that the settings keep; raise DataError where there are none."""
    own_unknown = settings.unknown == "file"
    min_count = 1 if own_unknown else settings.min_count
    vocabulary = vocabulary_of(counts, min_count, settings.vocabulary_size, own_unknown=own_unknown)
    advice = advice_on(settings, counts, vocabulary)
    if len(vocabulary) < 3:
        advice = advice or "take more text, or a lower --min-count"
        raise DataError(f"no word occurs {counted(min_count, 'time')} in the text to train on: {advice}")
    if advice:
        log(f"note: {advice}")
    return vocabulary


def advice_on(settings: PrepareSettings, words: Iterable[str], vocabulary: Vocabulary) -> str:
    """Return which setting suits a text better, judged by the words that were found in it, or ""."""
    if settings.tokenizer in ("word_tokenize", "wordpunct") and lacks_spaces(words):
        return "the words of this text are not separated by spaces; --tokenizer characters takes each character for a word"
    frequent = set(vocabulary.words[:100])
    if settings.clean == "none" and ">" in frequent and frequent & {"<", "</"}:
        return "this text seems to be HTML, whose tags are among its most frequent words; --clean html drops them"
    return ""
