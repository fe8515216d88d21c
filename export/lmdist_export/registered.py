"""Bundles in MLflow: `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/ID/PATH` in place of a folder.

The store is that of training: MLFLOW_TRACKING_URI, else `mlflow.db` in the directory. Messages contain no password. This module
does not know how a bundle got there (serving/registry.py), and imports mlflow only for such an address.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdist_export.bundle import Bundle

ADDRESS = re.compile(r"(models|runs):/+[^/]")
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a name that it does not have; the second one is for an alias."""


def is_registered(bundle: str) -> bool:
    """Return whether a bundle is named by an address in MLflow."""
    return ADDRESS.match(bundle) is not None


def load_bundle(bundle: str) -> Bundle:
    """Load the bundle of a folder or of an address in MLflow into memory; what was downloaded is removed.

    Raise MissingInputError where there is none, and DataError where it is damaged; for an address also UsageError where MLflow
    is not installed, Stopped where it cannot be reached now, DataError where it never can.
    """
    from lmdist_export.bundle import Bundle

    if not is_registered(bundle):
        return Bundle.load(bundle)
    from lmdist.tracking.store import download_artifacts

    with tempfile.TemporaryDirectory(prefix="lmdist-") as folder:
        with mlflow_errors(bundle):
            path = download_artifacts(bundle, Path(folder))
        return Bundle.load(path, called=bundle)


def version_of(name: str, alias: str) -> str:
    """Return the version of a registered model that has an alias now; raises as `load_bundle`."""
    from lmdist.tracking.address import configure, store_address
    from lmdist.tracking.store import Store

    with mlflow_errors(f"models:/{name}@{alias}"):
        configure()
        return str(Store(store_address()).client.get_model_version_by_alias(name, alias).version)


@contextmanager
def mlflow_errors(bundle: str) -> Iterator[None]:
    """Ask MLflow for a bundle inside; whatever goes wrong is an error of a user, as `load_bundle` says."""
    from lmdist.errors import DataError, MissingInputError, Stopped, require
    from lmdist.tracking.address import packages_of, sqlite_file, store_address, without_password
    from lmdist.tracking.failures import FinalError, upload_error

    address = store_address()
    require(*packages_of(address), purpose=f"{bundle} lies in MLflow: ")
    place = without_password(address)
    if (file := sqlite_file(address)) and not file.exists():  # MLflow would create it
        raise MissingInputError(f"{bundle}: {file} does not exist; set MLFLOW_TRACKING_URI to the MLflow that has the bundle")
    try:
        yield
    except Exception as error:  # any exception of MLflow and the libraries below it
        failure = upload_error(error)
        if getattr(error, "error_code", "") in NOT_THERE:
            raise MissingInputError(
                f"MLflow ({place}) has no {bundle} ({failure}); lmdist-export --register writes one"
            ) from None
        kind = DataError if isinstance(failure, FinalError) else Stopped
        raise kind(f"{bundle} cannot be downloaded from MLflow ({place}): {failure}") from None
