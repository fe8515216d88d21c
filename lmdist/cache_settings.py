"""The parameters of the neural cache: how many tokens it remembers, its theta, and its weight; and `cache.json` of a run.

The cache of Grave et al. 2017 (arXiv:1612.04426) remembers pairs of a hidden state and the token that came next. With h the
hidden state now, and (h_i, x_i) the pairs of the last `size` tokens,

    p_cache(w)  is proportional to  the sum over i with x_i = w of exp(theta h . h_i)
    p(w)        = (1 - weight) p_model(w) + weight p_cache(w)

`lmdist-evaluate RUN --cache SIZE` tunes theta and the weight, and `lmdist-export` takes them into the bundle. Nothing is
computed here: lmdist/training/neural_cache.py does that by torch, export/lmdist_export/graph/cache.py in the graphs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lmdist.bounds import between, check_bounds
from lmdist.storage.atomic import write_atomic
from lmdist.storage.reading import as_json, read_json
from lmdist.storage.schema import check_schema, check_version, dataclass_from_json

TUNED = "cache.json"
"""In a run's folder: what was tuned last, and for which parameters."""
FORMAT, VERSION = "lmdist cache", 1
MAX_SIZE = 1_000_000


@dataclass(frozen=True)
class NeuralCache:
    """The parameters of a cache."""

    size: Annotated[int, between(1, MAX_SIZE)]
    """The number of tokens that it remembers."""
    theta: Annotated[float, between(0, 1_000)]
    """How much more near hidden states count than far ones; with 0 all count the same."""
    weight: Annotated[float, between(0, 1)]
    """The share of the cache in the mixture."""

    def __post_init__(self) -> None:
        check_bounds(self, "cache")


def write_tuned(run: Path, sha256: str, cache: NeuralCache) -> None:
    """Write what was tuned for the parameters with this sha256 into a run's folder."""
    values = {"format": FORMAT, "version": VERSION, "sha256": sha256, "cache": dataclasses.asdict(cache)}
    write_atomic(run / TUNED, as_json(values))


def read_tuned(run: Path, sha256: str) -> NeuralCache | None:
    """Return what was tuned for the parameters with this sha256, if anything was; raise DataError for a damaged file.

    A run that is trained anew has other parameters at the same step.
    """
    path = run / TUNED
    if not path.is_file():
        return None
    found = read_json(path)
    check_version(found, (FORMAT, VERSION), path)
    check_schema(found, {"sha256": str, "cache": NeuralCache}, path)
    return dataclass_from_json(NeuralCache, found["cache"], path, "cache") if found["sha256"] == sha256 else None
