"""Text from a bundle: `lmdist-generate BUNDLE --prompt "The president said"`.

Text goes to stdout, all else to stderr. A text begins after an end mark, as the training text did; it ends at the next one, at
a stop, or after --max-new-tokens words. This module turns text into ids and back: generation.py and beam.py make the words.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.errors import CommandParser, UsageError, report
from lmdist.vocabulary import UNKNOWN, UNKNOWN_ID, Vocabulary
from lmdist_export.lines import Lines

if TYPE_CHECKING:
    from lmdist_export.bundle import Bundle, GenerationConfig
    from lmdist_export.generation import Text
    from lmdist_export.sampler import Sampler

# Flags that are fields of generation_config.json; the first have no say in a search.
DRAWN = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
NUMBERS = (*DRAWN, "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "length_penalty")


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
    with report("lmdist-generate"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Read the bundle, make the words, write the text."""
    check(arguments)
    # Only now: numpy and onnxruntime take longer to import than --help may.
    from lmdist.files import whole_file
    from lmdist_export.beam import beam_search
    from lmdist_export.bundle import Bundle
    from lmdist_export.generation import continuations
    from lmdist_export.sampler import Sampler

    bundle = Bundle.load(arguments.bundle)
    config = generation_config(bundle, arguments)
    stops = [known_words(bundle, stop, "--stop") for stop in arguments.stop]
    sampler = Sampler(bundle, arguments.provider, arguments.threads)
    lines = [arguments.prompt or ""] if arguments.prompts_file is None else Lines([arguments.prompts_file], say)
    prompts: dict[int, list[str]] = {}
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    if arguments.seed is None and not config.greedy and config.num_beams == 1:
        say(f"seed {seed}")

    def encoded() -> Iterator[list[int]]:
        for number, line in enumerate(lines):
            words = bundle.tokenizer.tokenize(line) if line else []  # NLTK is slow to import
            warn_of_unknown(words, bundle.vocabulary)
            prompts[number] = words
            yield bundle.vocabulary.encode(words)

    def grown() -> Iterator[tuple[Text, list[int]]]:
        if config.num_beams > 1:
            for number, prompt in enumerate(encoded()):
                for text in beam_search(sampler, prompt, config, arguments.n, stops, arguments.ignore_eos):
                    yield dataclasses.replace(text, prompt_number=number), text.words
            return
        options = {"ignore_end": arguments.ignore_eos, "batch_size": arguments.batch_size, "stream": arguments.stream}
        yield from continuations(sampler, encoded(), config, seed, arguments.n, stops, **options)

    began, made = time.perf_counter(), 0
    with whole_file(arguments.output) if arguments.output else nullcontext(sys.stdout) as out:
        if arguments.stream:
            for piece in streamed(bundle, grown(), prompts, echo=arguments.echo):
                made += 1
                out.write(piece)
                out.flush()
            made -= len(prompts[0]) if arguments.echo else 0
            out.write("\n")
        else:
            done = (text for text, _ in grown() if text.finish_reason)
            for place, text in enumerate(done if config.num_beams > 1 else in_order(done, arguments.n)):
                made += len(text.words)
                words = prompts[text.prompt_number]
                out.write(
                    json_line(sampler, text, words, arguments)
                    if arguments.json
                    else plain(bundle, place, text, words, arguments)
                )
                out.flush()
    seconds = time.perf_counter() - began
    where = f" -> {arguments.output}" if arguments.output else ""
    say(f"{made:,} words in {seconds:.2f} s, {made / seconds:,.0f} words/s{where}")


def check(arguments: argparse.Namespace) -> None:
    """Raise for what can be known to be wrong before anything is read."""
    for flag, value in (("--n", arguments.n), ("--batch-size", arguments.batch_size)):
        if value < 1:
            raise UsageError(f"{flag} is {value}; it must be at least 1")
    if arguments.prompt is not None and arguments.prompts_file is not None:
        raise UsageError("--prompt and --prompts-file are both given: give one of them")
    if arguments.stream and (arguments.n > 1 or arguments.prompts_file or arguments.json):
        raise UsageError("--stream prints one text as it comes: without --n, --prompts-file and --json")
    if arguments.logprobs is not None and not arguments.json:
        raise UsageError("--logprobs writes into the lines of --json: give --json as well")
    if arguments.logprobs is not None and arguments.logprobs < 0:
        raise UsageError(f"--logprobs is {arguments.logprobs}; it must be 0 (those of the words alone) or above")
    if arguments.seed is not None and arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}; it must not be negative")
    if arguments.output:
        from lmdist.files import check_output_file

        check_output_file(arguments.output)


def generation_config(bundle: Bundle, arguments: argparse.Namespace) -> GenerationConfig:
    """The bundle's values, and above them those of the command line; raises UsageError for what does not go together."""
    values: dict[str, Any] = {name: getattr(arguments, name) for name in NUMBERS if getattr(arguments, name) is not None}
    if "temperature" in values:
        values["do_sample"] = values["temperature"] > 0
    if arguments.allow_unk:
        values["suppress_tokens"] = tuple(index for index in bundle.generation.suppress_tokens if index != UNKNOWN_ID)
    if arguments.bad_words:
        more = (known_words(bundle, words, "--bad-words") for words in arguments.bad_words)
        values["bad_words_ids"] = (*bundle.generation.bad_words_ids, *more)
    if arguments.logit_bias:
        values["sequence_bias"] = (*bundle.generation.sequence_bias, *(logit_bias(bundle, one) for one in arguments.logit_bias))
    least = values.get("min_new_tokens", 0)
    if least > bundle.generation.max_new_tokens and "max_new_tokens" not in values:
        values["max_new_tokens"] = least  # asked for so many, it may have them
    config = dataclasses.replace(bundle.generation, **values)
    if config.num_beams > 1:
        drawn = [name for name in (*DRAWN, "seed") if getattr(arguments, name) is not None]
        if drawn or arguments.stream:
            flag = "--stream" if arguments.stream else f"--{drawn[0].replace('_', '-')}"
            raise UsageError(f"--num-beams searches for the likeliest text and draws nothing: {flag} does not go with it")
        if arguments.n > config.num_beams:
            raise UsageError(f"--n is {arguments.n}; a search with {config.num_beams} beams finds at most so many texts")
    elif arguments.length_penalty is not None:
        raise UsageError("--length-penalty is for a search: give --num-beams as well")
    return config


def logit_bias(bundle: Bundle, given: str) -> tuple[list[int], float]:
    """A word's id, in a list, and what is to be added to its logit, of WORD=X."""
    word, _, number = given.rpartition("=")
    try:
        value = float(number)
        if not word or math.isnan(value):
            raise ValueError
    except ValueError:
        raise UsageError(f"--logit-bias {given} is not understood; WORD=X is expected, as in --logit-bias the=-2.5") from None
    return [known_word(bundle, word, "--logit-bias")], value


def known_words(bundle: Bundle, text: str, flag: str) -> list[int]:
    """The ids of the words of a text; raises UsageError where there are none, or where the model has no such word."""
    words = bundle.tokenizer.tokenize(text)
    if not words:
        raise UsageError(f"{flag} {text!r} has no words")
    return [known_word(bundle, word, flag) for word in words]


def known_word(bundle: Bundle, word: str, flag: str) -> int:
    """The id of a word."""
    if word not in bundle.vocabulary.ids:
        raise UsageError(f"{flag}: {word!r} is not in the vocabulary, so that it never comes; vocab.txt has all words")
    return bundle.vocabulary.ids[word]


def warn_of_unknown(prompt: Sequence[str], vocabulary: Vocabulary) -> None:
    """Name the words of the prompt that the model has never seen."""
    unknown = list(dict.fromkeys(word for word in prompt if word not in vocabulary.ids))
    if not unknown:
        return
    known = [word.lower() for word in unknown if word.lower() in vocabulary.ids]
    hint = f"; known in small letters: {', '.join(known)}" if known else ""
    say(f"warning: not in the vocabulary, and read as {UNKNOWN}: {', '.join(unknown)}{hint}")


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
    """Texts in the order of their prompts, and the `n` of each by their number, each as soon as it is its turn."""
    waiting: dict[int, Text] = {}
    turn = 0
    for text in texts:
        waiting[text.prompt_number * n + text.number] = text
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1


def plain(bundle: Bundle, place: int, text: Text, prompt: Sequence[str], arguments: argparse.Namespace) -> str:
    """A text for people, and before all but the first a line that says which it is."""
    head = "" if place == 0 else f"\n===== {place + 1} =====\n\n"
    return f"{head}{readable(bundle, text, prompt, echo=arguments.echo)}\n"


def readable(bundle: Bundle, text: Text, prompt: Sequence[str], *, echo: bool) -> str:
    """The words of a text as people write them, with its prompt or without."""
    words = [*prompt, *(bundle.vocabulary.words[index] for index in text.words)]
    pieces = bundle.tokenizer.pieces(words)
    return "".join(pieces) if echo else "".join(islice(pieces, len(prompt), None)).removeprefix(" ")


def json_line(sampler: Sampler, text: Text, prompt: Sequence[str], arguments: argparse.Namespace) -> str:
    """A text as a line of JSON, by the names of the OpenAI completions API where it has one."""
    bundle = sampler.bundle
    line: dict[str, Any] = {
        "prompt_number": text.prompt_number,
        "index": text.number,
        "text": readable(bundle, text, prompt, echo=arguments.echo),
        "words": [bundle.vocabulary.words[index] for index in text.words],
        "finish_reason": text.finish_reason,
    }
    if arguments.logprobs is not None:
        from lmdist_export.generation import log_probabilities

        of_words, likeliest = log_probabilities(sampler, text, arguments.logprobs)
        line["logprobs"] = {
            "tokens": line["words"],
            "token_logprobs": of_words,
            "top_logprobs": [{bundle.vocabulary.words[index]: value for index, value in top} for top in likeliest],
        }
    return json.dumps(line, ensure_ascii=False) + "\n"


def say(line: str) -> None:
    """Say on stderr what is going on."""
    sys.stderr.write(f"lmdist-generate: {line}\n")


if __name__ == "__main__":
    main()
