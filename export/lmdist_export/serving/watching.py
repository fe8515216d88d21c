"""What `--watch` looks at: whether a folder, or an alias of MLflow's registry, stands for another bundle than before.

    watched = Watched("models:/news@champion")
    watched.version()           # "3": the version of the model that has the alias now
    watched.address("3")        # "models:/news/3": that version, whatever the alias does meanwhile

A folder is another bundle when the bytes of its manifest, or of generation_config.json, are others. This module loads nothing.
"""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

from lmdist.errors import UsageError
from lmdist.storage.held import HeldFolder, read_held
from lmdist_export import registered
from lmdist_export.bundle import EXPECTED, GENERATION_CONFIG, MANIFEST

ALIAS = re.compile(r"models:/+([^/@]+)@([^/@]+)")


class Watched:
    """A bundle that may change."""

    def __init__(self, bundle: str) -> None:
        """Watch a folder or an alias; raises UsageError for an address that always stands for the same bundle."""
        self.bundle = bundle
        self.alias = ALIAS.fullmatch(bundle)
        if registered.is_registered(bundle) and not self.alias:
            raise UsageError(f"--watch: {bundle} is always the same bundle; a folder, or models:/NAME@ALIAS, is expected")

    def version(self) -> str:
        """Return what tells the bundle that is there now from others; raises an error of errors.py where there is none."""
        if self.alias:
            return registered.version_of(*self.alias.groups())
        return read_held(Path(self.bundle), folder_version, EXPECTED)

    def address(self, version: str) -> str:
        """Return the address of a version."""
        return f"models:/{self.alias[1]}/{version}" if self.alias else self.bundle


def folder_version(files: HeldFolder) -> str:
    """Return the beginning of a sha256 of the files that say which bundle a folder is, and how it generates."""
    files.read_json(MANIFEST)  # raises where there is none
    content = [files.read(name, 2**24) for name in (MANIFEST, GENERATION_CONFIG)]
    return sha256(b"".join(sha256(part).digest() for part in content)).hexdigest()[:12]
