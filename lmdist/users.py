"""A user without a name: a container may run as any number, of which the machine knows neither a name nor a home folder."""

from __future__ import annotations

import os


def ensure_user() -> None:
    """Set HOME and USER where neither the environment nor the machine's list of users has them.

    NLTK, MLflow and torch ask for both when they are imported, and fail. The home folder is `/`, as docker sets it: it
    belongs to root, so that nobody else can have left settings there.
    """
    if os.name != "posix":
        return
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        for name, value in (("HOME", "/"), ("USER", str(os.getuid()))):
            os.environ[name] = os.environ.get(name) or value
