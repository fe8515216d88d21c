"""The two modules of NLTK that words need, without the others: a twentieth of a second in place of two.

NLTK's packages import all of their modules, and scipy and scikit-learn where these are there. In a process that has imported
this module first, a later `import nltk` imports them, but does not name these two as its own: it is for the processes of
lmdist's own commands, and not for a user's program.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec

bare = [name for name in ("nltk", "nltk.tokenize") if name not in sys.modules]
for name in bare:
    found = find_spec(name)
    assert found, f"{name} is not installed"
    sys.modules[name] = module_from_spec(found)  # whose own code does not run
try:
    for name in ("nltk.tokenize.destructive", "nltk.tokenize.punkt"):
        import_module(name)
finally:
    for name in bare:
        del sys.modules[name]
