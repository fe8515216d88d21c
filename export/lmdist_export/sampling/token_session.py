"""The token graph, called once a token, with the state on the device.

This module knows no sampling: what it feeds was prepared by the sampler.

Shapes: B batch, N new tokens.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate, count
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import UsageError
from lmdist_export.graph.cell import STATE
from lmdist_export.graph.graphs import capturable, token_graph
from lmdist_export.options import Features
from lmdist_export.sampling.runtime import Runtime, import_onnxruntime
from lmdist_export.sampling.state import ModelState


class Generated(NamedTuple):
    """What a graph has generated."""

    tokens: NDArray[np.int64]
    """(N, B)"""
    mass: NDArray[np.float32]
    """Finite if all logits were."""
    state: ModelState
    counts: NDArray[np.float32] | None
    """(B, V'): how often each token was generated; None without penalties."""


class TokenSession:
    """The token graph, called by I/O binding: what is carried from token to token stays on the device.

    It is stored there twice. A call reads one set of values and writes the other, and the next call does the reverse. Not in
    place: the call that captures a CUDA graph runs three times (two to allocate memory, then the captured one), each new thread
    captures again, and a captured graph is bound to its addresses. So a call must not change what it reads, and values keep
    their place while their shapes stay the same.
    """

    def __init__(self, runtime: Runtime, features: Features) -> None:
        self.runtime = runtime
        self.features = features
        self.captured = runtime.provider == "cuda" and capturable(runtime.sizes, features)
        self.session = self.open()
        self.carried = [value.name.removeprefix("next_") for value in self.session.get_outputs()]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: list[dict[str, Any]] = []
        """Before even tokens and before odd ones: an OrtValue for each input, the same for one that is not carried."""
        self.bindings: list[tuple[Any, Any]] = []
        """For even tokens and for odd ones: the binding, and the options of the call."""
        self.graph_ids = count(1)
        self.in_use = Lock()
        """Held by the thread whose tokens the values are."""

    def open(self) -> Any:
        """Open a session, without a CUDA graph if onnxruntime rejects it: the graph only saves time."""
        try:
            return self.runtime.open(partial(token_graph, features=self.features), self.captured)
        except UsageError:
            if not self.captured:
                raise
            self.captured = False
            return self.open()

    def generate(self, feed: dict[str, Any]) -> Generated:
        """Return what the generation graph would for the same feed, if all tokens of its prompts but the last were read."""
        with self.in_use:
            return self.generate_alone(feed)

    def generate_alone(self, feed: dict[str, Any]) -> Generated:
        """Return what `generate` does; no other thread may call it meanwhile."""
        self.write(feed)
        tokens: list[NDArray[np.int64]] = []
        going = feed["going"]
        for numbers in feed["uniform"]:
            self.values[0]["uniform"].update_inplace(numbers)
            self.run(len(tokens) % 2)
            tokens.append(self.read("word", len(tokens) + 1))
            going = going & ~np.isin(tokens[-1], feed["stops"])
            if not going.any():
                break
        layers = range(len(self.runtime.sizes.layer_sizes))
        state = tuple(np.concatenate([self.read(f"{part}_{layer}", len(tokens)) for layer in layers], axis=1) for part in STATE)
        counts = self.read("counts", len(tokens)) if self.features.adjusted else None
        return Generated(np.array(tokens), self.read("mass", len(tokens)), state, counts)

    def write(self, feed: dict[str, Any]) -> None:
        """Set all inputs before the first token."""
        ends = list(accumulate(self.runtime.sizes.layer_sizes))[:-1]
        state = {f"{part}_{layer}": value for part in STATE for layer, value in enumerate(np.split(feed[part], ends, axis=1))}
        rows = np.arange(len(feed["lengths"]))
        first = {
            "word": feed["prompt"][rows, feed["lengths"] - 1],
            "mass": np.zeros((len(rows), 1), np.float32),
            "uniform": feed["uniform"][0],
        }
        inputs = feed | state | first
        # Copies, because on a CPU an OrtValue shares the memory of the array that it was created from.
        arrays = {value.name: np.array(inputs[value.name]) for value in self.session.get_inputs()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes == self.shapes:
            for name, array in arrays.items():
                self.values[0][name].update_inplace(array)
            return
        even = {name: self.value(name, array) for name, array in arrays.items()}
        self.values = [even, even | {name: self.value(name, arrays[name].copy()) for name in self.carried}]
        self.shapes = shapes
        self.bind()

    def value(self, name: str, array: NDArray[Any]) -> Any:
        """Return an OrtValue of `array` where the input `name` is read; TopK reads its k on the host."""
        device = "cpu" if name == "top_k" else self.runtime.provider
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, device, 0)

    def bind(self) -> None:
        """Bind the values to the session in both directions, each with a CUDA graph of its own."""
        self.bindings = []
        for before, after in (self.values, self.values[::-1]):
            binding = self.session.io_binding()
            for name, value in before.items():
                binding.bind_ortvalue_input(name, value)
            for name in self.carried:
                binding.bind_ortvalue_output(f"next_{name}", after[name])
            options = import_onnxruntime().RunOptions()
            options.log_severity_level = 4
            options.add_run_config_entry("gpu_graph_id", str(next(self.graph_ids)))
            self.bindings.append((binding, options))

    def run(self, number: int) -> None:
        """Generate an even token (0) or an odd one (1)."""
        try:
            self.session.run_with_iobinding(*self.bindings[number])
        except Exception:  # onnxruntime's errors have no common base class
            if not self.captured:
                raise
            self.captured = False
            self.session = self.open()
            self.bind()
            self.run(number)

    def read(self, name: str, num_tokens: int) -> NDArray[Any]:
        """Return what is carried as `name` after so many tokens."""
        return np.array(self.values[num_tokens % 2][name].numpy())
