"""The two modules of NLTK that words need, without the others: a twentieth of a second in place of two.

    from lmdist.text.light_nltk import destructive, punkt

NLTK's packages import all of their modules, and scipy and scikit-learn where these are there. Here the packages are empty while
the two modules are imported, and then all of it is out of sys.modules again, so that a program that imports NLTK itself gets it
whole. Where it has done so before, these are its modules.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nltk.tokenize import destructive, punkt

__all__ = ["destructive", "punkt"]

NAMES = ("nltk.tokenize.destructive", "nltk.tokenize.punkt")


def imported_alone() -> list[Any]:
    """Return the modules of NAMES, imported without what their packages import."""
    if "nltk" in sys.modules:
        return [*map(import_module, NAMES)]
    try:
        for name in ("nltk", "nltk.tokenize"):
            if found := find_spec(name):
                sys.modules[name] = empty_package(found)
        return [*map(import_module, NAMES)]
    finally:
        for name in [name for name in list(sys.modules) if name.partition(".")[0] == "nltk"]:
            del sys.modules[name]


def empty_package(found: ModuleSpec) -> ModuleType:
    """Return a package whose own code does not run. A thread that imports it meanwhile has the whole one through it later."""
    package = module_from_spec(found)

    def of_whole(name: str) -> Any:
        if name.startswith("__") or sys.modules.get(found.name) is package:
            raise AttributeError(f"module {found.name} has no attribute {name}")
        return getattr(import_module(found.name), name)

    package.__getattr__ = of_whole  # PEP 562
    return package


if not TYPE_CHECKING:
    destructive, punkt = imported_alone()
