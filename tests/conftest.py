"""One thread per process: the models are tiny, and the jobs that the tests start share the CPUs.

No test measures time: a deadline of Hypothesis for an example would fail on a busy machine only.
"""

import importlib.util
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lmdist.storage.locks import exclusive_lock
from lmdist.tracking.store import create_sqlite

# The uploader of a run has the lowest priority: beside tests of normal priority it would get too little CPU time.
os.nice(19)
# A background job of a shell ignores Ctrl-C, and so would its child processes.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
settings.register_profile("lmdist", deadline=None)
settings.load_profile("lmdist")

PACKAGES = {
    "cluster/test_dask.py": ("distributed",),
    "cluster/test_manifests.py": ("yaml", "yamllint", "kubernetes_validate", "kubeflow_trainer_api"),
    "cluster/test_pods.py": ("yaml",),
    "cluster/test_sky.py": ("yaml",),
    "cluster/test_waiting.py": ("yaml",),
    "conversion/test_tokenizer_json.py": ("tokenizers",),
    "job/test_sweep.py": ("optuna",),
}
"""Test files, and the packages of extras that they need."""

# Without these extras, pytest runs all other tests.
collect_ignore = [file for file, names in PACKAGES.items() if not all(importlib.util.find_spec(name) for name in names)]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of MLflow in SQLite, to be copied: its migrations take seconds. All workers of pytest-xdist share it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "empty.db"
    with exclusive_lock(folder / "empty.lock", 300):
        if not path.exists():
            create_sqlite(folder / "new.db")
            with closing(sqlite3.connect(folder / "new.db")) as database, database:
                database.execute("DELETE FROM experiments")  # of which the first one has the address of its artifacts
            (folder / "new.db").rename(path)
    return path
