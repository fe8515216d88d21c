"""The state of texts between two runs of a graph: what was read, what is still to read, and the random numbers to come.

Shapes: B rows, P words of a prompt, N new words, A uniform numbers a word, V vocabulary (V' rounded up to whole blocks), S the
sum of the layers' sizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import DataError, MissingInputError, one_line

ModelState = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(h, c), each (B, S): the layers' states side by side. Row b is all that the model knows of text b."""


@dataclass(frozen=True)
class State:
    """Where B texts stand: what was read, the words still to read, and the random numbers to come."""

    words: NDArray[np.int64]
    """(B, P): the words that were not read yet, of each row its first `lengths`."""
    lengths: NDArray[np.int64]
    """(B)"""
    h: NDArray[np.float32]
    """(B, S)"""
    c: NDArray[np.float32]
    """(B, S)"""
    generators: tuple[np.random.Generator, ...] = ()
    """Of each row; none where no word was to be drawn yet. States share them: who draws takes copies."""
    counts: NDArray[np.float32] | None = None
    """(B, V'): how often each word was made; None where nothing asked for it."""

    def __len__(self) -> int:
        return len(self.lengths)

    def seeded(self, seed: int) -> State:
        """The same texts with random numbers from their start: those of row b are made of the seed and b."""
        return replace(self, generators=tuple(np.random.default_rng([seed, row]) for row in range(len(self))))

    def fork(self, texts: int, seed: int) -> State:
        """`texts` rows that all go on from this one, each with random numbers of its own."""
        assert len(self) == 1, len(self)
        return self.rows([0] * texts).seeded(seed)

    def rows(self, numbers: Sequence[int]) -> State:
        """The rows of these numbers."""
        index = list(numbers)
        return State(
            self.words[index],
            self.lengths[index],
            self.h[index],
            self.c[index],
            tuple(self.generators[row] for row in index) if self.generators else (),
            None if self.counts is None else self.counts[index],
        )

    def counts_like(self, other: NDArray[np.float32]) -> NDArray[np.float32]:
        """The counts (B, V'), zeros where nothing asked for them yet; V' is that of the counts of an `other` state."""
        return np.zeros((len(self), other.shape[1]), np.float32) if self.counts is None else self.counts

    def save(self, path: Path) -> None:
        """Write the state to a file."""
        arrays = {"words": self.words, "lengths": self.lengths, "h": self.h, "c": self.c}
        if self.counts is not None:
            arrays["counts"] = self.counts
        generators = json.dumps([generator.bit_generator.state for generator in self.generators])
        with path.open("wb") as file:
            np.savez(file, generators=np.array(generators), allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read a state; raises MissingInputError, or DataError where the file holds none."""
        try:
            # Opened here: numpy leaves a file open that it finds to be damaged.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                generators = tuple(restored(state) for state in json.loads(str(file["generators"])))
                counts = file.get("counts")
                return cls(file["words"], file["lengths"], file["h"], file["c"], generators, counts)
        except FileNotFoundError:
            raise MissingInputError(f"{path} is not there; a state written by State.save is expected") from None
        except Exception as error:  # numpy, zipfile and json each have errors of their own
            raise DataError(f"{path} is not a state written by State.save: {one_line(error)}") from None


def joined(states: Sequence[State]) -> State:
    """The rows of all `states`, one after the other."""
    longest = max(state.words.shape[1] for state in states)
    padded = [np.pad(state.words, ((0, 0), (0, longest - state.words.shape[1]))) for state in states]
    counted = next((state.counts for state in states if state.counts is not None), None)
    return State(
        np.concatenate(padded),
        np.concatenate([state.lengths for state in states]),
        np.concatenate([state.h for state in states]),
        np.concatenate([state.c for state in states]),
        tuple(generator for state in states for generator in state.generators),
        None if counted is None else np.concatenate([state.counts_like(counted) for state in states]),
    )


def copied(generator: np.random.Generator) -> np.random.Generator:
    """A generator that will draw the same numbers."""
    return restored(generator.bit_generator.state)


def restored(state: Any) -> np.random.Generator:
    """The generator of a state."""
    generator = np.random.default_rng(0)
    generator.bit_generator.state = state
    return generator


def uniform_numbers(generators: Sequence[np.random.Generator], words: int, attempts: int) -> NDArray[np.float32]:
    """The next uniform numbers of each row, (N, B, A)."""
    rows = [generator.random((words, attempts), np.float32) for generator in generators]
    return np.ascontiguousarray(np.stack(rows, axis=1))
