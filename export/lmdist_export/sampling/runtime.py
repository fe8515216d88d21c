"""The one home of onnxruntime: find it, check provider and processor, and open sessions of graphs over a bundle's weights.

It knows no sampling. No torch and no onnx: a machine that samples has neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lmdist.cpus import available_cpus
from lmdist.errors import DataError, UsageError, one_line
from lmdist_export.bundle import PROVIDERS, WEIGHTS, Bundle
from lmdist_export.graph.network import Target
from lmdist_export.graph.onnx_file import FLOAT, UINT8, Graph, OnnxModel, model_of
from lmdist_export.graph.sizes import weights
from lmdist_export.options import THREADS, check_count


class Runtime:
    """Opens graphs over the weights of one bundle, on one provider.

    onnxruntime is given the bytes that were checked: it would open the file by its path at each session, map it into memory,
    and read what is there by then, or end the process (SIGBUS) where it was truncated.
    """

    def __init__(self, bundle: Bundle, provider: str, threads: int) -> None:
        """Raises UsageError for a provider that does not run here, or not in the precision of the weights."""
        if provider not in PROVIDERS:
            raise UsageError(f"the provider is {provider!r}; expected one of {', '.join(PROVIDERS)}")
        check_count("threads", threads, THREADS)
        sizes = bundle.sizes
        if provider == "cuda" and sizes.is_quantized:
            raise UsageError(
                f"precision {sizes.precision} runs on a CPU only: use the provider cpu, or export with --precision fp16"
            )
        onnxruntime = import_onnxruntime()
        onnxruntime.set_default_logger_severity(4)
        if provider == "cuda":
            load_cuda(onnxruntime)
        self.bundle, self.sizes, self.provider, self.threads = bundle, sizes, provider, threads
        self.target = Target(WEIGHTS, provider == "cuda", sizes.is_quantized and int8_saturates(threads))
        derives_weights = sizes.precision == "fp16" or self.target.int8_saturates  # Network.derive
        self.as_is = provider == "cpu" and not derives_weights

    def open(self, build: Callable[..., OnnxModel], captured: bool = False) -> Any:
        """Return a session of the graph that `build` makes from the sizes, `captured` as a CUDA graph at its first call."""
        model = build(self.sizes, target=self.target)
        weights = {name: self.weights[name] for name in model.weights}
        return open_session(
            model.content,
            self.provider,
            self.threads,
            weights,
            name=self.bundle.name,
            captured=captured,
            as_is=self.as_is,
        )

    @cached_property
    def weights(self) -> dict[str, Any]:
        """Return the weights as onnxruntime's values, which all sessions share."""
        content, onnxruntime = np.frombuffer(self.bundle.weights, np.uint8), import_onnxruntime()
        values: dict[str, Any] = {}
        for name, weight in weights(self.sizes).items():
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(weight.read(content))  # not a copy
        return values


@cache
def int8_saturates(threads: int) -> bool:
    """Return whether this processor's int8 matrix multiplication saturates at 16 bits, as without VNNI."""
    g = Graph("probe")
    left = g.input("left", UINT8, ["rows", 64])
    right = g.constant(np.full((64, 64), 127, np.int8))
    scale, zero = g.constant(np.float32(1)), g.constant(np.uint8(0))
    g.output(g("MatMulIntegerToFloat", left, right, scale, scale, zero, ""), "product", FLOAT, ["rows", 64])
    session = open_session(model_of(g, {}).content, "cpu", threads, as_is=True)
    return session.run(None, {"left": np.full((1, 64), 255, np.uint8)})[0][0, 0] != 64 * 255 * 127


def open_session(
    graph: bytes | Path,
    provider: str,
    threads: int,
    weights: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    captured: bool = False,
    as_is: bool = False,
) -> Any:
    """Return a session of `graph` on `provider` and no other, or raise UsageError; a DataError names the graph by `name`.

    Tensors that are not in the graph are `weights`, as onnxruntime's values, or in a file beside the graph's own.

    `as_is` leaves out onnxruntime's optimizations: they find nothing in graphs of this package that is faster afterwards, once
    nothing is to compute from weights, and searching takes a third of the time to open a small model.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if as_is:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or default_threads()
    # Between two steps the threads wait: spinning would take the cores from other processes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights:
        # The second for what is computed from weights when the session is opened, or copied to a GPU; the first keeps
        # onnxruntime from copying the others as well.
        for weight, value in weights.items():
            options.add_initializer(weight, value)
        options.add_external_initializers([*weights], [*weights.values()])
    execution_provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
    reason = "onnxruntime fell back to the CPU"
    try:
        # Without enable_fallback=0 onnxruntime replaces a provider that fails, and prints it to stdout, amid the text.
        providers = [(execution_provider, {"enable_cuda_graph": "1"})] if captured else [execution_provider]
        content = str(graph) if isinstance(graph, Path) else graph
        session = onnxruntime.InferenceSession(content, options, providers=providers, enable_fallback=0)
        # get_available_providers() lists what was compiled in, get_providers() what runs.
        if session.get_providers()[0] == execution_provider:
            session.weights = weights  # which must live as long as the session
            session.input_names = [value.name for value in session.get_inputs()]  # which takes longer than to look it up
            return session
    except Exception as error:  # onnxruntime's errors have no common base class
        if provider == "cpu":
            raise DataError(
                f"{name or graph} cannot be opened by onnxruntime {onnxruntime.__version__}: {one_line(error)}"
            ) from None
        reason = one_line(error)
    from lmdist.extras import install_command

    raise UsageError(
        f"provider cuda does not run here: {reason}. Check nvidia-smi and that CUDA and cuDNN are installed "
        f"({install_command('gpu')}), or use the provider cpu"
    )


def import_onnxruntime() -> Any:
    """Return the onnxruntime module; raises UsageError with the remedy if none or two of its wheels are installed."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on it sends telemetry by default, on Linux too
    wheels = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed(name)]
    if len(wheels) == 2:
        from lmdist.extras import remedy

        raise UsageError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            f"pip uninstall -y onnxruntime onnxruntime-gpu, then {remedy('onnxruntime')}"
        )
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        if not hasattr(onnxruntime, "InferenceSession"):  # as where one of two wheels was uninstalled
            raise ImportError("the module is empty")
    except ImportError as error:
        from lmdist.extras import remedy

        again = f"pip install --force-reinstall {wheels[0]}" if wheels else remedy("onnxruntime")
        raise UsageError(f"onnxruntime cannot be imported ({one_line(error)}): {again}") from None
    return onnxruntime


def runtime_version() -> str:
    """Return the version of onnxruntime."""
    return import_onnxruntime().__version__


@cache
def installed(distribution: str) -> bool:
    """Return whether a distribution is installed, working or not."""
    # As importlib.metadata finds it, which takes longer to import than a small bundle to open.
    start = f"{distribution.replace('-', '_')}-"
    names: list[str] = []
    for folder in sys.path:
        with contextlib.suppress(OSError):  # it does not exist, is an archive, or may not be read
            names += os.listdir(folder)
    return any(name.lower().startswith(start) and name.endswith(".dist-info") for name in names)


def load_cuda(onnxruntime: Any) -> None:
    """Load the libraries of the CUDA provider; raises UsageError if the driver or the provider is missing."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        from lmdist.extras import install_command

        raise UsageError(
            "provider cuda: this onnxruntime is built without CUDA: "
            f"pip uninstall -y onnxruntime, then {install_command('gpu')}; or use the provider cpu"
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UsageError(
            "provider cuda: libcuda.so.1 does not load, so this machine has no NVIDIA driver: use the provider cpu"
        ) from None
    # CUDA and cuDNN of pip's nvidia-* wheels. It prints what it does not find; opening the session shows whether that matters.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def default_threads() -> int:
    """Return the number of threads: the available CPUs, at most 4, since a step is too small for more."""
    return min(4, available_cpus())
