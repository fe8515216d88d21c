"""The likeliest text instead of a drawn one: beam search.

Of all texts of a length the `num_beams` likeliest are kept; each step reads one word of each and keeps the best of what may
follow. A text that comes to its end is set aside with its score, its log-probability over its length to the power of
`length_penalty` (Hugging Face's convention; Wu et al. 2016 have another). The search is over when no text that still grows can
beat those set aside. A text that no word may follow is found only where too few others are.

Shapes: K beams, V vocabulary, S the sum of the layers' sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmdist_export.bundle import GenerationConfig
from lmdist_export.sampling.generation import Text, bias_of, ends_with, none_left, row_bias
from lmdist_export.sampling.sampler import Sampler, log_softmax
from lmdist_export.sampling.state import select


def beam_search(
    sampler: Sampler,
    prompt: Sequence[int],
    config: GenerationConfig,
    n: int = 1,
    stops: Sequence[Sequence[int]] = (),
    ignore_end: bool = False,
) -> list[Text]:
    """The `n` likeliest texts found (`num_beams` at most), the best first."""
    assert n <= config.num_beams, (n, config.num_beams)
    end = () if ignore_end else (config.eos_token_id,)
    bias = bias_of(config, sampler.sizes.vocabulary_size)
    logits, state = sampler.next_logits([config.bos_token_id, *prompt])  # (1, V), (1, S)
    growing = [Text(list(prompt), 0, 0)]
    scores = np.zeros(1)
    done: list[tuple[float, Text]] = []
    exhausted: list[Text] = []
    for length in range(1, config.max_new_tokens + 1):
        follow = log_softmax(logits) + row_bias(growing, config, len(bias), end, None) + bias
        # The best first: the longest, and of these the likeliest.
        exhausted = [*(text for text, row in zip(growing, follow, strict=True) if none_left(row)), *exhausted][:n]
        total = scores[:, None] + follow  # (K, V)
        # One of the best 2K at least each beam can go on with: a beam has one end and few stops.
        wanted = min((2 + len(stops)) * config.num_beams, total.size)
        best = np.argpartition(-total, wanted - 1, axis=None)[:wanted]
        best = best[np.argsort(-total.ravel()[best], kind="stable")]
        kept: list[tuple[int, int, float]] = []
        for place in best.tolist():
            row, word = divmod(place, total.shape[1])
            score = float(total[row, word])
            if score == -np.inf or len(kept) == config.num_beams:
                break
            words = [*growing[row].words, word]
            stop = next((stop for stop in stops if ends_with(words, stop)), None)
            if word in end or stop is not None:
                ended = words[:-1] if stop is None else words[: -len(stop)]
                done.append((score / length**config.length_penalty, Text(list(prompt), 0, 0, ended, "stop")))
            else:
                kept.append((row, word, score))
        done = sorted(done, key=lambda found: -found[0])[: config.num_beams]
        rows = [row for row, _, _ in kept]
        growing = [growing[row].grown(word) for row, word, _ in kept]
        scores = np.array([score for _, _, score in kept])
        # A logarithm only falls: with no more words than now a text's score is at most what it has.
        longest = config.max_new_tokens if config.length_penalty > 0 else length
        if not kept or (len(done) == config.num_beams and done[-1][0] >= scores[0] / longest**config.length_penalty):
            break
        if length < config.max_new_tokens:
            step, state = sampler.step(np.array([[word] for _, word, _ in kept]), select(state, rows))
            logits = step[:, -1]  # (K, V)
    else:
        for text, score in zip(growing, scores.tolist(), strict=True):
            text.finish_reason = "length"
            done.append((score / config.max_new_tokens**config.length_penalty, text))
    for text in exhausted:
        text.finish_reason = "exhausted"
    found = [*(text for _, text in sorted(done, key=lambda found: -found[0])), *exhausted][:n]
    for number, text in enumerate(found):
        text.number = number
    return found
