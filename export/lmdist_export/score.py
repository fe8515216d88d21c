"""Score text with a bundle: `lmdist-score BUNDLE [FILE ...]`, a sentence a line.

Scores go to stdout, all else to stderr. A line begins after an end mark, as the training text did, and is scored with its
batch, so that memory does not grow with the input. This module reads lines and prints scores; sampling/scoring.py computes
them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.bounds import between, check
from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import log, shown, table
from lmdist.counted import counted
from lmdist.errors import DataError, UsageError
from lmdist.perplexity import COMPARED, per_word_and_byte
from lmdist_export.api import BUNDLE, load
from lmdist_export.lines import STDIN, Lines, output_file
from lmdist_export.options import BATCH_SIZES, THREADS

if TYPE_CHECKING:
    from lmdist_export.sampling.scoring import Scorer

COMMAND = "lmdist-score"
MOSES = "|||"

# The kinds of output that an option has a meaning for; with any other it is an error.
GOES_WITH = {
    "--no-eos": ("summary", "words", "sentences", "nbest", "accuracy"),
    "--carry-state": ("summary", "words", "sentences", "accuracy"),
    "--compare": ("sentences",),
    "--batch-size": ("summary", "words", "sentences", "nbest"),
    "--best": ("nbest",),
    "--lm-weight": ("nbest",),
    "--word-bonus": ("nbest",),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog=COMMAND,
        description="Score text with a bundle written by lmdist-export: log-probabilities and perplexity, the most likely next "
        "words, and how often they are correct. A line is a sentence (or a document); without a further option a summary is "
        "printed. Text is tokenized as for training. A word outside of the vocabulary is scored as <unk> and counted.",
        epilog="Log-probabilities are in nats: divide them by 2.3026 for the log10 of KenLM and SRILM. The <eos> that ends a "
        "line is scored and counted as a word, and is all that an empty line has. Perplexity per word divides by the original "
        "text's words between whitespace, however it is tokenized, and by the <eos>. Bytes are those of UTF-8, line "
        "breaks included. Both, and perplexity per byte, are too low where words are unknown, since <unk> does not say which.",
    )
    parser.add_argument("bundle", help=BUNDLE)
    parser.add_argument("files", nargs="*", default=[STDIN], metavar="FILE", help="text in UTF-8 (default: -, which is stdin)")
    kinds = parser.add_argument_group("what is printed, TAB-separated").add_mutually_exclusive_group()
    kinds.add_argument(
        "--words",
        action="store_true",
        help="a line a word: number of the sentence, word, log-probability, 1 if unknown, else 0",
    )
    kinds.add_argument(
        "--sentences", action="store_true", help="a line a sentence: log-probability, words, unknown words, sentence"
    )
    kinds.add_argument(
        "--nbest",
        action="store_true",
        help="read n-best lists, Moses' (ID ||| HYPOTHESIS ||| FEATURES ||| SCORE) or ID<TAB>HYPOTHESIS[<TAB>SCORE], and add "
        "the log-probability: to Moses' features as lmdist= X, else as a last column",
    )
    kinds.add_argument(
        "--next", type=int, metavar="K", help="the K most likely next words, never <unk>: word, probability, word, ..."
    )
    kinds.add_argument(
        "--accuracy",
        action="store_true",
        help="how often the next word is the most likely one, or among the 3 or 5 most likely; and the latency, a call a word",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="with --sentences: two columns before the sentence, perplexity per word of the original text and bits per byte, "
        "which compare between tokenizers; JSON has them anyway",
    )
    parser.add_argument("--no-eos", action="store_true", help="do not score the <eos> that ends a line")
    parser.add_argument(
        "--carry-state",
        action="store_true",
        help="carry the state from line to line, as in one text: the perplexity of lmdist-evaluate --file FILE --lines, where "
        "a line without a word counts with the tokenizer whitespace only",
    )
    parser.add_argument(
        "--cache",
        action="store_true",
        help="mix in the neural cache that lmdist-evaluate --cache has tuned and the bundle remembers: it makes words likelier "
        "that the line, or with --carry-state the text, has had after a similar context",
    )
    parser.add_argument("--best", action="store_true", help="with --nbest: print only the best line of each ID")
    parser.add_argument(
        "--lm-weight", type=float, metavar="X", help="best is the largest SCORE + X * log-probability + ... (default: 1)"
    )
    parser.add_argument("--word-bonus", type=float, metavar="X", help="... + X * words (default: 0)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="lines scored at a time (default: 256); 1: each is scored as it is read"
    )
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: available CPUs, at most 4)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to a file, not to stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Score text, or print in one line why that is not possible."""
    with exit_on_error(COMMAND, ends_with_reader=True):
        run(parser().parse_intermixed_args(argv))  # files may follow options


def run(arguments: argparse.Namespace) -> None:
    """Read the bundle, then score line after line."""
    kind = kind_of(arguments)
    if arguments.output:
        from lmdist.storage.atomic import check_output_file

        check_output_file(arguments.output)
    model = load(arguments.bundle, provider=arguments.provider, threads=arguments.threads)
    scorer = model.scorer(
        end=not arguments.no_eos,
        carry_state=arguments.carry_state,
        cache=arguments.cache,
        batch_size=arguments.batch_size,
    )
    lines = Lines(arguments.files, COMMAND)
    with output_file(arguments.output, COMMAND) as output:
        for piece in KINDS[kind](scorer, lines, arguments):
            output.write(piece)
            output.flush()
    seconds = time.perf_counter() - lines.began
    where = f" -> {arguments.output}" if arguments.output else ""
    log(f"{counted(lines.count, 'line')} in {seconds:.2f} s, {lines.count / seconds:,.0f} lines/s{where}", COMMAND)


def kind_of(arguments: argparse.Namespace) -> str:
    """Return the kind of output; raises UsageError for mistakes that can be seen before anything is read."""
    chosen = [kind for kind in ("words", "sentences", "nbest", "accuracy") if getattr(arguments, kind)]
    kind = chosen[0] if chosen else "summary" if arguments.next is None else "next"
    for flag, kinds in GOES_WITH.items():
        value = getattr(arguments, flag[2:].replace("-", "_"))
        if value is not None and value is not False and kind not in kinds:
            with_these = ", ".join(f"--{name}" for name in kinds if name != "summary")
            raise UsageError(f"{flag} is for {with_these}{' or none of these' if 'summary' in kinds else ''}: leave it out")
    check("--threads", arguments.threads, THREADS)
    if arguments.batch_size is not None:
        check("--batch-size", arguments.batch_size, BATCH_SIZES)
    if arguments.next is not None:
        check("--next", arguments.next, between(1, 1_000_000))
    for name in ("lm_weight", "word_bonus"):
        value, flag = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is not None and not (arguments.best or arguments.json):
            raise UsageError(f"{flag} decides which hypothesis is the best: give --best or --json as well")
        if value is not None:
            check(flag, value, between(-1_000_000, 1_000_000))
    return kind


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hypothesis:
    """A line of an n-best list."""

    fields: list[str]
    moses: bool
    score: float

    @classmethod
    def read(cls, line: str, place: str) -> Hypothesis:
        """Parse a line; raises DataError, with its `place`, where it has neither format."""
        moses = MOSES in line
        fields = re.split(r"\s*\|\|\|\s*", line.strip()) if moses else line.split("\t")
        problem = "" if (len(fields) > 3 if moses else len(fields) in (2, 3)) else f"it has {counted(len(fields), 'field')}"
        score = fields[3] if moses and not problem else fields[2] if len(fields) == 3 else "0"
        try:
            number = float(score)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            problem = problem or f"its score is {score!r}"
        if problem:
            raise DataError(
                f"{place}: {problem}; expected is ID {MOSES} HYPOTHESIS {MOSES} FEATURES {MOSES} SCORE, with a number for the "
                "score, or ID<TAB>HYPOTHESIS, with or without <TAB>SCORE"
            )
        return cls(fields, moses, number)

    def line(self, log_probability: float) -> str:
        """Return the line with the log-probability added."""
        if not self.moses:
            return "\t".join([*self.fields, f"{log_probability:.6f}"])
        features = f"{self.fields[2]} lmdist= {log_probability:.6f}".strip()
        return f" {MOSES} ".join([*self.fields[:2], features, *self.fields[3:]])


# --- printing: a function for each kind of output ------------------------------------------------------------------


def summary(scorer: Scorer, lines: Lines, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the sums over all lines."""
    from lmdist_export.sampling.scoring import Totals

    totals = Totals()
    for score in scorer.score(lines):
        totals.add(score)
    yield figures(totals.figures(), arguments.json)


def words(scorer: Scorer, lines: Lines, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a line a word, those of a sentence at a time."""
    for number, score in enumerate(scorer.score(lines), start=1):
        scored = zip(score.tokens, score.log_probabilities.tolist(), score.unknown.tolist(), strict=True)
        yield "".join(
            record({"sentence": number, "word": word, "log_probability": log_probability, "unknown": unknown}, arguments.json)
            for word, log_probability, unknown in scored
        )


def sentences(scorer: Scorer, lines: Lines, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a line a sentence; JSON has its sizes, and its log-probability without unknown words, too."""
    for score in scorer.score(lines):
        values = {"log_probability": score.log_probability, "words": len(score.tokens), "unknown": int(score.unknown.sum())}
        if arguments.json:
            values |= {"log_probability_without_unknown": score.known_log_probability, **score.size.as_figures()}
        if arguments.json or arguments.compare:
            values |= dict.fromkeys(COMPARED) | per_word_and_byte(-score.log_probability, score.size)
        yield record({**values, "text": score.text}, arguments.json)


def nbest(scorer: Scorer, lines: Lines, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a line a hypothesis, or with --best a line a list."""
    weight = 1.0 if arguments.lm_weight is None else arguments.lm_weight
    bonus = arguments.word_bonus or 0.0

    def rescored() -> Iterator[tuple[str, float, str]]:
        hypotheses, again = tee(Hypothesis.read(line, lines.place) for line in lines)
        scores = scorer.score(hypothesis.fields[1] for hypothesis in hypotheses)
        for hypothesis, score in zip(again, scores, strict=True):
            name, text = hypothesis.fields[:2]
            total = hypothesis.score + weight * score.log_probability + bonus * len(score.tokens)
            values = {
                "id": name,
                "hypothesis": text,
                "score": hypothesis.score,
                "log_probability": score.log_probability,
                "words": len(score.tokens),
                "unknown": int(score.unknown.sum()),
                "total": total,
            }
            yield name, total, record(values, True) if arguments.json else f"{hypothesis.line(score.log_probability)}\n"

    if arguments.best:
        for _, group in groupby(rescored(), key=lambda line: line[0]):
            yield max(group, key=lambda line: line[1])[2]
    else:
        yield from (line for _, _, line in rescored())


def next_words(scorer: Scorer, lines: Lines, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the most likely words after each line."""
    for line in lines:
        best = scorer.next_words(line, arguments.next)
        if arguments.json:
            yield record({"text": line, "next": [{"word": word, "probability": share} for word, share in best]}, True)
        else:
            yield "\t".join(f"{word}\t{share:.6g}" for word, share in best) + "\n"


def accuracy(scorer: Scorer, lines: Lines, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield how often the most likely words are correct, and the latency."""
    yield figures(scorer.predict(lines).figures(), arguments.json)


KINDS: dict[str, Callable[[Scorer, Lines, argparse.Namespace], Iterator[str]]] = {
    "summary": summary,
    "words": words,
    "sentences": sentences,
    "nbest": nbest,
    "next": next_words,
    "accuracy": accuracy,
}


def figures(values: dict[str, Any], as_json: bool) -> str:
    """Return figures as a table, or as JSON."""
    if as_json:
        return record(values, True)
    return table({name.replace("_", " "): shown(value) for name, value in values.items()}, width=38)


def record(values: dict[str, Any], as_json: bool) -> str:
    """Return a line of values, TAB-separated or as JSON."""
    if as_json:
        return json.dumps(values, ensure_ascii=False) + "\n"
    return "\t".join(map(cell, values.values())) + "\n"


def cell(value: object) -> str:
    """Return a value as TSV has it: nothing for None."""
    if isinstance(value, float):
        return f"{value:.6f}"
    return "" if value is None else str(int(value) if isinstance(value, bool) else value)


if __name__ == "__main__":
    main()
