"""benchmarks/fuzz.py: each kind of damage changes a file, and what must never happen is seen; the run itself is by hand."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from damages import KINDS
from fuzz import Case, Ended, Expected, forge, judge, snapshot
from lmdist.storage.checksums import OWN_CHECKSUM, check_own_checksum, checksums, facts_of, own_checksum, verify_checksums
from lmdist.storage.held import HeldFolder
from lmdist.text.data_folder import BLOCKS

FILES = {
    "a.json": '{"files": {"b.bin": {"bytes": 9}}, "name": "x"}',
    "b.txt": "one\ntwo\n",
    "c.bin": "\0\1" * 99,
}


def make_world(world: Path) -> Path:
    for name in ("outside", "home", "data"):
        (world / name).mkdir(parents=True)
    (world / "outside" / "secret").write_text("theirs")
    for name, content in FILES.items():
        (world / "data" / name).write_text(content)
    return world


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_a_file_or_says_that_it_means_nothing(kind: str, tmp_path: Path) -> None:
    original = make_world(tmp_path / "original")
    done = []
    for name in FILES:
        world = Path(shutil.copytree(original, tmp_path / "case"))
        what = KINDS[kind](world / "data" / name, random.Random(3))
        assert (snapshot(world, "generate") != snapshot(original, "generate")) == bool(what), (name, what)
        done.append(what)
        shutil.rmtree(world)
    assert any(done)


LINE = "lmdist-evaluate: error: data/b.txt is damaged\n"
ENDS = {
    "no end": Ended(None, "", ""),
    "a signal": Ended(-11, "", ""),
    "a traceback": Ended(0, "", "Traceback (most recent call last):\n  ...\nKeyError: 'x'\n"),
    "another code": Ended(75, "", LINE),
    "no reason": Ended(65, "", ""),
    "two lines": Ended(65, "", LINE + LINE),
    "more after it": Ended(65, "", f"{LINE}and so on\n"),
    "a control character": Ended(65, "", LINE.replace("damaged", "\x1b[31m")),
    "another result": Ended(0, "4", ""),
    "that of another checkpoint, without a word": Ended(0, "2", ""),
    "a warning, and the result of no checkpoint": Ended(0, "4", "warning: skipping a damaged checkpoint: x\n"),
}


@pytest.mark.parametrize("how", ENDS)
def test_what_must_not_happen_is_bad(how: str, tmp_path: Path) -> None:
    outcome, why = judge(Case(1, "data", "data/b.txt", "flip", "evaluate"), ENDS[how], Expected("3", ["2"]), tmp_path)
    assert outcome == "BAD"
    assert why


def test_other_outcomes(tmp_path: Path) -> None:
    damaged, forged = (Case(1, "data", "data/b.txt", kind, "evaluate") for kind in ("flip", "forged line"))
    warning = "warning: skipping a damaged checkpoint: x\n"
    for case, ended, expected in (
        (damaged, Ended(65, "", f"reading\n{LINE}"), "refused 65"),
        (damaged, Ended(0, "3", ""), "same"),
        (damaged, Ended(0, "2", warning), "announced"),
        (forged, Ended(0, "4", ""), "obeyed"),
    ):
        assert judge(case, ended, Expected("3", ["2"]), tmp_path) == (expected, "")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("forged")])
@pytest.mark.parametrize("manifest", ["meta.json", "manifest.json"])
def test_what_is_forged_has_its_checksums(manifest: str, kind: str, tmp_path: Path) -> None:
    """Without them each forged case would be refused, and no reader of what a stranger writes be tried."""
    files = {"text.json": '{"clean": true, "limit": 3, "name": "x"}', "vocab.txt": "<unk>\n<eos>\nthe\n"}
    done = []
    for name in (*files, BLOCKS, manifest):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content)
        value: dict[str, Any] = {"name": "x", "step": 3, "files": checksums(folder)}
        (folder / BLOCKS).write_text('{"crc32": {"train.bin": "00000000"}, "version": 1}')
        value |= {"blocks": facts_of(folder / BLOCKS)} if manifest == "meta.json" else {}
        value |= {OWN_CHECKSUM: own_checksum(value)} if manifest == "manifest.json" else {}
        (folder / manifest).write_text(json.dumps(value))
        if not KINDS[kind](folder / name, random.Random(4)):
            continue
        forge(folder / name)
        found = json.loads((folder / manifest).read_text())
        if OWN_CHECKSUM in found:
            check_own_checksum(found, folder / manifest, set())
        if name != manifest:
            verify_checksums(HeldFolder(folder), found["files"] | ({BLOCKS: found["blocks"]} if "blocks" in found else {}))
        done.append(name)
    assert done == ["vocab.txt"] if kind == "forged line" else done == ["text.json", BLOCKS, manifest]
