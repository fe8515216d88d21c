"""Sampling nodes against a plain reference, at the edges of fp32, and by their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lmdist_export.graph.onnx_file import FLOAT, INT64, Graph, model_of
from lmdist_export.graph.sampling_nodes import SamplingNodes, option_inputs
from lmdist_export.graph.sizes import BLOCK, Sizes
from lmdist_export.options import Features, GenerationConfig, features_of
from lmdist_export.sampling.runtime import open_session
from lmdist_export.sampling.sampler import option_feed
from support.sampling_reference import NEAR, Past, check_frequencies, expected, scores_of

LAST = 1 - 2**-24  # the largest number that a generator returns
SWEEP = np.array([*np.linspace(0, 1, 1_998, endpoint=False), 2**-24, LAST], np.float32)


@cache
def session(padded: int, features: Features, cuda: bool) -> Any:
    """Return a session of the sampling nodes alone, from logits that are an input."""
    g = Graph("sampling")
    sizes = Sizes([8], padded, 8, tied=True)
    logits = g.input("logits", FLOAT, ["batch", padded])
    uniform = g.input("uniform", FLOAT, ["batch", features.attempts])
    sampling = SamplingNodes(sizes, features, option_inputs(g, sizes, features), cuda)
    if features.adjusted:
        logits = sampling.penalize(g, logits, sampling.options["counts"])
    token, mass = sampling.sample(g, logits, uniform)
    g.output(token, "token", INT64, ["batch", 1])
    g.output(mass, "mass", FLOAT, ["batch", 1])
    return open_session(model_of(g, {}).content, "cpu", 1)


def sample(
    logits: Sequence[float],
    config: GenerationConfig,
    uniform: NDArray[np.floating],
    past: Past | None = None,
    cuda: bool = False,
) -> NDArray[np.int64]:
    """Return the tokens that the graph samples, one for each row of `uniform` (B, A), to which missing columns are added."""
    features = replace(features_of(config, False), adjusted=past is not None)
    rows, vocabulary_size = len(uniform), len(logits)
    padded = -(-vocabulary_size // BLOCK) * BLOCK
    beyond = padded - vocabulary_size
    inverse = np.float32(1 if config.greedy else 1 / config.temperature)
    if uniform.shape[1] < features.attempts:
        others = np.random.default_rng(0).random((rows, features.attempts - 1))
        uniform = np.concatenate([uniform, others], axis=1)
    row = np.pad(np.array(logits, np.float32) * inverse, (0, beyond), constant_values=-np.inf)
    feed: dict[str, Any] = {
        "logits": np.tile(row, (rows, 1)),
        "uniform": np.minimum(uniform[:, : features.attempts], LAST),
    } | option_feed(config, features, vocabulary_size)
    if past:
        feed |= {
            "counts": np.tile(np.pad(past.counts, (0, beyond)), (rows, 1)),
            "in_prompt": np.tile(np.pad(past.in_prompt, (0, beyond)), (rows, 1)),
            "row_bias": np.pad(past.row_bias or np.zeros(vocabulary_size), (0, beyond))[None] * inverse,
        }
    nodes = session(padded, features, cuda)
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
    tokens, mass = nodes.run(
        None, {value.name: np.asarray(feed[value.name], types[value.type]) for value in nodes.get_inputs()}
    )
    assert np.isfinite(mass).all()
    return tokens[:, 0]


def check(logits: Sequence[float], config: GenerationConfig, past: Past | None = None) -> None:
    """Sample with many uniform numbers: tokens are the reference's, or with rejection sampling have its frequencies."""
    of_reference = expected(logits, config, past)
    assume(of_reference.margin > NEAR)
    features = features_of(config, False)
    tokens = sample(logits, config, SWEEP[:, None], past)
    assert set(tokens.tolist()) <= set(of_reference.tokens)
    if features.attempts == 1:
        right, certain = of_reference.sampled(SWEEP)
        assert (tokens == right)[certain].all()
        return
    rows = 4_000
    tokens = sample(logits, config, np.random.default_rng(1).random((rows, features.attempts)), past)
    assert set(tokens.tolist()) <= set(of_reference.tokens)
    check_frequencies(tokens, dict(zip(of_reference.tokens, of_reference.probabilities, strict=True)))


# --- each option, and many together --------------------------------------------------------------------------------


def random_logits(vocabulary_size: int, spread: int, seed: int) -> list[float]:
    """Steps of a quarter: ties are frequent, and all else is far apart."""
    return (np.random.default_rng(seed).integers(-spread, spread + 1, vocabulary_size) / 4).tolist()


seeds = st.integers(0, 2**32)
few_logits = st.lists(st.integers(-20, 20).map(lambda quarter: quarter / 4), min_size=2, max_size=12)
many_logits = st.builds(random_logits, st.integers(2, 600), st.sampled_from([0, 1, 6, 40]), seeds)
some_logits = few_logits | many_logits


def without_some(logits: list[float], every: int) -> list[float]:
    """Logits of which every so many are suppressed, but never all."""
    return [-np.inf if every and place % every == 0 and place + 1 < len(logits) else x for place, x in enumerate(logits)]


ONE_BY_ONE = [
    GenerationConfig(),
    GenerationConfig(temperature=0.3),
    GenerationConfig(temperature=2.5),
    GenerationConfig(top_k=1),
    GenerationConfig(top_k=3),
    GenerationConfig(top_k=300),
    GenerationConfig(top_p=0.013),
    GenerationConfig(top_p=0.57),
    GenerationConfig(top_p=0.93),
    GenerationConfig(min_p=0.013),
    GenerationConfig(min_p=0.31),
    GenerationConfig(min_p=1.0),
    GenerationConfig(typical_p=0.13),
    GenerationConfig(typical_p=0.57),
    GenerationConfig(typical_p=0.93),
]


def named(config: GenerationConfig) -> str:
    """Return the options of a config that are not the defaults."""
    return ",".join(f"{name}={value}" for name, value in vars(config).items() if value != getattr(GenerationConfig, name))


@pytest.mark.parametrize("config", ONE_BY_ONE, ids=named)
@settings(max_examples=12)
@given(logits=some_logits, every=st.sampled_from([0, 0, 2, 3]))
def test_each_option_samples_the_tokens_of_the_reference(config: GenerationConfig, logits: list[float], every: int) -> None:
    check(without_some(logits, every), config)


configs = st.builds(
    GenerationConfig,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 2, 5, 17, 300, 1_000]),
    top_p=st.sampled_from([0.31, 0.57, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21]),
    typical_p=st.sampled_from([0.31, 0.93, 1.0]),
)
penalties = st.builds(
    dict,
    # Sums and products of these, and quotients by the temperatures, are exact: what is equal is so in fp32 too.
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0]),
    presence_penalty=st.sampled_from([-0.5, 0.0, 1.25]),
    frequency_penalty=st.sampled_from([-0.25, 0.0, 0.5]),
)


def random_past(vocabulary_size: int, seed: int) -> Past:
    """Some tokens generated, up to four times, some in the prompt, some with a bias or banned."""
    random = np.random.default_rng(seed)
    mask = random.random((2, vocabulary_size)) < 0.3
    added = np.where(random.random(vocabulary_size) < 0.3, -np.inf, random.integers(-4, 5, vocabulary_size) / 4)
    added[random.integers(vocabulary_size)] = 0
    counts = mask[0] * random.integers(1, 5, vocabulary_size)
    return Past(counts.tolist(), mask[1].tolist(), added.tolist())


@settings(max_examples=80)
@given(logits=some_logits, config=configs)
def test_options_together_sample_the_tokens_of_the_reference(logits: list[float], config: GenerationConfig) -> None:
    check(logits, config)


@settings(max_examples=60)
@given(logits=some_logits, config=configs, penalties=penalties, seed=seeds)
def test_penalties_sample_the_tokens_of_the_reference(
    logits: list[float], config: GenerationConfig, penalties: dict[str, float], seed: int
) -> None:
    check(logits, replace(config, **penalties), random_past(len(logits), seed))


@settings(max_examples=60)
@given(logits=some_logits, penalties=penalties, seed=seeds)
def test_greedy_is_the_first_of_the_most_likely(logits: list[float], penalties: dict[str, float], seed: int) -> None:
    uniform = np.zeros((2, 1))
    config = GenerationConfig(temperature=0.0)
    assert sample(logits, config, uniform).tolist() == [int(np.argmax(logits))] * 2
    config, past = replace(config, **penalties), random_past(len(logits), seed)
    assert sample(logits, config, uniform, past).tolist() == [int(np.argmax(scores_of(logits, config, past)))] * 2


def test_of_equals_top_k_keeps_those_of_lower_ids() -> None:
    logits = [0.0] * 600
    for top_k in (1, 2, 255, 300, 599):
        assert set(sample(logits, GenerationConfig(top_k=top_k), SWEEP[:, None]).tolist()) == set(range(top_k))


@settings(max_examples=40)
@given(logits=some_logits, config=configs)
def test_the_graph_for_cuda_samples_the_same_tokens(logits: list[float], config: GenerationConfig) -> None:
    """It has other nodes, which run here too."""
    uniform = SWEEP[:, None]
    assert np.array_equal(sample(logits, config, uniform), sample(logits, config, uniform, cuda=True))


# --- the distribution, by many samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(top_p=0.9),
        GenerationConfig(top_p=0.05),
        GenerationConfig(min_p=0.02),
        GenerationConfig(top_p=0.8, min_p=0.01, temperature=1.3),
        GenerationConfig(top_k=40, top_p=0.9),
        GenerationConfig(typical_p=0.5),
    ],
    ids=named,
)
def test_tokens_have_the_expected_frequencies(config: GenerationConfig) -> None:
    random = np.random.default_rng(7)
    logits = (-np.log(1 + random.permutation(600))).tolist()  # by Zipf's law, likely tokens anywhere
    of_reference = expected(logits, config)
    tokens = sample(logits, config, random.random((10_000, 24)))
    assert set(tokens.tolist()) <= set(of_reference.tokens)
    right = np.zeros(600)
    right[of_reference.tokens] = of_reference.probabilities
    found = np.bincount(tokens, minlength=600) / len(tokens)
    # For a correct sampler the distance is about sqrt(tokens / samples / 2 pi): a bias of one in a hundred would be seen.
    assert np.abs(found - right).sum() / 2 < 0.005 + 1.5 * np.sqrt(len(of_reference.tokens) / len(tokens) / (2 * np.pi))
    check_frequencies(tokens, dict(zip(of_reference.tokens, of_reference.probabilities, strict=True)))


# --- the edges -----------------------------------------------------------------------------------------------------

EDGES = [
    [0.0, 1e30, 0.0],
    [-1e30, -1e30, -2e30],
    [*[-np.inf] * 400, 3.0, *[-np.inf] * 100],
    [-np.inf, -np.inf, 0.0, 0.0],
    [0.0] * 600,
    [-95.0, 0.0, 0.5, 0.0],  # the first has a probability that fp32 hardly knows
    [0.0, *[-95.0] * 255, 0.0, -100.0],
    [*[-104.0] * 255, 0.0],
    [5.0, *[-30.0] * 599],
    [*[-30.0] * 511, 5.0],
]


@pytest.mark.parametrize("logits", EDGES, ids=lambda logits: f"{logits[0]}..{len(logits)}")
@pytest.mark.parametrize("number", [0.0, 2**-24, 0.5, LAST])
def test_uniform_numbers_at_the_edges_sample_allowed_tokens(logits: list[float], number: float) -> None:
    uniform = np.full((3, 24), number)
    uniform[1, 1:] = 0.0
    uniform[2, 1:] = LAST
    every = [*ONE_BY_ONE, GenerationConfig(top_p=0.5, min_p=1.0), GenerationConfig(top_k=2, top_p=0.9, min_p=0.1)]
    for config in [*every, *(replace(config, temperature=1e-3) for config in every)]:
        allowed = expected(logits, config).tokens
        assert set(sample(logits, config, uniform).tolist()) <= set(allowed), config


@pytest.mark.parametrize("config", [replace(config, temperature=1e-30) for config in ONE_BY_ONE], ids=named)
def test_almost_no_temperature_samples_one_of_the_most_likely(config: GenerationConfig) -> None:
    logits = [-1.0, 2.0, 1.75, 2.0, 0.0, *[-3.0] * 300]
    assert set(sample(logits, config, SWEEP[:, None]).tolist()) <= {1, 3}


def test_min_p_of_1_never_rejects_the_most_likely() -> None:
    """Products of quotients are rounded: a token that is compared with itself may seem to be below."""
    random = np.random.default_rng(3)
    for _ in range(30):
        logits = random.normal(size=300).astype(np.float32).tolist()
        tokens = sample(logits, GenerationConfig(min_p=1.0), random.random((500, 24)))
        assert set(tokens.tolist()) == {int(np.argmax(logits))}
