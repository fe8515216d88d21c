"""lmdist: word-level LSTM language models, from your own text to an ONNX bundle.

    import lmdist

    model = lmdist.load("bundles/news")
    print(model.generate("The president said", max_new_tokens=40, seed=7).text)

`load` samples and scores what was trained (docs/python.md), `prepare` makes a data folder of a DataFrame (docs/preparing.md);
the commands train. Errors that a user can cause are in `lmdist.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdist.text.from_pandas import prepare
    from lmdist_export.api import load
    from lmdist_export.conversion.base import base_of_bundle as base_of_bundle

__all__ = ["__version__", "load", "prepare"]

__version__ = "0.1.0"

ON_DEMAND = {
    "load": "lmdist_export.api",
    "prepare": "lmdist.text.from_pandas",
    "base_of_bundle": "lmdist_export.conversion.base",  # for a training that starts from a bundle, not for programs
}
"""What is imported when it is asked for, and the module that has it: `import lmdist` imports nothing.

lmdist_export imports lmdist; the other way leads through this table alone.
"""


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(ON_DEMAND[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
