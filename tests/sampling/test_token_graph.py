"""Tokens generated one per call, with the state on the device: a GPU's code path, with the same bindings on a CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from lmdist.errors import UsageError
from lmdist_export import PRECISIONS, export
from lmdist_export.bundle import Bundle
from lmdist_export.graph.graphs import capturable, generation_graph, step_graph, token_graph
from lmdist_export.graph.network import Target
from lmdist_export.graph.sizes import Sizes, file_length
from lmdist_export.options import Features, GenerationConfig, features_of
from lmdist_export.sampling import runtime
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.state import State
from lmdist_export.sampling.token_session import TokenSession
from support.small_bundles import ADAPTIVE, PLAIN_WORDS, TIED, make_run

PROMPTS = [[1], [3, 4, 5], [6, 7], [2, 8, 9, 3, 4, 4]]
CONFIGS = {
    "plain": GenerationConfig(temperature=0.8),
    "greedy": GenerationConfig(temperature=0),
    "adjusted": GenerationConfig(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.4, temperature=1.3),
    "top_k": GenerationConfig(top_k=5),
    "top_p": GenerationConfig(top_p=0.7, min_p=0.05),
    "typical": GenerationConfig(typical_p=0.6),
    "all": GenerationConfig(frequency_penalty=0.3, top_k=9, top_p=0.9, min_p=0.01, typical_p=0.9),
}
ALL_FEATURES = {name: features_of(config, False) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), TIED, "whitespace", PLAIN_WORDS)


@pytest.fixture(scope="module", params=[*PRECISIONS, "adaptive"])
def bundle(request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    adaptive = request.param == "adaptive"
    run = make_run(folder, ADAPTIVE, "whitespace", PLAIN_WORDS) if adaptive else run
    precision = "fp32" if adaptive else request.param
    export.main([str(run), "-o", str(folder / "bundle"), "--precision", precision])
    return Bundle.load(folder / "bundle")


@pytest.fixture(scope="module")
def plain(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("plain") / "bundle"
    export.main([str(run), "-o", str(folder)])
    return Bundle.load(folder)


def pair(bundle: Bundle) -> tuple[Sampler, Sampler]:
    """A sampler that generates tokens by the Loop, and one that generates one per call."""
    one, two = Sampler(bundle), Sampler(bundle)
    two.uses_token_graph = True
    return one, two


def compare(found: State, expected: State) -> None:
    """The same state, but for the rounding of sums."""
    for name in ("tokens", "lengths"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.model, expected.model, atol=1e-5)
    assert (found.counts is None) == (expected.counts is None)
    if found.counts is not None and expected.counts is not None:
        np.testing.assert_array_equal(found.counts, expected.counts)
    for one, two in zip(found.generators, expected.generators, strict=True):
        assert one.bit_generator.state == two.bit_generator.state


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokens_and_state_are_those_of_the_loop(bundle: Bundle, config: GenerationConfig) -> None:
    loop, by_token = pair(bundle)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:3], PROMPTS):
        one, two = (sampler.start(prompts).seeded(5) for sampler in (loop, by_token))
        for num_tokens, stops in ((7, ()), (1, ()), (30, (3, 4, 5)), (0, ()), (4, (99,))):
            expected, one = loop.generate(one, config, num_tokens, stops)
            found, two = by_token.generate(two, config, num_tokens, stops)
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype
            compare(two, one)


def test_what_is_added_to_logits(bundle: Bundle) -> None:
    random, size = np.random.default_rng(0), len(PLAIN_WORDS) + 2
    added = {
        "bias": random.normal(size=size).astype(np.float32),
        "row_bias": random.normal(size=(len(PROMPTS), size)).astype(np.float32),
        "in_prompt": random.random((len(PROMPTS), size)) < 0.5,
    }
    config = replace(CONFIGS["adjusted"], repetition_penalty=2)
    loop, by_token = pair(bundle)
    expected, one = loop.generate(loop.start(PROMPTS).seeded(1), config, 12, **added)
    found, two = by_token.generate(by_token.start(PROMPTS).seeded(1), config, 12, **added)
    np.testing.assert_array_equal(found, expected)
    compare(two, one)


def test_the_given_state_is_not_changed(plain: Bundle) -> None:
    sampler = pair(plain)[1]
    _, state = sampler.generate(sampler.start(PROMPTS).seeded(1), CONFIGS["adjusted"], 3)
    before = [*(part.copy() for part in state.model), np.array(state.counts)]
    first = sampler.generate(state, CONFIGS["adjusted"], 5)
    again = sampler.generate(state, CONFIGS["adjusted"], 5)
    np.testing.assert_array_equal(first[0], again[0])
    compare(again[1], first[1])
    for array, expected in zip((*state.model, state.counts), before, strict=True):
        np.testing.assert_array_equal(array, expected)


def addresses(session: TokenSession) -> list[dict[str, int]]:
    return [{name: value.data_ptr() for name, value in values.items()} for values in session.values]


def test_values_stay_where_they_are_while_their_shapes_do(plain: Bundle) -> None:
    sampler = pair(plain)[1]
    sampler.generate(sampler.start(PROMPTS).seeded(1), CONFIGS["plain"], 3)
    session = sampler.token_session(ALL_FEATURES["plain"])
    first, bindings = addresses(session), session.bindings
    differing = {name for name in first[0] if first[0][name] != first[1][name]}
    assert differing == {"word", "mass", *(f"{name}_{layer}" for name in "hc" for layer in range(3))}
    # The outputs of a call are the inputs of the next one, in the same memory.
    for (binding, _), after in zip(bindings, first[::-1], strict=True):
        outputs = [value.name.removeprefix("next_") for value in session.session.get_outputs()]
        found = dict(zip(outputs, (value.data_ptr() for value in binding.get_outputs()), strict=True))
        assert found == {name: after[name] for name in outputs}
    sampler.generate(sampler.start(PROMPTS[::-1]).seeded(2), replace(CONFIGS["plain"], temperature=1.5), 8)
    assert addresses(session) == first
    assert session.bindings is bindings
    sampler.generate(sampler.start(PROMPTS[:2]).seeded(1), CONFIGS["plain"], 3)
    assert session.bindings is not bindings


def test_a_repeated_run_changes_nothing(plain: Bundle) -> None:
    """onnxruntime runs the graph three times to capture a CUDA graph."""
    loop, by_token = pair(plain)
    session = by_token.token_session(ALL_FEATURES["adjusted"])
    once = session.run

    def thrice(number: int) -> None:
        for _ in range(3):
            once(number)

    session.run = thrice
    expected, one = loop.generate(loop.start(PROMPTS).seeded(1), CONFIGS["adjusted"], 9)
    found, two = by_token.generate(by_token.start(PROMPTS).seeded(1), CONFIGS["adjusted"], 9)
    np.testing.assert_array_equal(found, expected)
    compare(two, one)


# --- the graphs for a GPU ------------------------------------------------------------------------------------------


def sizes_of(precision: str, cutoffs: list[int]) -> Sizes:
    return Sizes([12, 30, 24], 600, 24, tied=False, precision=precision, cutoffs=cutoffs)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("cutoffs", [[], [100, 300]])
@pytest.mark.parametrize("features", ALL_FEATURES.values(), ids=ALL_FEATURES)
def test_graphs_for_cuda_are_valid(precision: str, cutoffs: list[int], features: Features, tmp_path: Path) -> None:
    sizes = sizes_of(precision, cutoffs)
    (tmp_path / "weights.bin").write_bytes(bytes(file_length(sizes)))
    for make in (step_graph, partial(generation_graph, features=features), partial(token_graph, features=features)):
        path = tmp_path / "graph.onnx"
        path.write_bytes(make(sizes, target=Target("weights.bin", cuda=True)).content)
        onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("features", ALL_FEATURES.values(), ids=ALL_FEATURES)
def test_what_is_captured_has_nothing_that_a_cuda_graph_cannot_replay(features: Features) -> None:
    graph = onnx.load_from_string(token_graph(sizes_of("fp16", []), features, Target("weights.bin", cuda=True)).content).graph
    operators = {node.op_type for node in graph.node}
    # Control flow; a shape, which lies on the host; kernels that copy tables from the host.
    unfit = operators & {"Loop", "Scan", "If", "Shape", "GatherND", "ScatterND", "Concat"}
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.external_data}
    splits = [known[node.input[1]] for node in graph.node if node.op_type == "Split" and len(node.input) == 2]
    assert not any(before != after for sizes in splits for before, after in pairwise(sizes))
    assert capturable(sizes_of("fp16", []), features) == (not unfit)
    assert not capturable(sizes_of("fp16", [100]), features)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_for_cuda_compute_the_same(precision: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export.main([str(run), "-o", str(tmp_path / "bundle"), "--precision", precision])
    bundle = Bundle.load(tmp_path / "bundle")
    expected, one = (sampler := Sampler(bundle)).generate(sampler.start(PROMPTS).seeded(1), GenerationConfig(), 12)
    opened = runtime.Runtime.open

    def as_for_cuda(self: runtime.Runtime, graph: Any, captured: bool = False) -> Any:
        return opened(self, lambda sizes, target: graph(sizes, target=replace(target, cuda=True)), captured)

    monkeypatch.setattr(runtime.Runtime, "open", as_for_cuda)
    sampler = pair(bundle)[1]
    found, two = sampler.generate(sampler.start(PROMPTS).seeded(1), GenerationConfig(), 12)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(two.model, one.model, atol=1e-5 if precision == "fp32" else 1e-2)


# --- CUDA graphs that fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_run", [False, True])
def test_tokens_are_generated_without_a_cuda_graph_if_none_can_be_captured(
    plain: Bundle, at_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, by_token = pair(plain)
    session = by_token.token_session(ALL_FEATURES["plain"])
    opened, asked = by_token.runtime.open, []

    def fail(*arguments: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    def refuse(graph: Any, captured: bool = False) -> Any:
        asked.append(captured)
        session = opened(graph)
        if captured and not at_run:
            raise UsageError("not all nodes are on CUDA")
        return (
            SimpleNamespace(run_with_iobinding=fail, get_inputs=session.get_inputs, io_binding=session.io_binding)
            if captured
            else session
        )

    monkeypatch.setattr(by_token.runtime, "open", refuse)
    session.captured = True
    session.session = session.open()
    expected, _ = loop.generate(loop.start(PROMPTS).seeded(1), CONFIGS["plain"], 9)
    found, _ = by_token.generate(by_token.start(PROMPTS).seeded(1), CONFIGS["plain"], 9)
    np.testing.assert_array_equal(found, expected)
    assert [asked.count(captured) for captured in (True, False)] == [1, 2]  # the prompts' graph is one


def test_the_options_of_a_captured_session(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def make_session(*arguments: object, **options: Any) -> SimpleNamespace:
        given.append(options["providers"])
        return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"], get_inputs=lambda: [])

    class Options(SimpleNamespace):
        def add_session_config_entry(self, key: str, value: str) -> None: ...

    fake = SimpleNamespace(SessionOptions=Options, InferenceSession=make_session)
    monkeypatch.setattr(runtime, "import_onnxruntime", lambda: fake)
    for captured in (True, False):
        runtime.open_session(b"", "cuda", 1, captured=captured)
    assert given == [[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})], ["CUDAExecutionProvider"]]
