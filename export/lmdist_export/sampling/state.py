"""The state of texts between two calls: what was read, what is still to read, and the random numbers to come.

No onnxruntime here: a state is saved, forked and joined without it.

Shapes: B batch, P tokens of a prompt, N new tokens, A uniform numbers a token, V vocabulary (V' rounded up to whole blocks), S
the sum of the layers' sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

from lmdist.errors import DataError, MissingInputError, one_line
from lmdist_export.graph.cache import CACHE, EMPTY
from lmdist_export.graph.cell import STATE

ModelState = tuple[NDArray[Any], ...]
"""The parts of the state in the order of PARTS; the memory of a neural cache only where one is asked for.

The parts of cell.STATE are (B, S): the layers side by side. Row b is all that the model knows of text b.
"""
PARTS = (*STATE, *CACHE)
BLOCK = 1_024
"""Numbers that are drawn at a time."""


@dataclass(frozen=True)
class State:
    """The state of B texts: what was read, the tokens still to read, and the random numbers to come."""

    tokens: NDArray[np.int64]
    """(B, P): the tokens that were not read yet, of each row its first `lengths`."""
    lengths: NDArray[np.int64]
    """(B)"""
    model: ModelState
    """The model's state before `tokens`."""
    generators: tuple[np.random.Generator | DrawnAhead, ...] = ()
    """A generator for each row; none before the state is seeded. States share them, so `Sampler.generate` copies them."""
    counts: NDArray[np.float32] | None = None
    """(B, V'): how often each token was generated; None if nothing asked for it."""

    def __len__(self) -> int:
        return len(self.lengths)

    def seeded(self, seed: int) -> State:
        """Return the same texts with new generators of random numbers: that of row b is seeded with the seed and b."""
        return replace(self, generators=tuple(np.random.default_rng([seed, row]) for row in range(len(self))))

    def fork(self, texts: int, seed: int) -> State:
        """Return `texts` rows that all continue this one, each with random numbers of its own."""
        assert len(self) == 1, len(self)
        return self.rows([0] * texts).seeded(seed)

    def rows(self, numbers: Sequence[int]) -> State:
        """Return the rows with these numbers."""
        index = list(numbers)
        if index == list(range(len(self))):
            return self
        return State(
            self.tokens[index],
            self.lengths[index],
            select(self.model, index),
            tuple(self.generators[row] for row in index) if self.generators else (),
            None if self.counts is None else self.counts[index],
        )

    def counts_like(self, other: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the counts (B, V'), zeros if nothing asked for them yet; V' is that of the counts of an `other` state."""
        return np.zeros((len(self), other.shape[1]), np.float32) if self.counts is None else self.counts

    def save(self, path: str | Path, notes: Any = None) -> None:
        """Write the state to a file, atomically, with `notes` in JSON beside it."""
        from lmdist.storage.atomic import atomic_path  # what only samples has no need of it

        # The file's key for the tokens is "words": files of earlier versions have it.
        arrays = {"words": self.tokens, "lengths": self.lengths, **by_part(self.model)}
        if self.counts is not None:
            arrays["counts"] = self.counts
        generators = json.dumps([generator.bit_generator.state for generator in self.generators])
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, generators=np.array(generators), notes=np.array(json.dumps(notes)), allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read a state; raises MissingInputError, or DataError if the file holds none."""
        return cls.load_with_notes(path)[0]

    @classmethod
    def load_with_notes(cls, path: str | Path) -> tuple[State, Any]:
        """Read a state and what was noted beside it; raises MissingInputError, or DataError if the file holds none."""
        try:
            # Opened here, because numpy does not close a file that is damaged.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                generators = tuple(restored(state) for state in json.loads(str(file["generators"])))
                counts = file.get("counts")
                model = tuple(file[name] for name in (PARTS if CACHE[0] in file else STATE))
                state = cls(file["words"], file["lengths"], model, generators, counts)
                if state.lengths.ndim != 1 or len(generators) not in (0, len(state)) or not len(state):
                    raise ValueError(f"lengths of the shape {state.lengths.shape}, and {len(generators)} generators")
                return state, json.loads(str(file["notes"])) if "notes" in file else None
        except FileNotFoundError:
            raise MissingInputError(f"{path} does not exist; a state written by State.save is expected") from None
        except Exception as error:  # numpy, zipfile and json each have errors of their own
            raise DataError(f"{path} is not a state written by State.save: {one_line(error)}") from None


def concatenate(states: Sequence[State]) -> State:
    """Return the rows of all `states`, one after the other."""
    if len(states) == 1:
        return states[0]
    longest = max(state.tokens.shape[1] for state in states)
    tokens = np.zeros((sum(map(len, states)), longest), np.int64)
    row = 0
    for state in states:
        tokens[row : row + len(state), : state.tokens.shape[1]] = state.tokens
        row += len(state)
    counted = next((state.counts for state in states if state.counts is not None), None)
    return State(
        tokens,
        np.concatenate([state.lengths for state in states]),
        joined([state.model for state in states]),
        tuple(generator for state in states for generator in state.generators),
        None if counted is None else np.concatenate([state.counts_like(counted) for state in states]),
    )


def by_part(state: ModelState) -> dict[str, NDArray[Any]]:
    """Return the parts of a model's state by their names."""
    return dict(zip(PARTS, state, strict=False))


def joined(states: Sequence[ModelState]) -> ModelState:
    """Return the rows of all states; where rows remember less than others, their first places are EMPTY.

    All of them have a memory, or none.
    """
    assert len({len(state) for state in states}) == 1, f"states with a memory and without one: {[*map(len, states)]} parts"
    parts = {name: [by_part(state)[name] for state in states] for name in by_part(states[0])}
    for name, empty in zip(CACHE, (0, EMPTY), strict=True):
        most = max((part.shape[1] for part in parts.get(name, ())), default=0)
        for place, part in enumerate(parts.get(name, ())):
            width = [(0, 0), (most - part.shape[1], 0), *[(0, 0)] * (part.ndim - 2)]
            parts[name][place] = np.pad(part, width, constant_values=empty) if part.shape[1] < most else part
    return tuple(np.concatenate(values) for values in parts.values())


def remembered(state: ModelState, pairs: Sequence[NDArray[Any]], size: int) -> ModelState:
    """Return the memory of a state with new `pairs` added, parts as those of graph.cache.NEW; the last `size` are kept."""
    hidden, tokens = state[len(STATE) :]
    is_new = pairs[1] != EMPTY  # (B, T)
    counts = is_new.sum(axis=1)
    places = max(1, min(size, int((np.count_nonzero(tokens != EMPTY, axis=1) + counts).max())))
    after = np.zeros((len(tokens), places, hidden.shape[2]), np.float32), np.full((len(tokens), places), EMPTY)
    for row, count in enumerate(counts.tolist()):
        recent = min(count, places)
        kept = min(places - recent, tokens.shape[1])
        for part, old, new in zip(after, (hidden, tokens), pairs, strict=True):
            part[row, places - recent - kept : places - recent] = old[row, tokens.shape[1] - kept :]
            part[row, places - recent :] = new[row, is_new[row]][count - recent :]
    return after


def select(state: ModelState, rows: Sequence[int] | NDArray[np.integer]) -> ModelState:
    """Return these rows of a model's state."""
    return tuple(part[rows] for part in state)


def copy_generator(generator: np.random.Generator | DrawnAhead) -> np.random.Generator:
    """Return a generator of the same numbers."""
    return restored(generator.bit_generator.state)


def restored(state: Any) -> np.random.Generator:
    """Return the generator that has this state."""
    generator = np.random.Generator(np.random.PCG64(NO_SEED))
    generator.bit_generator.state = state
    return generator


class NoSeed(ISeedSequence):
    """The seed of a generator whose state is set at once: mixing a real one takes longer than everything else."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """Return zeros."""
        return np.zeros(n_words, dtype)


NO_SEED: Any = NoSeed()  # numpy's own types know no ISeedSequence


class DrawnAhead:
    """The numbers of a generator, of which a block is drawn before they are needed.

    While numpy draws, another thread may take the interpreter's lock; a call of the graph needs numbers for each of its rows.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self.first = generator.bit_generator.state
        self.num_used = 0
        self.ahead = np.empty(0, np.float32)

    @property
    def bit_generator(self) -> Any:
        """Return that of a generator whose next number is the next one here."""
        generator = restored(self.first)
        generator.random(self.num_used, np.float32)
        return generator.bit_generator

    def random(self, shape: tuple[int, ...], kind: type[np.float32]) -> NDArray[np.float32]:
        """Return the next numbers, as a generator does."""
        count = math.prod(shape)
        if count > len(self.ahead):
            self.ahead = np.concatenate([self.ahead, self.generator.random(max(count, BLOCK), kind)])
        found, self.ahead = self.ahead[:count], self.ahead[count:]
        self.num_used += count
        return found.reshape(shape)


def uniform_numbers(
    generators: Sequence[np.random.Generator | DrawnAhead], num_tokens: int, attempts: int
) -> NDArray[np.float32]:
    """Return the next uniform numbers of each row, (N, B, A), which advances the generators."""
    rows = [generator.random((num_tokens, attempts), np.float32) for generator in generators]
    return np.ascontiguousarray(np.stack(rows, axis=1))
