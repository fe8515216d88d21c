"""Hypotheses of n-best lists scored per second: lmdist's Scorer against torch, one by one and in padded batches.

    python benchmarks/scoring.py [--json benchmarks/results/scoring-MACHINE-DATE.json]
    python benchmarks/scoring.py --quick          # 2 rounds of one list of 20, by a small model

The model has an embedding of 100, two layers of 1,024, a vocabulary of 33,278 and untrained weights. A list is a sentence of 5
to 40 words with one to four words changed, deleted or inserted, as speech recognizers and translators produce them; a second
case has unrelated sentences. Words are sampled by Zipf's law. Both variants with torch get ids; lmdist gets text.

Each variant is a process of its own on one core, with the same weights; they take turns. All must return the same scores. The
first turn is not counted. Peak memory is that of the process less what it had before the model was read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from origin import add_json_option, collect_rows, command_line
from random_bundle import make_bundle
from workers import Worker

VARIANTS = {"baseline": "torch, one by one", "torch": "torch, padded batches of 64", "lmdist": "lmdist"}
BATCH_SIZE = 64


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lists", type=int, default=3, help="n-best lists per round (default: 3)")
    parser.add_argument("--hypotheses", type=int, default=100, help="per list (default: 100)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of one list of 20, with a small model")
    add_json_option(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    command = command_line(parser, arguments)
    if arguments.worker:
        variant, folder = json.loads(arguments.worker)
        worker(variant, Path(folder))
        return
    if arguments.quick:
        arguments.rounds, arguments.lists, arguments.hypotheses = 2, 1, 20
    hidden_size, vocabulary_size = (128, 2_000) if arguments.quick else (1024, 33_278)
    case = f"2x{hidden_size}, V {vocabulary_size / 1000:.0f}k"
    texts = {
        f"{case}, {arguments.hypotheses}-best lists": nbest(arguments.lists, arguments.hypotheses, vocabulary_size),
        f"{case}, unrelated sentences": nbest(arguments.lists * arguments.hypotheses, 1, vocabulary_size),
    }
    packages = ("lmdist", "torch", "onnxruntime", "numpy")
    with collect_rows(arguments.json, packages, command) as rows, tempfile.TemporaryDirectory() as name:
        make_bundle(Path(name), 100, hidden_size, vocabulary_size)
        for case, lines in texts.items():
            rows += measure(case, lines, Path(name), arguments.rounds)
    for row in rows:
        print(
            f"{row['case']:<40}{VARIANTS[row['variant']]:<30}{row['value']:>8,.1f} {row['unit']:<14}{row['ratio']:>7.2f}"
            f"{row['tokens'] / row['seconds']:>10,.0f} tokens/s   peak {row['peak_mib']:>5,} MiB"
        )


def nbest(lists: int, hypotheses: int, vocabulary_size: int) -> list[list[int]]:
    """Return the tokens of all hypotheses, list after list, without the end mark."""
    generator = random.Random(lists)
    tokens = range(2, vocabulary_size)
    frequency = [1 / (token + 2.7) for token in tokens]

    def sample(count: int) -> list[int]:
        return generator.choices(tokens, frequency, k=count)

    texts = []
    for _ in range(lists):
        sentence = sample(generator.randint(5, 40))
        texts.append(sentence)
        for _ in range(hypotheses - 1):
            changed = list(sentence)
            for _ in range(generator.randint(1, 4)):
                place = generator.randrange(len(changed))
                changed[place : place + generator.randint(0, 1)] = sample(generator.randint(0, 1))
            texts.append(changed or sample(1))
    return texts


def measure(case: str, texts: list[list[int]], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of one case; the variants take turns."""
    workers = {variant: Worker(__file__, [variant, str(folder)], os.environ) for variant in VARIANTS}
    answers: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    try:
        for turn in range(rounds + 1):
            for variant, each in workers.items():
                answer = each.ask(json.dumps(texts[:BATCH_SIZE] if turn == 0 else texts))
                if turn:
                    answers[variant].append(answer)
    finally:
        for each in workers.values():
            each.close()
    expected = answers["baseline"][0]["scores"]
    for given in answers.values():
        largest = max(abs(one - other) for answer in given for one, other in zip(answer["scores"], expected, strict=True))
        assert largest < 1e-2, f"the scores of {case} differ by {largest}"
    seconds = {variant: [answer["seconds"] for answer in given] for variant, given in answers.items()}
    baseline = statistics.median(seconds["baseline"])
    return [
        {
            "case": case,
            "variant": variant,
            "value": round(len(texts) / statistics.median(values), 1),
            "unit": "hypotheses/s",
            "spread": round(len(texts) / min(values) - len(texts) / max(values), 1),
            "ratio": round(baseline / statistics.median(values), 2),
            "peak_mib": answers[variant][-1]["peak_mib"],
            "tokens": sum(len(text) + 1 for text in texts),
            "seconds": round(statistics.median(values), 3),
        }
        for variant, values in seconds.items()
    ]


# --- a process for each variant --------------------------------------------------------------------------------------


def worker(variant: str, folder: Path) -> None:
    """Answer each line on stdin, the ids of hypotheses, with their scores, the seconds for them and the peak memory."""
    before, score = by_lmdist(folder) if variant == "lmdist" else by_torch(folder, 1 if variant == "baseline" else BATCH_SIZE)
    for line in sys.stdin:
        texts = json.loads(line)
        given: list[Any] = [" ".join(f"w{token}" for token in text) for text in texts] if variant == "lmdist" else texts
        began = time.perf_counter()
        scores = score(given)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "scores": scores, "peak_mib": (peak() - before) // 1024}), flush=True)


def peak() -> int:
    """Return the peak memory of this process in KiB; getrusage's includes that of the parent."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def by_lmdist(folder: Path) -> tuple[int, Callable[[list[str]], list[float]]]:
    """Return the memory before the model was read, and a function that scores text with lmdist."""
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.sampler import Sampler
    from lmdist_export.sampling.scoring import Scorer

    before = peak()
    scorer = Scorer(Sampler(Bundle.load(folder / "bundle"), threads=1))
    return before, lambda sentences: [one.log_probability for one in scorer.score(sentences)]


def by_torch(folder: Path, batch_size: int) -> tuple[int, Callable[[list[list[int]]], list[float]]]:
    """Return the memory before the model was read, and a function that scores ids with torch, padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from lmdist.training.checkpoints.read import open_checkpoint
    from lmdist.training.checkpoints.retain import find_checkpoint

    torch.set_num_threads(1)
    before = peak()
    model = open_checkpoint(find_checkpoint(folder / "runs" / "random")).model()

    @torch.inference_mode()
    def score(texts: list[list[int]]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(texts), batch_size):
            batch = [torch.tensor([1, *text, 1]) for text in texts[start : start + batch_size]]
            tokens = pad_sequence(batch, batch_first=True, padding_value=-1)  # (B, T + 1)
            targets = tokens[:, 1:]
            hidden, _ = model(tokens[:, :-1].clamp(min=0), model.initial_state(len(batch)))
            found = model.logits(hidden).log_softmax(dim=-1)  # (B, T, V)
            chosen = found.gather(2, targets.clamp(min=0)[..., None])[..., 0]  # (B, T)
            scores += chosen.masked_fill(targets < 0, 0).double().sum(dim=1).tolist()
        return scores

    return before, score


if __name__ == "__main__":
    main()
