"""Writes the README's table of results from benchmarks/results, so that neither can differ: `python benchmarks/readme.py`.

With --check it writes nothing and fails where the README is not what it would write; a test does that.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- quality: .*? -->\n).*?(<!-- /quality -->)", re.DOTALL)


def table() -> str:
    """The rows of all committed quality runs as a Markdown table."""
    lines = [
        "| recipe, split | unknown words | perplexity of the unigram model | of lmdist | on |",
        "|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "benchmarks" / "results").glob("quality-*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for baseline, ours in zip(rows[::2], rows[1::2], strict=True):
            lines.append(
                f"| {ours['case']} | {ours['unknown_rate']:.1%} | {baseline['value']:,.1f} | **{ours['value']:,.1f}** "
                f"| {ours['machine']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the README, or check it."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = BLOCK.sub(lambda match: match[1] + table() + match[2], before)
    if "--check" in sys.argv:
        sys.exit(0 if after == before else "README.md differs from benchmarks/results: run python benchmarks/readme.py")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
