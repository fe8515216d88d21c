"""lmdist: word-level LSTM language models, from your own text to an ONNX bundle.

    import lmdist

    model = lmdist.load("bundles/news")
    print(model.generate("The president said", max_new_tokens=40, seed=7).text)

`load` samples and scores what was trained (docs/python.md); the commands train. Errors that a user can cause are in
`lmdist.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdist_export.api import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Return `load`, from the package that samples, which imports this one: so it is imported when it is first asked for."""
    if name == "load":
        from lmdist_export.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load"]
