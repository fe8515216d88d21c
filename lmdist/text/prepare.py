"""From text to a data folder: `lmdist-prepare articles1.csv [MORE ...] -o data/news`.

    documents.py           counting.py            merging.py, corpus.py          token_writer.py
    the text, in parts --> count: a shard each -> merge: splits, vocabulary ---> encode: token files

One process has one shard, worker processes one each (workers.py), and on several machines they lie in a folder that is shared
(machines.py). The data folder is the same, byte for byte. Here are the command, and the order of the work on one machine. This
module does not know about models. Its imports are light, for worker processes import it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import next_line, unused_path
from lmdist.errors import UsageError
from lmdist.settings import SPLITS, PrepareSettings
from lmdist.storage.atomic import atomic_folder
from lmdist.text.data_folder import TEXT
from lmdist.text.inputs import NOTHING, find_sources, imports_of, learn_tokenizer, num_processes, with_given_words
from lmdist.text.outputs import check_output, errors_of_writing, finish
from lmdist.text.reports import announce, reading_progress, summary

if TYPE_CHECKING:
    from lmdist.text.counting import Sources
    from lmdist.text.given_vocabulary import GivenVocabulary
    from lmdist.text.workers import Workers

COMMAND = "lmdist-prepare"


def prepare(
    settings: PrepareSettings,
    output: Path,
    *,
    overwrite: bool = False,
    flag: str = "-o",
    given: Mapping[str, Any] = NOTHING,
) -> None:
    """Write the data folder `output`, which `flag` names, atomically; `given` are the settings that were given by hand."""
    check_output(output, flag, overwrite=overwrite)
    meta = write(settings, output, overwrite=overwrite, given=given)
    sys.stdout.write(summary(meta, output))
    sys.stdout.flush()


def write(
    settings: PrepareSettings,
    output: Path,
    sources: Sources | None = None,
    *,
    overwrite: bool,
    given: Mapping[str, Any],
    is_own: bool = True,
) -> dict[str, Any]:
    """Write a data folder of the sources, by default those that the settings name; return the content of meta.json.

    `is_own`: the process is lmdist's and runs nothing else (workers.py).
    """
    from lmdist.text.workers import Workers

    settings, base = with_given_words(settings, given)
    with errors_of_writing(output):
        sources = sources or find_sources(settings, output)
        announce(sources, output)
        number = num_processes(settings, sources)
        with Workers(number, imports_of(settings, sources), is_own=is_own) as workers:
            for documents in sources.values():  # while the workers' modules are imported
                documents.check()
            with atomic_folder(output, replace=overwrite) as folder:
                return write_data_folder(folder, settings, sources, base, workers)


def write_data_folder(
    folder: Path, settings: PrepareSettings, sources: Sources, base: GivenVocabulary | None, workers: Workers
) -> dict[str, Any]:
    """Write the files of a data folder, its words those of the `base` if there is one; return the content of meta.json."""
    from lmdist.text.counting import cut_evenly
    from lmdist.text.merging import merge

    place = folder / "shards"
    parts = cut_evenly(sources, workers.number)
    tasks = [(place / str(index), part, settings.seed) for index, part in enumerate(parts)]
    for shard, *_ in tasks:
        shard.mkdir(parents=True)
    size = sum(documents.bytes for documents in sources.values())
    learn = partial(learn_tokenizer, settings.text, sources, base and base.tokenizer)
    with reading_progress(size) as progress:
        workers.count(tasks, learn, place / TEXT, progress.show)
    merged = merge(folder, [shard for shard, *_ in tasks], settings, sources, workers.run, base)
    shutil.rmtree(place)
    return finish(folder, merged, settings, sources)


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
    shards = built.add_argument_group(
        "several machines",
        "Give the same inputs and flags on all of them. The shards lie in FOLDER.shards, which they share.",
    )
    several = shards.add_mutually_exclusive_group()
    several.add_argument(
        "--shard", type=shard_number, metavar="I/N", help="count shard I of N, 0/N to N-1/N, unless it is done, and do no more"
    )
    several.add_argument("--merge", action="store_true", help="write the data folder from its shards")
    several.add_argument(
        "--scheduler",
        metavar="tcp://HOST:8786",
        help="have the workers of a Dask cluster count the shards, and merge them here",
    )
    shards.add_argument(
        "--shards",
        type=number_of_shards,
        metavar="N",
        help="so many for --scheduler; default: two for each thread of its workers",
    )
    return built


def shard_number(text: str) -> tuple[int, int]:
    """Return which of how many shards `I/N` names."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is given; I/N is expected, from 0/16 to 15/16 for 16 shards")
    return int(match[1]), int(match[2])


def number_of_shards(text: str) -> int:
    """Return the number that a text is, from 1."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text} is given; a number of shards is expected, such as 16")
    return int(text)


def resolve(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> tuple[PrepareSettings, Mapping[str, Any]]:
    """Return the settings, defaults < [prepare] of a recipe < flags, and those that were given by hand.

    Flags that name inputs replace the splits of the recipe, and the other way round. A min_count that was given contradicts
    unknown = file; the default does not.
    """
    from lmdist.config import by_hand

    values, given = dict(recipe), {**by_hand(recipe), **flags}
    if "inputs" in flags:
        values = {key: value for key, value in values.items() if key not in SPLITS}
    elif "train" in flags:
        values.pop("inputs", None)
    values |= flags
    if values.get("unknown") == "file" and given.get("min_count", 1) > 1:
        raise UsageError("min_count creates unknown words, and unknown is file: give one or the other")
    if values.get("vocabulary") and "min_count" in given and not values.get("extend"):
        raise UsageError("min_count is of new words, and vocabulary takes none without extend: give extend as well")
    settings = PrepareSettings(**values)
    settings.check_min_count(flags if "tokenizer" in flags else given)  # a recipe's own min_count is of its own tokenizer
    return settings, given


def main(argv: Sequence[str] | None = None) -> None:
    """Write a data folder, or a shard of one."""
    with exit_on_error(COMMAND):
        from lmdist.config import read_section

        flags = vars(parser().parse_args(argv))
        output, overwrite, recipe = (flags.pop(name) for name in ("output", "overwrite", "recipe"))
        shard, merge, scheduler, number = (flags.pop(name, None) for name in ("shard", "merge", "scheduler", "shards"))
        if number and not scheduler:
            raise UsageError("--shards is of --scheduler: elsewhere give --shard I/N, or --workers")
        if not flags.get("inputs"):
            flags.pop("inputs", None)
        of_recipe = read_section(recipe, "prepare", PrepareSettings) if recipe is not None else {}
        settings, given = resolve(of_recipe, flags)
        if shard or merge or scheduler:
            from lmdist.text import machines

            if shard:
                machines.prepare_shard(settings, output, *shard, given=given)
                return
            check_output(output, "-o", overwrite=overwrite)
            if scheduler:
                machines.prepare_on_cluster(settings, output, scheduler, number, overwrite=overwrite, given=given)
            else:
                machines.merge_shards(settings, output, overwrite=overwrite, given=given)
        else:
            prepare(settings, output, overwrite=overwrite, given=given)
        name = output.resolve().name
        train = ["lmdist-train", *(["--config", recipe] if recipe else []), "--data.folder", output]
        sys.stdout.write(f"{next_line([*train, '--run_folder', unused_path(Path('runs') / name)])}\n")


if __name__ == "__main__":
    main()
