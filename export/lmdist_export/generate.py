"""Text from a bundle: `lmdist-generate BUNDLE --prompt "The president said"`.

Text goes to stdout, all else to stderr. A text begins after an end mark, as the training text did; it ends at the next one, at
a stop, or after --max-new-tokens words. This module turns text into ids and back: generation.py and beam.py make the words.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from lmdist.errors import CommandParser, DataError, UsageError, exit_on_error
from lmdist.text.vocabulary import UNKNOWN, Vocabulary
from lmdist_export.lines import Lines
from lmdist_export.sampling.completion import Options, as_object, readable

if TYPE_CHECKING:
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.generation import Text


class Flags(Options):
    """Options as they are given on the command line."""

    def called(self, name: str) -> str:
        """The flag."""
        return f"--{name.replace('_', '-')}"


def parser() -> argparse.ArgumentParser:
    """The command line of lmdist-generate."""
    made = CommandParser(
        prog="lmdist-generate",
        description="Write text with a bundle made by lmdist-export. Values that are not given are those of the bundle's "
        "generation_config.json; the defaults named here are what lmdist-export writes there.",
        epilog="What may follow is narrowed in this order: logit bias, bad and suppressed words, repetition penalty, presence "
        "and frequency penalty, temperature, top-k, top-p, min-p, typical-p. docs/sampling.md says what each does.",
    )
    made.add_argument("bundle", type=Path, help="a folder made by lmdist-export")

    what = made.add_argument_group("what to write")
    what.add_argument("--prompt", help="text to go on from (default: none, the beginning of a text)")
    what.add_argument("--prompts-file", metavar="FILE", help="one prompt a line; - is stdin")
    what.add_argument("--n", type=int, default=1, help="how many texts to write for each prompt (default: 1)")
    what.add_argument("--max-new-tokens", type=int, metavar="N", help="words to write, at most (default: 200)")
    what.add_argument("--min-new-tokens", type=int, metavar="N", help="words before a text may end (default: 0)")
    what.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before these words; may be given several times"
    )
    what.add_argument("--ignore-eos", action="store_true", help="go on after the end of a text, with the next one")

    draw = made.add_argument_group("how words are drawn")
    draw.add_argument("--seed", type=int, help="the same seed gives the same text (default: drawn, and printed)")
    draw.add_argument(
        "--temperature", type=float, metavar="X", help="below 1 safer, above 1 wilder, 0 always the likeliest (default: 1)"
    )
    draw.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest words (default: 0, from all)")
    draw.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest likeliest words of joint probability P (default: 1, from all)",
    )
    draw.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from words with at least P of the likeliest one's probability (default: 0)",
    )
    draw.add_argument(
        "--typical-p",
        type=float,
        metavar="P",
        help="draw from words whose surprise is near the mean, of joint probability P (default: 1)",
    )
    draw.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: words of the prompt and the text are less likely (default: 1)",
    )
    draw.add_argument(
        "--presence-penalty", type=float, metavar="X", help="taken from the logit of a word that the text has (default: 0)"
    )
    draw.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="the same for each time the text has it (default: 0)"
    )
    draw.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help="no N words come twice in a row (default: 0, any may)"
    )
    draw.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        metavar="WORD=X",
        help="add X to a word's logit; may be given several times",
    )
    draw.add_argument(
        "--bad-words",
        action="append",
        default=[],
        metavar="TEXT",
        help="words that never come in a row; may be given several times",
    )
    draw.add_argument("--allow-unk", action="store_true", help="let the model write <unk>")
    draw.add_argument(
        "--num-beams", type=int, metavar="K", help="search for the likeliest text with K beams, drawing nothing (default: 1)"
    )
    draw.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="of the search: above 1 for longer texts, below for shorter (default: 1)",
    )

    out = made.add_argument_group("how it is written")
    out.add_argument("--stream", action="store_true", help="print each word as it comes")
    out.add_argument("--json", action="store_true", help="a line of JSON for each text, with its finish_reason")
    out.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="with --json: the log-probability of each word, and the K likeliest in its place",
    )
    out.add_argument(
        "--echo", action=argparse.BooleanOptionalAction, default=True, help="begin a text with its prompt (default: yes)"
    )
    out.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to a file, not to stdout")

    where = made.add_argument_group("where it runs")
    where.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    where.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: the cores, at most 4)")
    where.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts made at a time (default: 16)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Write text, or say in one line why not."""
    arguments = parser().parse_args(argv)
    with exit_on_error("lmdist-generate"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Read the bundle, make the words, write the text."""
    options = Flags(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Flags)})
    check(arguments)
    # Only now: numpy and onnxruntime take longer to import than --help may.
    from lmdist.storage.atomic import atomic_file
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.beam_search import beam_search
    from lmdist_export.sampling.generation import continuations
    from lmdist_export.sampling.sampler import Sampler

    bundle = Bundle.load(arguments.bundle)
    config = options.generation_config(bundle)
    if config.num_beams > 1 and arguments.stream:
        raise UsageError(options.no_search("--stream"))
    stops = options.stops(bundle)
    sampler = Sampler(bundle, arguments.provider, arguments.threads)
    lines = [arguments.prompt or ""] if arguments.prompts_file is None else Lines([arguments.prompts_file], say)
    prompts: dict[int, list[str]] = {}
    unread: list[DataError] = []
    """Why prompts could not be read, said when the texts of those before them are written."""
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    if arguments.seed is None and not config.greedy and config.num_beams == 1:
        say(f"seed {seed}")

    def encoded() -> Iterator[list[int]]:
        try:
            for number, line in enumerate(lines):
                words = bundle.tokenizer.tokenize(line) if line else []  # NLTK is slow to import
                warn_of_unknown(words, bundle.vocabulary)
                prompts[number] = words
                yield bundle.vocabulary.encode(words)
        except DataError as error:
            unread.append(error)

    def made_words() -> Iterator[tuple[Text, list[int]]]:
        if config.num_beams > 1:
            for number, prompt in enumerate(encoded()):
                for text in beam_search(sampler, prompt, config, arguments.n, stops, arguments.ignore_eos):
                    yield dataclasses.replace(text, prompt_number=number), text.words
            return
        how = {"ignore_end": arguments.ignore_eos, "batch_size": arguments.batch_size, "stream": arguments.stream}
        yield from continuations(sampler, encoded(), config, seed, arguments.n, stops, **how)

    def grown() -> Iterator[tuple[Text, list[int]]]:
        for text, words in made_words():
            warn_of_exhausted(text)
            yield text, words

    began, made = time.perf_counter(), 0
    with atomic_file(arguments.output) if arguments.output else nullcontext(sys.stdout) as out:
        if arguments.stream:
            for piece in streamed(bundle, grown(), prompts, echo=arguments.echo):
                made += 1
                out.write(piece)
                out.flush()
            made -= len(prompts[0]) if arguments.echo else 0
            out.write("\n")
        else:
            done = (text for text, _ in grown() if text.finish_reason)
            for text in done if config.num_beams > 1 else in_order(done, arguments.n):
                made += len(text.words)
                words = prompts[text.prompt_number]
                out.write(
                    json.dumps(as_object(sampler, text, words, options), ensure_ascii=False) + "\n"
                    if arguments.json
                    else plain(bundle, text, words, arguments)
                )
                out.flush()
        if unread:
            raise unread[0]
    seconds = time.perf_counter() - began
    where = f" -> {arguments.output}" if arguments.output else ""
    say(f"{made:,} words in {seconds:.2f} s, {made / seconds:,.0f} words/s{where}")


def check(arguments: argparse.Namespace) -> None:
    """Raise for what can be known to be wrong before anything is read."""
    if arguments.batch_size < 1:
        raise UsageError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    if arguments.prompt is not None and arguments.prompts_file is not None:
        raise UsageError("--prompt and --prompts-file are both given: give one of them")
    if arguments.stream and (arguments.n > 1 or arguments.prompts_file or arguments.json):
        raise UsageError("--stream prints one text as it comes: without --n, --prompts-file and --json")
    if arguments.logprobs is not None and not arguments.json:
        raise UsageError("--logprobs writes into the lines of --json: give --json as well")
    if arguments.output:
        from lmdist.storage.atomic import check_output_file

        check_output_file(arguments.output)


def warn_of_unknown(prompt: Sequence[str], vocabulary: Vocabulary) -> None:
    """Name the words of the prompt that the model has never seen."""
    unknown = list(dict.fromkeys(word for word in prompt if word not in vocabulary.ids))
    if not unknown:
        return
    known = [word.lower() for word in unknown if word.lower() in vocabulary.ids]
    hint = f"; known in small letters: {', '.join(known)}" if known else ""
    say(f"warning: not in the vocabulary, and read as {UNKNOWN}: {', '.join(unknown)}{hint}")


def warn_of_exhausted(text: Text) -> None:
    """Say that a text is shorter than it was to be, by the names that --json gives it."""
    if text.finish_reason == "exhausted":
        say(
            f"warning: prompt_number {text.prompt_number}, index {text.number} ends after {len(text.words)} words: "
            "all others would repeat a sequence, are bad or suppressed"
        )


# --- writing -------------------------------------------------------------------------------------------------------


def streamed(
    bundle: Bundle, grown: Iterator[tuple[Text, list[int]]], prompts: dict[int, list[str]], *, echo: bool
) -> Iterator[str]:
    """The pieces of the one text that grows: each word as it comes, with the blank before it where there is one."""
    first = next(grown)
    words = (bundle.vocabulary.words[index] for _, new in chain([first], grown) for index in new)
    pieces = bundle.tokenizer.pieces(chain(prompts[0], words))
    if echo:
        yield from pieces
    else:
        after = islice(pieces, len(prompts[0]), None)
        yield next(after, "").removeprefix(" ")
        yield from after


def in_order(texts: Iterable[Text], n: int) -> Iterator[Text]:
    """Texts in the order of their prompts, and the `n` of each by their number, each as soon as it is its turn.

    At Ctrl-C those that wait for others come as well.
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


def plain(bundle: Bundle, text: Text, prompt: Sequence[str], arguments: argparse.Namespace) -> str:
    """A text for people, and before all but the first a line that says which it is."""
    place = text.prompt_number * arguments.n + text.number
    head = "" if place == 0 else f"\n===== {place + 1} =====\n\n"
    return f"{head}{readable(bundle, text, prompt, echo=arguments.echo)}\n"


def say(line: str) -> None:
    """Say on stderr what is going on."""
    sys.stderr.write(f"lmdist-generate: {line}\n")


if __name__ == "__main__":
    main()
