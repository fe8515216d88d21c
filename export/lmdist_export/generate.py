"""Generate text with a bundle: `lmdist-generate BUNDLE --prompt "The president said"`.

Text goes to stdout, all else to stderr. A text begins after an end mark, as the training text did; it ends at the next one, at
a stop, or after --max-new-tokens tokens. This module turns text into ids and back; sampling/ generates the ids, and options.py
has the options.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.bounds import between, check
from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import log
from lmdist.errors import DataError, UsageError
from lmdist_export.lines import STDIN, Lines, has_input, output_file
from lmdist_export.options import APPLIED, CONTENT, OUTPUT, PARAMS, SAMPLING, GenerationConfig, Options, Row
from lmdist_export.sampling.completion import (
    as_object,
    detokenized,
    generation_config,
    no_search,
    token_sequences,
    warning_of_prompt,
    warnings_of_options,
)

if TYPE_CHECKING:
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.generation import Text
    from lmdist_export.sampling.sampler import Sampler

COMMAND = "lmdist-generate"

Growth = Iterator[tuple["Text", list[int]]]
"""Each text with the tokens that were appended to it; it has ended when it has a finish_reason."""


# --- the command line ----------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog=COMMAND,
        description="Generate text with a bundle written by lmdist-export. Values that are not given are those of the bundle's "
        "generation_config.json; the defaults named here are what lmdist-export writes there.",
        epilog=f"The options are applied in this order: {', '.join(row.flag for row in APPLIED)}. docs/sampling.md has more.",
    )
    parser.add_argument("bundle", type=Path, help="a folder written by lmdist-export")

    content = parser.add_argument_group(CONTENT)
    content.add_argument(
        "--prompt",
        help="text to continue (default: what is piped into stdin, a prompt a line; else none, the beginning of a text)",
    )
    content.add_argument("--prompts-file", metavar="FILE", help=f"one prompt a line; {STDIN} is stdin")
    add_options(content)
    add_options(parser.add_argument_group(SAMPLING))
    output = parser.add_argument_group(OUTPUT)
    output.add_argument("--stream", action="store_true", help="print each word as soon as it is generated")
    output.add_argument("--json", action="store_true", help="a line of JSON for each text, with its finish_reason")
    add_options(output)
    output.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to a file, not to stdout")

    where = parser.add_argument_group("where it runs")
    where.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    where.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: available CPUs, at most 4)")
    where.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts generated at a time (default: 16)")
    return parser


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the table of options that belong to a group."""
    for row in PARAMS.values():
        if row.option.group == group.title:
            group.add_argument(row.flag, help=row.option.help + default_text(row), **argparse_options(row))


def default_text(row: Row) -> str:
    """Return the end of the help of a flag with a number, such as " (default: 0; 0 keeps all)"."""
    if row.default is None or row.is_list or row.type is bool:
        return ""
    note = f"; {row.bounds.note}" if row.bounds and row.bounds.note else ""
    return f" (default: {row.default:g}{note})"


def argparse_options(row: Row) -> dict[str, Any]:
    """Return what argparse needs to know of a flag; None means not given; boolean flags have their default."""
    metavar = {"metavar": row.option.metavar} if row.option.metavar else {}
    if row.type is bool:
        return {"action": argparse.BooleanOptionalAction, "default": True} if row.default else {"action": "store_true"}
    return metavar | ({"action": "append"} if row.is_list else {"type": row.type})


def main(argv: Sequence[str] | None = None) -> None:
    """Generate text, or print in one line why that is not possible."""
    with exit_on_error(COMMAND, ends_with_reader=True):
        arguments = parser().parse_args(argv)
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Read the bundle, generate tokens, write text."""
    options = Options.from_values(vars(arguments), as_flags=True)
    check_arguments(arguments, options)
    with without_garbage_collection():
        # Imported here, since numpy and onnxruntime take longer to import than --help may.
        from lmdist_export.bundle import Bundle
        from lmdist_export.sampling.sampler import Sampler

        bundle = Bundle.load(arguments.bundle)
        config = generation_config(options, bundle)
        stops = token_sequences(options, bundle, "stop")
        for sentence in warnings_of_options(options, bundle):
            log(f"warning: {sentence}", COMMAND)
        if config.num_beams > 1 and arguments.stream:
            raise UsageError(no_search(options, "--stream"))
        sampler = Sampler(bundle, arguments.provider, arguments.threads)
    prompts = Prompts(bundle, arguments)
    growth = generate(sampler, prompts, config, stops, options, arguments)
    if arguments.stream:
        pieces = streamed(bundle, growth, prompts, echo=options.echo)
    else:
        pieces = formatted(sampler, growth, prompts, config, options, as_json=arguments.json)
    began, num_tokens = time.perf_counter(), 0
    with output_file(arguments.output, COMMAND) as output:
        for piece, count in pieces:
            num_tokens += count
            output.write(piece)
            output.flush()
        if prompts.error:
            raise prompts.error
    seconds = time.perf_counter() - began
    where = f" -> {arguments.output}" if arguments.output else ""
    log(f"{num_tokens:,} tokens in {seconds:.2f} s, {num_tokens / seconds:,.0f} tokens/s{where}", COMMAND)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Do not look for garbage inside, nor later in what was imported and opened there and lasts until the end.

    To look through it, then and at the exit, takes as long as the import of onnxruntime.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def check_arguments(arguments: argparse.Namespace, options: Options) -> None:
    """Raise UsageError for mistakes that can be seen before anything is read."""
    check("--batch-size", arguments.batch_size, between(1, 65_536))
    if arguments.prompt is not None and arguments.prompts_file is not None:
        raise UsageError("--prompt and --prompts-file are both given: give one of them")
    if arguments.stream and (options.n > 1 or arguments.prompts_file or arguments.json):
        raise UsageError("--stream prints one text as it is generated: without --n, --prompts-file and --json")
    if options.logprobs is not None and not arguments.json:
        raise UsageError("--logprobs writes into the lines of --json: give --json as well")
    if arguments.output:
        from lmdist.storage.atomic import check_output_file

        check_output_file(arguments.output)


# --- generation ----------------------------------------------------------------------------------------------------


class Prompts:
    """The prompts of a command line, one after the other, as ids."""

    def __init__(self, bundle: Bundle, arguments: argparse.Namespace) -> None:
        self.bundle = bundle
        self.lines: Iterable[str] = [arguments.prompt or ""]
        if arguments.prompts_file is not None:
            self.lines = Lines([arguments.prompts_file], COMMAND)
        elif arguments.prompt is None and has_input(sys.stdin):
            log('prompts are read from stdin, one a line; --prompt "" begins a text without one', COMMAND)
            self.lines = from_stdin(stream=arguments.stream)
        self.words: list[list[str]] = []
        """The words of each prompt that was read."""
        self.error: DataError | None = None
        """Why the next prompt could not be read: an error of the command once the texts before it are written."""

    def __iter__(self) -> Iterator[list[int]]:
        try:
            for line in self.lines:
                words = self.bundle.tokenizer.tokenize(line, continues=True) if line else []  # NLTK is slow to import
                if sentence := warning_of_prompt(words, self.bundle):
                    log(f"warning: {sentence}", COMMAND)
                self.words.append(words)
                yield self.bundle.vocabulary.encode(words)
        except DataError as error:
            self.error = error


def from_stdin(*, stream: bool) -> Iterator[str]:
    """Yield the prompts that were piped into the command, or an empty one; with `stream` there may be only one."""
    number = -1
    for number, line in enumerate(Lines([STDIN], COMMAND)):
        if number and stream:
            raise DataError("--stream prints one text, and stdin has several lines: a prompt is expected")
        yield line
    if number < 0:
        yield ""


def generate(
    sampler: Sampler,
    prompts: Prompts,
    config: GenerationConfig,
    stops: list[list[int]],
    options: Options,
    arguments: argparse.Namespace,
) -> Growth:
    """Yield the texts that continue each prompt as they grow: sampled, or found by beam search."""
    if config.num_beams > 1:
        from lmdist_export.sampling.beam_search import beam_search

        for number, prompt in enumerate(prompts):
            for text in beam_search(sampler, prompt, config, options.n, stops, options.ignore_eos):
                found = dataclasses.replace(text, prompt_number=number)
                warn_of_exhausted(found)
                yield found, found.tokens
        return
    from lmdist_export.sampling.generation import continuations

    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    if options.seed is None and not config.greedy:
        log(f"seed {seed}", COMMAND)
    for text, tokens in continuations(
        sampler,
        prompts,
        config,
        seed,
        options.n,
        stops,
        ignore_end=options.ignore_eos,
        batch_size=arguments.batch_size,
        stream=arguments.stream,
    ):
        warn_of_exhausted(text)
        yield text, tokens


def warn_of_exhausted(text: Text) -> None:
    """Report a text that ended before its length because no token was allowed, by the names that --json has for it."""
    if text.finish_reason == "exhausted":
        log(
            f"warning: prompt_number {text.prompt_number}, index {text.number} ends after {len(text.tokens)} tokens: "
            "all others would repeat a sequence, are bad or suppressed",
            COMMAND,
        )


# --- writing: pieces of text, and how many tokens were generated for each ------------------------------------------


def streamed(bundle: Bundle, growth: Growth, prompts: Prompts, *, echo: bool) -> Iterator[tuple[str, int]]:
    """Yield the one text that grows, word by word, each with its leading space, if any."""
    first = next(growth)  # the prompt has been read then
    prompt = prompts.words[0]
    words = (bundle.vocabulary.words[token] for _, new in chain([first], growth) for token in new)
    pieces = bundle.tokenizer.pieces(chain(prompt, words))
    for piece in islice(pieces, len(prompt)):
        if echo:
            yield piece, 0
    if not echo:
        yield from ((piece.removeprefix(" "), 1) for piece in islice(pieces, 1))
    yield from ((piece, 1) for piece in pieces)
    yield "\n", 0


def formatted(
    sampler: Sampler, growth: Growth, prompts: Prompts, config: GenerationConfig, options: Options, *, as_json: bool
) -> Iterator[tuple[str, int]]:
    """Yield each text once it has ended, in the order of the prompts: as a line of JSON, or below a line with its number."""
    ended = (text for text, _ in growth if text.finish_reason)
    for text in ended if config.num_beams > 1 else in_order(ended, options.n):
        prompt = prompts.words[text.prompt_number]
        if as_json:
            yield json.dumps(as_object(sampler, text, prompt, options), ensure_ascii=False) + "\n", len(text.tokens)
            continue
        place = text.prompt_number * options.n + text.number
        head = f"\n===== {place + 1} =====\n\n" if place else ""
        yield f"{head}{detokenized(sampler.bundle, text, prompt, echo=options.echo)}\n", len(text.tokens)


def in_order(texts: Iterable[Text], n: int) -> Iterator[Text]:
    """Yield texts in the order of their prompts, and the `n` of each by their number, each as soon as those before it are.

    At Ctrl-C those that wait for others are yielded too.
    """
    waiting: dict[int, Text] = {}
    turn = 0
    try:
        for text in texts:
            waiting[text.prompt_number * n + text.number] = text
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1
    except KeyboardInterrupt:
        yield from (waiting[place] for place in sorted(waiting))
        raise


if __name__ == "__main__":
    main()
