"""Preparing on several machines, which share a folder: each counts some of the shards, and one merges them.

    lmdist-prepare 'news/*.csv.gz' -o data/news --shard 3/16        # anywhere, sixteen times, in any order
    lmdist-prepare 'news/*.csv.gz' -o data/news --merge             # once, when all are there
    lmdist-prepare 'news/*.csv.gz' -o data/news --scheduler tcp://host:8786     # both, with a Dask cluster

A shard that is done is not done again, and one that was killed leaves nothing that is taken for one. This module does not know
what the steps do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lmdist.console import log
from lmdist.counted import counted
from lmdist.errors import UsageError
from lmdist.settings import PrepareSettings
from lmdist.storage.atomic import atomic_folder, check_output_folder, recover, refuse_to_replace_link
from lmdist.text.counting import Sources, cut
from lmdist.text.dask_cluster import count_on_cluster, dask_cluster
from lmdist.text.given_vocabulary import GivenVocabulary
from lmdist.text.inputs import NOTHING, find_sources, learn_tokenizer, num_processes, with_given_words
from lmdist.text.merging import merge
from lmdist.text.outputs import errors_of_writing, finish
from lmdist.text.reports import announce, reading_progress, summary
from lmdist.text.shards import (
    NAME,
    begun,
    description,
    find_shards,
    is_of,
    learned_once,
    shard_folder,
    shards_folder,
    write_missing_shard,
    write_shard,
)
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.workers import Workers

SHARDS_PER_THREAD = 2
"""Of a cluster: a worker that is done early takes another one."""


def prepare_shard(
    settings: PrepareSettings, output: Path, index: int, number: int, *, given: Mapping[str, Any] = NOTHING
) -> None:
    """Count shard `index` of `number` of a data folder `output`, which may exist already, unless the shard is done.

    Here and below `given` are the settings that were given by hand.
    """
    refuse_to_replace_link(output)
    folder = shards_folder(output)
    check_output_folder("-o", folder)
    with errors_of_writing(folder):
        settings, base = with_given_words(settings, given)
        sources = several_sources(settings, output)
        of, shard = description(sources, settings, base), shard_folder(folder, index, number)
        if is_of(shard, of):
            sys.stdout.write(f"{shard} is done\n")
            return
        announce(sources, shard)
        part = cut(sources, index, number)
        for documents in part.values():
            documents.check()
        tokenizer = tokenizer_of(folder, of, settings, sources, base)
        size = sum(documents.bytes for documents in sources.values())
        with reading_progress(size // number) as progress:
            num_documents, num_tokens = write_shard(shard, part, tokenizer, settings.seed, of, progress.show)
    for documents in part.values():
        for note in documents.notes:
            log(f"note: {note}")
    sys.stdout.write(f"{counted(num_documents, 'document')}, {counted(num_tokens, 'token')}; written to {shard}\n")


def merge_shards(settings: PrepareSettings, output: Path, *, overwrite: bool, given: Mapping[str, Any] = NOTHING) -> None:
    """Write the data folder `output` from its shards."""
    with errors_of_writing(output):
        settings, base = with_given_words(settings, given)
        merge_all(settings, output, several_sources(settings, output), base, overwrite=overwrite)


def prepare_on_cluster(
    settings: PrepareSettings,
    output: Path,
    address: str,
    number: int | None = None,
    *,
    overwrite: bool,
    given: Mapping[str, Any] = NOTHING,
) -> None:
    """Write the data folder `output` from `number` shards, or as many as suit it, that the workers of a Dask cluster count."""
    folder = shards_folder(output)
    with errors_of_writing(output):
        settings, base = with_given_words(settings, given)
        sources = several_sources(settings, output)
        for documents in sources.values():
            documents.check()
        of = description(sources, settings, base)
        with dask_cluster(address) as (client, num_threads):
            number = number or begun(folder, of) or SHARDS_PER_THREAD * num_threads
            announce(sources, folder)
            log(f"counting {counted(number, 'shard')} on {counted(num_threads, 'thread')} of {address}")
            tokenizer = tokenizer_of(folder, of, settings, sources, base)
            tasks = []
            for index in range(number):
                # The workers may have been started in another folder.
                part = {split: documents.absolute() for split, documents in cut(sources, index, number).items()}
                shard = shard_folder(folder.absolute(), index, number)
                tasks.append((shard, part, tokenizer, settings.seed, of))
            count_on_cluster(client, write_missing_shard, tasks)
        if not all(is_of(shard, of) for shard, *_ in tasks):
            raise UsageError(
                f"the workers of {address} have written the shards into {folder.absolute()}, and here they are not: "
                "give an -o in a folder that they share with this machine"
            )
        merge_all(settings, output, sources, base, overwrite=overwrite)


def tokenizer_of(
    folder: Path, of: Mapping[str, Any], settings: PrepareSettings, sources: Sources, base: GivenVocabulary | None
) -> WordTokenizer:
    """Return the tokenizer of the shards in a folder; where sentences end is learned by the first of them."""
    given = base and base.tokenizer
    learn = partial(learn_tokenizer, settings.text, sources, given)
    return learn() if given or not settings.text.needs_sentences else learned_once(folder, of, learn)


def several_sources(settings: PrepareSettings, output: Path) -> Sources:
    """Find the files to read; raise UsageError for what cannot be read in parts."""
    if settings.rows:
        raise UsageError("no shard knows which rows are the first of all inputs together: leave out --rows, or the shards")
    return find_sources(settings, output, in_parts=True)


def merge_all(
    settings: PrepareSettings, output: Path, sources: Sources, base: GivenVocabulary | None, *, overwrite: bool
) -> None:
    """Write the data folder `output` from its shards, atomically; they stay, for they may be merged in another way."""
    folder = shards_folder(output)
    shards = find_shards(folder, description(sources, settings, base))
    recover(folder, NAME.pattern)  # what this machine's killed processes left; another machine's may be running
    log(f"merging {counted(len(shards), 'shard')}")
    number = num_processes(settings, sources)
    with atomic_folder(output, replace=overwrite) as temporary, Workers(number, is_own=True) as workers:
        meta = finish(temporary, merge(temporary, shards, settings, sources, workers.run, base), settings, sources)
    sys.stdout.write(f"{summary(meta, output)}{folder} is needed no more, unless for other splits or another vocabulary\n")
