"""lmdist: word-level LSTM language models, from your own text to an ONNX bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdist.text.dataframes import prepare as prepare

__version__ = "0.1.0"

ON_DEMAND = {"prepare": "lmdist.text.dataframes"}
"""What programs call, and the module that has it; `import lmdist` by itself imports nothing."""


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(ON_DEMAND[name]), name)
