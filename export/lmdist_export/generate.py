"""Text from a bundle: `lmdist-generate BUNDLE --prompt "The president said"`.

Text goes to stdout, all else to stderr. A text begins after an end mark, as the training text did; it ends at the next one
or after --max-new-tokens words. This module knows no model and draws no word: sampler.py and sampling.py do.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from lmdist.errors import CommandParser, UsageError, report
from lmdist.vocabulary import UNKNOWN, UNKNOWN_ID, Vocabulary

if TYPE_CHECKING:
    from lmdist_export.bundle import GenerationConfig
    from lmdist_export.sampler import Sampler
    from lmdist_export.sampling import Draw


def parser() -> argparse.ArgumentParser:
    """The command line of lmdist-generate."""
    made = CommandParser(
        prog="lmdist-generate",
        description="Write text with a bundle made by lmdist-export. Values that are not given are those of the bundle's "
        "generation_config.json; the defaults named here are what lmdist-export writes there.",
        epilog="The words that may follow are narrowed in this order: suppressed words, temperature, top-k, top-p.",
    )
    made.add_argument("bundle", type=Path, help="a folder made by lmdist-export")
    made.add_argument("--prompt", default="", help="text to go on from (default: none, the beginning of a text)")
    made.add_argument("--max-new-tokens", type=int, metavar="N", help="words to write, at most (default: 200)")
    made.add_argument(
        "--temperature", type=float, metavar="X", help="below 1 safer, above 1 wilder, 0 always the likeliest (default: 1)"
    )
    made.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest words (default: 0, from all)")
    made.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest words of joint probability P (default: 1, from all)"
    )
    made.add_argument("--seed", type=int, help="the same seed gives the same text (default: drawn, and printed)")
    made.add_argument("--n", type=int, default=1, help="how many texts to write (default: 1)")
    made.add_argument("--stream", action="store_true", help="print each word as it comes")
    made.add_argument("--allow-unk", action="store_true", help="let the model write <unk>")
    made.add_argument("--ignore-eos", action="store_true", help="go on after the end of a text, with the next one")
    made.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default: cpu)")
    made.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: the cores, at most 4)")
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the text to a file, not to stdout")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Write text, or say in one line why not."""
    arguments = parser().parse_args(argv)
    with report("lmdist-generate"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Read the bundle, make the words, write the text."""
    check(arguments)
    # Only now: numpy and onnxruntime take longer to import than --help may.
    from lmdist.files import write_whole
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampler import Sampler
    from lmdist_export.sampling import Draw

    bundle = Bundle.load(arguments.bundle)
    tokenizer = bundle.tokenizer
    config = generation_config(bundle.generation, arguments)
    sampler = Sampler(bundle, arguments.provider, arguments.threads)
    prompt = tokenizer.tokenize(arguments.prompt) if arguments.prompt else []  # NLTK is slow to import
    warn_of_unknown(prompt, bundle.vocabulary)
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    if arguments.seed is None and not config.greedy:
        say(f"seed {seed}")

    began = time.perf_counter()
    words = continuations(sampler, config, prompt, Draw(config, seed, arguments.n), arguments.n, arguments.ignore_eos)
    if arguments.stream:
        pieces = []
        for piece in tokenizer.pieces(chain(prompt, (word for _, word in words))):
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        text, made = "".join(pieces) + "\n", len(pieces) - len(prompt)
    else:
        texts = [list(prompt) for _ in range(arguments.n)]
        for row, word in words:
            texts[row].append(word)
        text = separated([tokenizer.detokenize(text) for text in texts])
        made = sum(len(text) - len(prompt) for text in texts)
    seconds = time.perf_counter() - began

    if arguments.output:
        write_whole(arguments.output, text)
    elif not arguments.stream:
        sys.stdout.write(text)
        sys.stdout.flush()
    where = f" -> {arguments.output}" if arguments.output else ""
    say(f"{made:,} words in {seconds:.2f} s, {made / seconds:,.0f} words/s{where}")


def check(arguments: argparse.Namespace) -> None:
    """Raise for what can be known to be wrong before anything is read."""
    if arguments.n < 1:
        raise UsageError(f"--n is {arguments.n}; it must be at least 1")
    if arguments.stream and arguments.n > 1:
        raise UsageError(f"--stream prints one text as it comes, and --n is {arguments.n}: give one or the other")
    if arguments.seed is not None and arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}; it must not be negative")
    output = arguments.output
    if output and output.exists() and not output.is_file():
        # Not a device either: the file is written aside and renamed, which would replace it.
        raise UsageError(f"-o {output} is not a file; a file's name is expected")
    if output and not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise UsageError(f"-o {output}: nothing can be written in {output.parent}; make it first, or give another name")


def generation_config(config: GenerationConfig, arguments: argparse.Namespace) -> GenerationConfig:
    """The bundle's values, and above them those of the command line."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    values = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "temperature" in values:
        values["do_sample"] = values["temperature"] > 0
    if arguments.allow_unk:
        values["suppress_tokens"] = tuple(index for index in config.suppress_tokens if index != UNKNOWN_ID)
    return dataclasses.replace(config, **values)


def warn_of_unknown(prompt: Sequence[str], vocabulary: Vocabulary) -> None:
    """Name the words of the prompt that the model has never seen."""
    unknown = list(dict.fromkeys(word for word in prompt if word not in vocabulary.ids))
    if not unknown:
        return
    known = [word.lower() for word in unknown if word.lower() in vocabulary.ids]
    hint = f"; known in small letters: {', '.join(known)}" if known else ""
    say(f"warning: not in the vocabulary, and read as {UNKNOWN}: {', '.join(unknown)}{hint}")


def continuations(
    sampler: Sampler,
    config: GenerationConfig,
    prompt: Sequence[str],
    draw: Draw,
    rows: int,
    ignore_eos: bool,
) -> Iterator[tuple[int, str]]:
    """Yield (row, word) as the texts after `prompt` grow, each until its end mark or `max_new_tokens` words."""
    vocabulary = sampler.bundle.vocabulary
    context = [config.bos_token_id, *vocabulary.encode(prompt)]
    going = list(range(rows))
    for ids in islice(sampler.generate(context, draw, rows), config.max_new_tokens):
        if not ignore_eos:
            going = [row for row in going if ids[row] != config.eos_token_id]
        if not going:
            return
        for row in going:
            yield row, vocabulary.words[ids[row]]


def separated(texts: Sequence[str]) -> str:
    """All texts, with a line between two that says which comes next."""
    result = f"{texts[0]}\n"
    for number, text in enumerate(texts[1:], start=2):
        result += f"\n===== {number} of {len(texts)} =====\n\n{text}\n"
    return result


def say(line: str) -> None:
    """Say on stderr what is going on."""
    sys.stderr.write(f"lmdist-generate: {line}\n")


if __name__ == "__main__":
    main()
