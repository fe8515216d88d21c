"""Generate text with a bundle: `lmdist-generate BUNDLE --prompt "The president said"`.

Text goes to stdout, all else to stderr. A text begins after an end mark, as the training text did; it ends at the next one, at
a stop, or after --max-new-tokens tokens. This module reads prompts and writes texts; api.py loads the model, sampling/
generates, and options.py has the options.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.bounds import check
from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import log
from lmdist.counted import counted
from lmdist.errors import DataError, UsageError
from lmdist_export.api import BUNDLE, load
from lmdist_export.lines import STDIN, Lines, has_input, output_file
from lmdist_export.options import APPLIED, BATCH_SIZES, CONTENT, OUTPUT, PARAMS, SAMPLING, THREADS, Options, Row
from lmdist_export.sampling.completion import Completion, Stream, completions
from lmdist_export.sampling.resolved_options import ResolvedOptions, resolve, warning_of_prompt

if TYPE_CHECKING:
    from lmdist_export.api import Model
    from lmdist_export.sampling.prompt import Prompt

COMMAND = "lmdist-generate"


# --- the command line ----------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog=COMMAND,
        description="Generate text with a bundle written by lmdist-export. Values that are not given are those of the bundle's "
        "generation_config.json; the defaults named here are what lmdist-export writes there.",
        epilog=f"The options are applied in this order: {', '.join(row.flag for row in APPLIED)}. docs/sampling.md has more.",
    )
    parser.add_argument("bundle", help=BUNDLE)

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
        model = load(arguments.bundle, provider=arguments.provider, threads=arguments.threads)
        resolved = resolve(options, model.bundle, stream=arguments.stream)
    for sentence in resolved.warnings:
        log(f"warning: {sentence}", COMMAND)
    prompts = Prompts(model, arguments)
    pieces = streamed(model, prompts, resolved) if arguments.stream else formatted(model, prompts, resolved, arguments)
    if resolved.seed is not None and options.seed is None:
        log(f"seed {resolved.seed}", COMMAND)
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
    log(f"{counted(num_tokens, 'token')} in {seconds:.2f} s, {num_tokens / seconds:,.0f} tokens/s{where}", COMMAND)


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
    check("--batch-size", arguments.batch_size, BATCH_SIZES)
    check("--threads", arguments.threads, THREADS)
    if arguments.prompt is not None and arguments.prompts_file is not None:
        raise UsageError("--prompt and --prompts-file are both given: give one of them")
    if arguments.stream and (options.n > 1 or arguments.prompts_file or arguments.json):
        raise UsageError("--stream prints one text as it is generated: without --n, --prompts-file and --json")
    if options.logprobs is not None and not arguments.json:
        raise UsageError("--logprobs writes into the lines of --json: give --json as well")
    if arguments.output:
        from lmdist.storage.atomic import check_output_file

        check_output_file(arguments.output)


# --- prompts and texts ---------------------------------------------------------------------------------------------


class Prompts:
    """The prompts of a command line, one after the other."""

    def __init__(self, model: Model, arguments: argparse.Namespace) -> None:
        self.model = model
        self.lines: Iterable[str] = [arguments.prompt or ""]
        if arguments.prompts_file is not None:
            self.lines = Lines([arguments.prompts_file], COMMAND)
        elif arguments.prompt is None and has_input(sys.stdin):
            log('prompts are read from stdin, one a line; --prompt "" begins a text without one', COMMAND)
            self.lines = from_stdin(stream=arguments.stream)
        self.error: DataError | None = None
        """Why the next prompt could not be read: an error of the command once the texts before it are written."""

    def __iter__(self) -> Iterator[Prompt]:
        try:
            for line in self.lines:
                prompt = self.model.prompt(line)
                if sentence := warning_of_prompt(prompt, self.model.bundle):
                    log(f"warning: {sentence}", COMMAND)
                yield prompt
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


def streamed(model: Model, prompts: Prompts, resolved: ResolvedOptions) -> Iterator[tuple[str, int]]:
    """Yield the pieces of the one text, and at its end the number of its tokens."""
    for prompt in list(prompts):
        stream = Stream(model.sampler, prompt, resolved)
        yield from ((piece, 0) for piece in stream)
        assert stream.completion
        warn_of_exhausted(stream.completion)
        yield "\n", len(stream.completion.tokens)


def formatted(
    model: Model, prompts: Prompts, resolved: ResolvedOptions, arguments: argparse.Namespace
) -> Iterator[tuple[str, int]]:
    """Yield each text, as a line of JSON or below a line with its number, and the number of its tokens."""
    for text in completions(model.sampler, prompts, resolved, arguments.batch_size):
        warn_of_exhausted(text)
        place = text.prompt_number * resolved.options.n + text.index
        head = f"\n===== {place + 1} =====\n\n" if place else ""
        written = json.dumps(text.as_object(), ensure_ascii=False) if arguments.json else f"{head}{text.text}"
        yield f"{written}\n", len(text.tokens)


def warn_of_exhausted(text: Completion) -> None:
    """Report a text that ended before its length because no token was allowed, by the names that --json has for it."""
    if text.finish_reason == "exhausted":
        log(
            f"warning: prompt_number {text.prompt_number}, index {text.index} ends after {counted(len(text.tokens), 'token')}: "
            "all others would repeat a sequence, are bad or suppressed",
            COMMAND,
        )


if __name__ == "__main__":
    main()
