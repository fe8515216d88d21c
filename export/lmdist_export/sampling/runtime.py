"""The one home of onnxruntime: it opens a bundle's graphs over its file of weights."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import io
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lmdist.cpus import available_cpus
from lmdist.errors import DataError, UsageError, one_line
from lmdist_export.bundle import PROVIDERS, WEIGHTS
from lmdist_export.graph.onnx_file import FLOAT, UINT8, Graph, model_bytes
from lmdist_export.graph.sizes import Sizes


class Runtime:
    """Opens graphs over one file of weights."""

    def __init__(self, folder: Path, sizes: Sizes, provider: str, threads: int) -> None:
        """Raises UsageError for a provider that cannot run here or not in the precision of the weights."""
        if provider not in PROVIDERS:
            raise UsageError(f"the provider is {provider!r}; expected one of {', '.join(PROVIDERS)}")
        if threads < 0:
            raise UsageError(f"threads is {threads}; it must be at least 1, or 0 to choose by the machine")
        if provider == "cuda" and sizes.whole:
            raise UsageError(
                f"precision {sizes.precision} runs on a CPU only: use --provider cpu, or export with --precision fp16"
            )
        onnxruntime = import_onnxruntime()
        onnxruntime.set_default_logger_severity(4)
        if provider == "cuda":
            load_cuda(onnxruntime)
        self.folder, self.sizes, self.provider, self.threads = folder, sizes, provider, threads
        self.saturates = sizes.whole and products_saturate(threads)

    def open(self, graph: Callable[..., bytes], captured: bool = False) -> Any:
        """A session of the graph that `graph` makes of the sizes, `captured` as a CUDA graph at its first run."""
        data = graph(sizes=self.sizes, location=WEIGHTS, cuda=self.provider == "cuda", saturates=self.saturates)
        return open_session(data, self.folder, self.provider, self.threads, captured)


@cache
def products_saturate(threads: int) -> bool:
    """Whether this processor's products of bytes lose what is beyond 16 bits, as those without VNNI do."""
    g = Graph("probe")
    left = g.input("left", UINT8, ["rows", 64])
    right = g.constant(np.full((64, 64), 127, np.int8))
    scale, zero = g.constant(np.float32(1)), g.constant(np.uint8(0))
    g.output(g("MatMulIntegerToFloat", left, right, scale, scale, zero, ""), "product", FLOAT, ["rows", 64])
    session = open_session(model_bytes(g, {}), Path(), "cpu", threads)
    return session.run(None, {"left": np.full((1, 64), 255, np.uint8)})[0][0, 0] != 64 * 255 * 127


def open_session(graph: bytes, folder: Path, provider: str, threads: int, captured: bool = False) -> Any:
    """A session of `graph`, with weights in `folder`, on `provider` and nothing else; raises UsageError where it cannot."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or default_threads()
    # The threads of a step wait for the next one: turning round they would take the cores from whatever else is to run.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
    reason = "onnxruntime fell back to the CPU"
    try:
        # Without enable_fallback=0 a provider that fails is printed to stdout, in the midst of the text, and replaced.
        providers = [(name, {"enable_cuda_graph": "1"})] if captured else [name]
        session = onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        # get_available_providers() says what was compiled in. This says what runs.
        if session.get_providers()[0] == name:
            return session
    except Exception as error:  # onnxruntime's errors have no common class of their own
        if provider == "cpu":
            raise DataError(f"{folder} cannot be opened by onnxruntime {onnxruntime.__version__}: {one_line(error)}") from None
        reason = one_line(error)
    raise UsageError(
        f"provider cuda does not run here: {reason}. Check nvidia-smi and that CUDA and cuDNN are there "
        "(pip install 'lmdist[gpu]'), or use --provider cpu"
    )


def import_onnxruntime() -> Any:
    """The onnxruntime module; raises UsageError with the remedy where none or two of its wheels are installed."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on it reports to its makers by default, on Linux too
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
    return min(4, available_cpus())
