"""onnxruntime: opens the step graph, carries the state, and makes words one after the other.

    sampler = Sampler(Bundle.load(Path("bundle")))
    for ids in sampler.generate(context, draw, rows=4):     # the next word of 4 texts, (4,), for ever
        ...

The only file that imports onnxruntime. It does not know how a word is drawn (sampling.py), nor when a text ends
(generate.py). No torch and no onnx: a machine that samples has neither.

Shapes: B rows, T words, V vocabulary, S the sum of the layers' sizes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import io
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import DataError, UsageError
from lmdist.files import one_line
from lmdist_export.bundle import PROVIDERS, Bundle
from lmdist_export.graph import read_step_graph

State = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(h, c), each (B, S): the layers' states side by side. Row b is all that the model knows of text b."""

PREFILL_WORDS = 64  # a prompt is read in pieces of so many words: their logits are (1, 64, V), and only the last count
LOGITS_AT_ONCE = 2**23  # numbers in the logits of what is scored at a time: 32 MiB


class StepGraph:
    """The step graph in an onnxruntime session: words and state in, logits and state out."""

    def __init__(self, path: Path, provider: str = "cpu", threads: int = 0) -> None:
        """Open a graph that is lmdist's own, whoever made it; raises DataError for any other."""
        sizes = read_step_graph(path)
        self.vocabulary_size = sizes.vocabulary_size
        self.state_size = sum(sizes.layer_sizes)
        self.session = open_session(path, provider, threads)
        state = ["batch", self.state_size]
        expected = [
            ("tokens", "tensor(int64)", ["batch", "time"]),
            ("h", "tensor(float)", state),
            ("c", "tensor(float)", state),
            ("logits", "tensor(float)", ["batch", "time", self.vocabulary_size]),
            ("next_h", "tensor(float)", state),
            ("next_c", "tensor(float)", state),
        ]
        values = (*self.session.get_inputs(), *self.session.get_outputs())
        found = [(value.name, value.type, value.shape) for value in values]
        if found != expected:
            raise DataError(f"{path}: its inputs and outputs are {reprlib.repr(found)}; expected are {expected}")

    def initial_state(self, rows: int) -> State:
        """The state before the first word: zeros, (rows, S) each."""
        return np.zeros((rows, self.state_size), np.float32), np.zeros((rows, self.state_size), np.float32)

    def step(self, tokens: NDArray[np.int64], state: State) -> tuple[NDArray[np.float32], State]:
        """Read `tokens` (B, T) from `state` on; give the logits (B, T, V) after each word, and the state after all."""
        assert tokens.ndim == 2, tokens.shape
        h, c = state
        logits, h, c = self.session.run(["logits", "next_h", "next_c"], {"tokens": tokens, "h": h, "c": c})
        return logits, (h, c)


class Sampler:
    """A bundle that makes words."""

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int = 0) -> None:
        self.bundle = bundle
        self.graph = StepGraph(bundle.model, provider, threads)
        if self.graph.vocabulary_size != len(bundle.vocabulary):
            raise DataError(
                f"{bundle.folder}: vocab.txt has {len(bundle.vocabulary)} words, the model {self.graph.vocabulary_size}"
            )

    def prefill(self, context: Sequence[int]) -> tuple[NDArray[np.float32], State]:
        """Read `context` from the state before the first word; give the logits (1, V) of the word after it, and the state."""
        assert len(context) > 0, "there is no word after nothing: a text begins with the end mark"
        state = self.graph.initial_state(1)
        logits = np.empty(0, np.float32)
        for start in range(0, len(context), PREFILL_WORDS):
            tokens = np.array([context[start : start + PREFILL_WORDS]], np.int64)  # (1, T)
            logits, state = self.graph.step(tokens, state)
        return self.finite(logits[:, -1]), state  # (1, V)

    def score(
        self, tokens: NDArray[np.int64], targets: NDArray[np.int64], state: State | None = None
    ) -> tuple[NDArray[np.float32], State]:
        """The log-probability, in nats, of each of `targets` (B, T) after `tokens` (B, T) up to its place; and the state.

        Read from `state` on, from the state before the first word where there is none. The logits of LOGITS_AT_ONCE places
        are held at a time, whatever B and T. Raises DataError where they are no numbers.
        """
        assert tokens.shape == targets.shape, (tokens.shape, targets.shape)
        rows, length = tokens.shape
        h, c = state or self.graph.initial_state(rows)
        next_h, next_c = np.empty_like(h), np.empty_like(c)
        result = np.empty((rows, length), np.float32)
        places = max(1, LOGITS_AT_ONCE // self.graph.vocabulary_size)
        window = max(1, places // rows)
        for top in range(0, rows, places):
            part = slice(top, top + places)
            after = h[part], c[part]
            for start in range(0, length, window):
                piece = part, slice(start, start + window)
                logits, after = self.graph.step(tokens[piece], after)
                logits = self.finite(logits) - logits.max(axis=-1, keepdims=True)
                chosen = np.take_along_axis(logits, targets[piece][..., None], axis=-1)[..., 0]
                result[piece] = chosen - np.log(np.exp(logits, out=logits).sum(axis=-1))
            next_h[part], next_c[part] = after
        return result, (next_h, next_c)

    def generate(
        self, context: Sequence[int], draw: Callable[[NDArray[np.float32]], NDArray[np.int64]], rows: int
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the next word of `rows` texts that all go on from `context`, (rows,) ids, for ever.

        `draw` makes ids (B,) of logits (B, V). `context` is read once, however many the rows.
        """
        logits, (h, c) = self.prefill(context)
        logits = np.repeat(logits, rows, axis=0)  # (B, V)
        state = np.repeat(h, rows, axis=0), np.repeat(c, rows, axis=0)  # (B, S) each
        while True:
            ids = draw(logits)
            yield ids
            step_logits, state = self.graph.step(ids[:, None], state)  # (B, 1, V)
            logits = self.finite(step_logits[:, -1])  # (B, V)

    def finite(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same logits; raises DataError where they are no numbers to draw from.

        Seen here and not when the weights are read, for that would take longer than the first words do.
        """
        if not np.isfinite(logits).all():
            raise DataError(f"{self.bundle.model} gives logits that are not finite: its weights are of no trained model")
        return logits


def open_session(path: Path, provider: str, threads: int) -> Any:
    """An onnxruntime session that runs on `provider` and on nothing else; raises UsageError where it cannot."""
    if provider not in PROVIDERS:
        raise UsageError(f"the provider is {provider!r}; expected one of {', '.join(PROVIDERS)}")
    if threads < 0:
        raise UsageError(f"threads is {threads}; it must be at least 1, or 0 to choose by the machine")
    onnxruntime = import_onnxruntime()
    onnxruntime.set_default_logger_severity(4)
    if provider == "cuda":
        load_cuda(onnxruntime)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or default_threads()
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
    reason = "onnxruntime fell back to the CPU"
    try:
        # Without enable_fallback=0 a provider that fails is printed to stdout, in the midst of the text, and replaced.
        session = onnxruntime.InferenceSession(path, options, providers=[name], enable_fallback=0)
        # get_available_providers() says what was compiled in. This says what runs.
        if session.get_providers()[0] == name:
            return session
    except Exception as error:  # onnxruntime's errors have no common class of their own
        if provider == "cpu":
            raise DataError(f"{path} cannot be opened by onnxruntime {onnxruntime.__version__}: {one_line(error)}") from None
        reason = one_line(error)
    raise UsageError(
        f"provider cuda does not run here: {reason}. Check nvidia-smi and that CUDA and cuDNN are there "
        "(pip install 'lmdist[gpu]'), or use --provider cpu"
    )


def import_onnxruntime() -> Any:
    """The onnxruntime module; raises UsageError with the remedy where none or two of its wheels are installed."""
    wheels = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed(name)]
    if len(wheels) == 2:
        raise UsageError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'lmdist[cpu]' or 'lmdist[gpu]'"
        )
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        # Where one of two wheels was uninstalled, a folder without the module's contents is left.
        assert onnxruntime.InferenceSession
    except (ImportError, AttributeError) as error:
        remedy = f"pip install --force-reinstall {wheels[0]}" if wheels else "pip install 'lmdist[cpu]' (or 'lmdist[gpu]')"
        raise UsageError(f"onnxruntime cannot be imported ({one_line(error)}): {remedy}") from None
    return onnxruntime


def runtime_version() -> str:
    """The version of onnxruntime."""
    return import_onnxruntime().__version__


def installed(distribution: str) -> bool:
    """Whether a distribution is installed, working or not."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load_cuda(onnxruntime: Any) -> None:
    """Load what the CUDA provider needs; raises UsageError where the driver or the provider is not there at all."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UsageError(
            "provider cuda: this onnxruntime is built without CUDA: "
            "pip uninstall -y onnxruntime, then pip install 'lmdist[gpu]'; or use --provider cpu"
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UsageError(
            "provider cuda: libcuda.so.1 does not load, so this machine has no NVIDIA driver: use --provider cpu"
        ) from None
    # CUDA and cuDNN of pip's nvidia-* wheels. It prints what it does not find; whether that matters shows right after.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def default_threads() -> int:
    """Threads for one step: the cores this process may use, at most 4, since a step is too small for more."""
    return min(4, len(os.sched_getaffinity(0)))
