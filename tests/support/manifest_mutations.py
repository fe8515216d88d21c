"""Wrong changes of the manifests, read from tests/cluster/wrong_changes.txt: each stands under the rule that has to find it.

    OVERLAY KIND PATH = VALUE          the value, in YAML, replaces what lies there
    OVERLAY KIND PATH += VALUE         the value is appended to a list
    OVERLAY KIND PATH ~ OLD -> NEW     a text is replaced in a text
    OVERLAY [KIND PATH] gone | twice | reversed
    FILE ~ OLD -> NEW => PART          the same in a file, with a part of the sentence that must be found

A path consists of keys, of the `name` or the index of a list's entry. It may begin with `job`, `pod` or `main`, which stand for
the Job's specification, the pod's, and its first container, wherever that kind has them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from support.manifests import ROOT, Document, Render, rendered

JOBS = {
    "Job": "spec",
    "JobSet": "spec replicatedJobs node template spec",
    "TrainingRuntime": "spec template spec replicatedJobs node template spec",
}
PODS = {"Pod": "spec", "Deployment": "spec template spec"} | {kind: f"{path} template spec" for kind, path in JOBS.items()}
CHANGE = re.compile(r"(?P<at>.*?) (?:(?P<word>gone|twice|reversed)|(?P<sign>\+?=) (?P<value>.*)|~ (?P<old>.*) -> (?P<new>.*))")


@dataclass(frozen=True)
class Change:
    """One wrong change, and the name of the rule that has to find it."""

    rule: str
    line: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.line}"

    def render(self) -> Render:
        """Return the overlay with the change, made in all documents of the kind."""
        place, *change = parsed(self.line)
        overlay, *path = place.split()
        render = rendered(overlay)
        if len(path) < 2:
            found = [document for document in render.documents if path and document["kind"] == path[0]]
            rest = [document for document in render.documents if document not in found]
            render.documents = {"gone": rest, "twice": [*rest, *found, *found], "reversed": render.documents[::-1]}[change[0]]
            return render
        changed = [document for document in render.documents if document["kind"] == path[0]]
        assert changed, place
        for document in changed:
            apply(document, path, *change)
        return render

    def file(self) -> tuple[Path, str, str]:
        """Return a file, its changed text, and a part of the sentence that must be found, where the place is a file."""
        line, _, expected = self.line.partition(" => ")
        place, _, old, new = parsed(line)
        text = (ROOT / place).read_text()
        assert old in text, f"there is no {old!r} in {place}"
        return ROOT / place, text.replace(old, new), expected


def parsed(line: str) -> list[str]:
    """Return the place, the operation and its operands."""
    match = CHANGE.fullmatch(line)
    assert match, line
    return [match["at"], match["word"] or match["sign"] or "~", match["value"] or match["old"] or "", match["new"] or ""]


def apply(document: Document, path: list[str], operation: str, first: str, second: str) -> None:
    """Change what lies under a path of a document."""
    kind, start, *rest = path
    starts = {"job": JOBS.get(kind), "pod": PODS.get(kind), "main": f"{PODS.get(kind)} containers 0"}
    *keys, last = [*(starts.get(start) or start).split(), *rest]
    holder: Any = document
    for key in keys:
        holder = holder[entry(holder, key)]
    last = entry(holder, last)
    if operation == "gone":
        del holder[last]
        return
    before: Any = holder.get(last) if isinstance(holder, dict) else holder[last]
    if operation == "reversed":
        holder[last] = before[::-1]
    elif operation == "~":
        assert first in before, f"there is no {first!r} in {before!r}"
        holder[last] = before.replace(first, second)
    else:
        value = yaml.safe_load(first)
        holder[last] = value if operation == "=" else [*(before or []), value]


def entry(holder: dict[str, Any] | list[Any], key: str) -> str | int:
    """Return a key of a dictionary, or the index of a list's entry by its name or number."""
    if isinstance(holder, dict):
        return key
    names = [inner.get("name") if isinstance(inner, dict) else None for inner in holder]
    return names.index(key) if key in names else int(key)


def read() -> list[Change]:
    """Return all changes of the file."""
    changes, rule = [], ""
    for line in (ROOT / "tests" / "cluster" / "wrong_changes.txt").read_text().splitlines():
        if line.startswith("    "):
            changes.append(Change(rule, line.removeprefix("    ")))
        elif line and not line.startswith("#"):
            rule = line
    return changes
