"""What is read and scored in pieces has the same bits as at once, in every precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmdist_export.sampling.log_probabilities import best_tokens, log_probability_steps
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.steps import Pace, result_of
from support.small_bundles import UNTIED, bare_bundle


class Fixed(Pace):
    """A pace that does not change."""

    def learn(self, tokens: int, seconds: float) -> None:
        """Forget it."""


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_pace_changes_no_bit(tmp_path: Path, precision: str) -> None:
    sampler = Sampler(bare_bundle(tmp_path / "bundle", UNTIED, precision), threads=1)
    tokens = np.random.default_rng(0).integers(1, 300, 230).tolist()
    expected = result_of(log_probability_steps(sampler, tokens[:101], tokens[101:], 2))
    read = sampler.prefill(sampler.start([tokens]))
    for num_tokens in (1, 7, 64, 500):
        pace = Fixed(num_tokens, 500)
        scores = result_of(log_probability_steps(sampler, tokens[:101], tokens[101:], 2, pace, Fixed(num_tokens, 64)))
        assert scores == expected
        state = result_of(sampler.prefill_steps(sampler.start([tokens]), pace=pace))
        assert all(map(np.array_equal, state.model, read.model))


def test_the_best_tokens_are_those_of_a_stable_sort() -> None:
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(0, 6, 50).astype(float)
        for count in (0, 1, 3, 49, 50, 60):
            order = np.argsort(-scores, kind="stable")[:count].tolist()
            assert best_tokens(scores, count) == [(token, scores[token]) for token in order]
