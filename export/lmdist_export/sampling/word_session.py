"""The word graph, run once a word with the state on the device.

Shapes: B rows.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate, count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import UsageError
from lmdist_export.graph.graphs import capturable, word_graph
from lmdist_export.options import Features
from lmdist_export.sampling.runtime import Runtime, import_onnxruntime


class WordSession:
    """The word graph, run once a word by I/O binding: what goes from word to word stays on the device.

    It lies there twice. A run reads one set of values and writes the other, and the next run the other way round. Not in
    place: the run that captures a CUDA graph is three runs (two to find room, then the captured one), each thread that comes
    captures anew, and what was captured is bound to its addresses. So a run must leave what it has read, and values stay
    where they are while their shapes do.
    """

    def __init__(self, runtime: Runtime, features: Features) -> None:
        self.runtime = runtime
        self.features = features
        self.captured = runtime.provider == "cuda" and capturable(runtime.sizes, features)
        self.session = self.opened()
        self.carried = [value.name.removeprefix("next_") for value in self.session.get_outputs()]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: list[dict[str, Any]] = []
        """Before even words and before odd ones: an OrtValue for each input, the same for one that is not carried on."""
        self.bindings: list[tuple[Any, Any]] = []
        """To make even words and odd ones: what is bound, and the options of the run."""
        self.graph_ids = count(1)

    def opened(self) -> Any:
        """A session, without a CUDA graph if onnxruntime finds that it cannot be: it saves time, and nobody asked for it."""
        try:
            return self.runtime.open(partial(word_graph, features=self.features), self.captured)
        except UsageError:
            if not self.captured:
                raise
            self.captured = False
            return self.opened()

    def make(self, feed: dict[str, Any]) -> list[NDArray[Any]]:
        """What `run_generation` gives for the same feed, whose prompts were read but for the last word of each row."""
        self.write(feed)
        made: list[NDArray[np.int64]] = []
        going = feed["going"]
        for numbers in feed["uniform"]:
            self.values[0]["uniform"].update_inplace(numbers)
            self.run(len(made) % 2)
            made.append(self.read("word", len(made) + 1))
            going = going & ~np.isin(made[-1], feed["stops"])
            if not going.any():
                break
        layers = range(len(self.runtime.sizes.layer_sizes))
        after = [np.concatenate([self.read(f"{name}_{layer}", len(made)) for layer in layers], axis=1) for name in "hc"]
        counts = [self.read("counts", len(made))] if self.features.adjusted else []
        return [np.array(made), self.read("mass", len(made)), *after, *counts]

    def write(self, feed: dict[str, Any]) -> None:
        """Set all inputs before the first word."""
        ends = list(accumulate(self.runtime.sizes.layer_sizes))[:-1]
        parts = {f"{name}_{layer}": part for name in "hc" for layer, part in enumerate(np.split(feed[name], ends, axis=1))}
        rows = np.arange(len(feed["lengths"]))
        first = {
            "word": feed["prompt"][rows, feed["lengths"] - 1],
            "mass": np.zeros((len(rows), 1), np.float32),
            "uniform": feed["uniform"][0],
        }
        every = feed | parts | first
        # Copies: on a CPU an OrtValue is the array that it was made of.
        arrays = {value.name: np.array(every[value.name]) for value in self.session.get_inputs()}
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
        """An OrtValue of `array` where the input `name` is read; TopK reads its k on the host."""
        device = "cpu" if name == "top_k" else self.runtime.provider
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, device, 0)

    def bind(self) -> None:
        """Bind the values to the session, each of the two ways for a CUDA graph of its own."""
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
        """Make an even word (0) or an odd one (1)."""
        try:
            self.session.run_with_iobinding(*self.bindings[number])
        except Exception:  # onnxruntime's errors have no common class of their own
            if not self.captured:
                raise
            self.captured = False
            self.session = self.opened()
            self.bind()
            self.run(number)

    def read(self, name: str, made: int) -> NDArray[Any]:
        """What is carried on under `name` after so many words."""
        return np.array(self.values[made % 2][name].numpy())
