"""NLTK without scipy and scikit-learn: half a second in place of two, or less where these are not installed.

NLTK imports them for statistics that no word needs, where they are there. In a process that has imported this module first,
those statistics do not work: it is for the processes of lmdist's own commands, and not for a user's program.
"""

from __future__ import annotations

import sys

left_out = [name for name in ("scipy", "sklearn") if name not in sys.modules]
for name in left_out:
    sys.modules[name] = None  # pyright: ignore[reportArgumentType] - importing it is an ImportError, which NLTK expects
try:
    import nltk.tokenize.destructive
    import nltk.tokenize.punkt  # noqa: F401
finally:
    for name in left_out:
        del sys.modules[name]
