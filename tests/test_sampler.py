"""How words are drawn, against a slow plain reference and by their law; and the session that makes the logits."""

from __future__ import annotations

import ctypes
import math
import shutil
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdist.errors import DataError, UsageError
from lmdist_export import sampler
from lmdist_export.bundle import Bundle, GenerationConfig
from lmdist_export.sampler import PREFILL_WORDS, Sampler, StepGraph
from lmdist_export.sampling import Draw, candidates, draw_word
from small_bundles import TIED, WORDS, make_bundle

LOGITS = np.array([0.5, 2.0, -1.0, 1.0, 0.0, -9.0], np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(make_bundle(tmp_path_factory.mktemp("bundle")))


# --- drawing -------------------------------------------------------------------------------------------------------


def reference(logits: list[float], config: GenerationConfig) -> dict[int, float]:
    """Word and probability of every candidate, by the words of sampling.py's docstring and nothing clever."""
    kept = [(-logit / config.temperature, index) for index, logit in enumerate(logits)]
    kept = sorted(pair for pair in kept if pair[1] not in config.suppress_tokens)
    if config.top_k:
        kept = kept[: config.top_k]
    weights = [(math.exp(kept[0][0] - negative), index) for negative, index in kept]
    total = math.fsum(weight for weight, _ in weights)
    nucleus, mass = [], 0.0
    for weight, index in weights:
        nucleus.append((weight, index))
        mass += weight / total
        if mass >= config.top_p:
            break
    total = math.fsum(weight for weight, _ in nucleus)
    return {index: weight / total for weight, index in nucleus}


# Steps of a quarter: ties are frequent, and all else is far apart.
a_logit = st.integers(-20, 20).map(lambda quarter: quarter / 4)


@given(
    logits=st.lists(a_logit, min_size=2, max_size=40),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.013, 0.31, 0.57, 0.93, 1.0]),
    suppressed=st.sampled_from([(), (0,), (1,)]),
)
def test_candidates_are_those_of_the_reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, suppressed: tuple[int, ...]
) -> None:
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, suppress_tokens=suppressed)
    ids, probabilities = candidates(np.array(logits, np.float32), config)
    expected = reference(logits, config)
    found = {index: value for index, value in zip(ids.tolist(), probabilities.tolist(), strict=True) if value > 0}
    assert found == pytest.approx(expected, rel=1e-9)
    assert ids.tolist() == sorted(ids.tolist())


@given(logits=st.lists(a_logit, min_size=2, max_size=40), seed=st.integers(0, 2**32))
def test_one_candidate_is_the_greedy_one(logits: list[float], seed: int) -> None:
    row = np.array(logits, np.float32)
    likeliest = 1 + int(np.argmax(row[1:]))
    generator = np.random.default_rng(seed)
    without_first = GenerationConfig(suppress_tokens=(0,))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0.0}, {"do_sample": False}):
        assert draw_word(row, replace(without_first, **narrow), generator) == likeliest
    # Almost no temperature: one of those that are equally likely.
    assert row[draw_word(row, replace(without_first, temperature=1e-310), generator)] == row[likeliest]


def test_frequencies_are_the_probabilities() -> None:
    config = GenerationConfig(temperature=0.8, suppress_tokens=(0,))
    rows = 8_000
    drawn = Draw(config, seed=3, rows=rows)(np.tile(LOGITS, (rows, 1)))
    expected = np.zeros(len(LOGITS))
    for index, probability in reference(LOGITS.tolist(), config).items():
        expected[index] = rows * probability
    counts = np.bincount(drawn, minlength=len(LOGITS))
    assert counts[0] == 0
    chi_square = ((counts - expected)[1:] ** 2 / expected[1:]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: one sampler of a thousand is above


def test_frequencies_of_one_row_are_the_probabilities_too() -> None:
    config = GenerationConfig(top_k=4, top_p=0.95, suppress_tokens=())
    draw = Draw(config, seed=5, rows=1)
    drawn = np.concatenate([draw(LOGITS[None]) for _ in range(8_000)])
    probabilities = reference(LOGITS.tolist(), config)
    for index in range(len(LOGITS)):
        assert np.mean(drawn == index) == pytest.approx(probabilities.get(index, 0), abs=0.02)


def test_a_row_does_not_depend_on_the_others() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(50, 4, 30)).astype(np.float32)
    config = GenerationConfig()
    four, one, other = Draw(config, 7, 4), Draw(config, 7, 1), Draw(config, 8, 4)
    of_four = np.array([four(step) for step in logits])
    assert of_four[:, 0].tolist() == [one(step[:1])[0] for step in logits]
    assert (of_four != np.array([other(step) for step in logits])).any()
    same_logits = np.array([Draw(config, 7, 4)(np.repeat(step[:1], 4, axis=0)) for step in logits])
    assert (same_logits[:, 0] != same_logits[:, 1]).any()


# --- the session ---------------------------------------------------------------------------------------------------


def test_reading_at_once_is_reading_word_by_word(bundle: Bundle) -> None:
    made = Sampler(bundle)
    context = np.random.default_rng(0).integers(0, len(WORDS), 2 * PREFILL_WORDS + 5).tolist()
    logits, state = made.prefill(context)
    step_logits, step_state = np.zeros(0), made.graph.initial_state(1)
    for word in context:
        step_logits, step_state = made.graph.step(np.array([[word]]), step_state)
    np.testing.assert_allclose(logits, step_logits[:, -1], atol=1e-5)
    np.testing.assert_allclose(state, step_state, atol=1e-5)


def test_generated_words_are_those_of_steps_by_hand(bundle: Bundle) -> None:
    made, config = Sampler(bundle), GenerationConfig()
    found = np.array(list(islice(made.generate([1, 5], Draw(config, 2, 3), rows=3), 12)))  # (12, 3)
    for row in range(3):
        generator, context = np.random.default_rng([2, row]), [1, 5]
        for word in found[:, row]:
            logits, _ = made.prefill(context)
            assert draw_word(logits[0], config, generator) == word
            context.append(int(word))


def test_text_does_not_depend_on_how_many_are_made(bundle: Bundle) -> None:
    def texts(rows: int) -> np.ndarray:
        return np.array(list(islice(Sampler(bundle).generate([1], Draw(GenerationConfig(), 4, rows), rows), 40)))

    five = texts(5)
    assert (texts(1) == five[:, :1]).all()
    assert (texts(2) == five[:, :2]).all()


def test_a_graph_that_is_not_ours(bundle: Bundle, tmp_path: Path) -> None:
    graph = onnx.load(bundle.model)
    del graph.metadata_props[:]
    onnx.save_model(graph, tmp_path / "other.onnx")
    with pytest.raises(DataError, match="says it is None"):
        StepGraph(tmp_path / "other.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no graph at all")
    with pytest.raises(DataError, match="not a step graph"):
        StepGraph(tmp_path / "broken.onnx")


def test_wrong_names_and_axes(bundle: Bundle, tmp_path: Path) -> None:
    graph = onnx.load(bundle.model)
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    onnx.save_model(graph, tmp_path / "fixed.onnx")
    with pytest.raises(DataError, match=r"its inputs and outputs are .* expected are .*'time'"):
        StepGraph(tmp_path / "fixed.onnx")


def test_a_vocabulary_of_another_size(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    other = Bundle(copy, bundle.manifest, type(bundle.vocabulary)(bundle.vocabulary.words[:-1]), bundle.generation)
    with pytest.raises(DataError, match=r"vocab\.txt has 18 words, the model 19"):
        Sampler(other)


@pytest.mark.parametrize(("arguments", "message"), [(("tpu", 0), "'tpu'"), (("cpu", -1), "threads is -1")])
def test_wrong_arguments(bundle: Bundle, arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampler(bundle, *arguments)


class FakeRuntime(SimpleNamespace):
    """An onnxruntime built with CUDA, whose sessions run on `running`, or fail."""

    def __init__(self, running: str | None) -> None:
        def make_session(*arguments: object, **options: object) -> SimpleNamespace:
            assert options == {"providers": ["CUDAExecutionProvider"], "enable_fallback": 0}
            if running is None:
                raise RuntimeError("no\n  cuDNN")
            return SimpleNamespace(get_providers=lambda: [running])

        super().__init__(
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            set_default_logger_severity=lambda level: None,
            preload_dlls=lambda: sys.stdout.write("something was not found"),
            SessionOptions=SimpleNamespace,
            InferenceSession=make_session,
        )


def test_cuda_that_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(sampler, "import_onnxruntime", lambda: FakeRuntime("CUDAExecutionProvider"))
    assert sampler.open_session(Path("model.onnx"), "cuda", 1).get_providers() == ["CUDAExecutionProvider"]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("running", "message"), [("CPUExecutionProvider", "fell back to the CPU"), (None, "here: no cuDNN")])
def test_cuda_that_does_not_run(monkeypatch: pytest.MonkeyPatch, running: str | None, message: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(sampler, "import_onnxruntime", lambda: FakeRuntime(running))
    with pytest.raises(UsageError, match=f"{message}.*--provider cpu"):
        sampler.open_session(Path("model.onnx"), "cuda", 1)


def test_cuda_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    monkeypatch.setattr(sampler, "import_onnxruntime", lambda: FakeRuntime("CUDAExecutionProvider"))
    with pytest.raises(UsageError, match="no NVIDIA driver"):
        sampler.open_session(Path("model.onnx"), "cuda", 1)


def test_cuda_with_the_wheel_for_cpus(bundle: Bundle) -> None:
    if "CUDAExecutionProvider" in sampler.import_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime is built with CUDA")
    with pytest.raises(UsageError, match=r"built without CUDA.*lmdist\[gpu\]"):
        Sampler(bundle, provider="cuda")


def test_onnxruntime_that_is_not_there_or_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels: set[str] = {"onnxruntime", "onnxruntime-gpu"}
    monkeypatch.setattr(sampler, "installed", lambda name: name in wheels)
    with pytest.raises(UsageError, match="both installed"):
        sampler.import_onnxruntime()
    # What uninstalling one of the two leaves: a module with nothing in it.
    monkeypatch.setattr(sampler.importlib, "import_module", lambda name: SimpleNamespace())
    wheels.remove("onnxruntime-gpu")
    with pytest.raises(UsageError, match=r"pip install --force-reinstall onnxruntime$"):
        sampler.import_onnxruntime()
    wheels.clear()

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(sampler.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"pip install 'lmdist\[cpu\]'"):
        sampler.import_onnxruntime()


def test_threads_change_nothing(bundle: Bundle) -> None:
    assert bundle.manifest["layer_sizes"] == TIED.layer_sizes
    tokens = np.arange(12).reshape(3, 4)
    one, two = StepGraph(bundle.model, threads=1), StepGraph(bundle.model, threads=2)
    np.testing.assert_allclose(one.step(tokens, one.initial_state(3))[0], two.step(tokens, two.initial_state(3))[0], atol=1e-5)
