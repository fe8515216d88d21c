"""Draw a text that a bundle generates, each token shaded by its probability.

    python benchmarks/text_picture.py bundles/demo --plot docs/images/text.png      # the picture of the README

Below the text stand the most likely tokens at three places, and the one that was sampled. One `lmdist-generate` command
generates the text; the picture names it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
from pathlib import Path
from typing import Any

LINE_CHARACTERS = 116
PLACES = 3
"""Places in the text whose most likely tokens are shown, from an uncertain one to a certain one."""


def generate(bundle: Path, prompt: str, options: str) -> tuple[dict[str, Any], str]:
    """Return the text as JSON, with the most likely tokens at each place, and the command that generated it."""
    command = ["lmdist-generate", str(bundle), "--prompt", prompt, *shlex.split(options)]
    done = subprocess.run([*command, "--json", "--logprobs", "6"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), shlex.join(command)


def lines_of(tokens: list[str]) -> list[list[int]]:
    """Return the tokens of each line, by their number."""
    lines: list[list[int]] = [[]]
    width = 0
    for number, token in enumerate(tokens):
        if width + len(token) + 1 > LINE_CHARACTERS:
            lines.append([])
            width = 0
        lines[-1].append(number)
        width += len(token) + 1
    return lines


def places_of(probabilities: list[float]) -> list[int]:
    """Return PLACES places, in the order of the text, spread from the least to the most probable token."""
    order = sorted(range(len(probabilities)), key=lambda place: probabilities[place])
    return sorted(order[round(share * (len(order) - 1))] for share in (0.1, 0.5, 0.9))


def plot(text: dict[str, Any], prompt: str, command: str, picture: Path) -> None:
    """Plot the text and the most likely tokens at some places."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    tokens: list[str] = text["words"]
    probabilities = [math.exp(value) for value in text["logprobs"]["token_logprobs"]]
    lines = lines_of(tokens)
    places = places_of(probabilities)
    figure = pyplot.figure(figsize=(11, 0.34 * len(lines) + 3.3), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[0.34 * len(lines) + 0.9, 2.4])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = above.subplots()
    axes.set(xlim=(0, LINE_CHARACTERS), ylim=(len(lines) + 0.2, -1.2))
    axes.axis("off")
    axes.text(0, -0.8, f"{prompt} ...", family="monospace", fontsize=10.5, color="0.45", va="center")
    shade = pyplot.get_cmap("YlGnBu")
    for row, numbers in enumerate(lines):
        column = 0
        for number in numbers:
            probability = probabilities[number]
            axes.text(
                column,
                row,
                tokens[number],
                family="monospace",
                fontsize=10.5,
                va="center",
                color="white" if probability > 0.55 else "black",
                bbox={
                    "facecolor": shade(0.08 + 0.8 * probability),
                    "edgecolor": "crimson" if number in places else "none",
                    "linewidth": 1.6,
                    "boxstyle": "round,pad=0.14",
                },
            )
            column += len(tokens[number]) + 1
    for panel, place in zip(below.subplots(1, PLACES), places, strict=True):
        most_likely = dict(list(text["logprobs"]["top_logprobs"][place].items())[:5])
        most_likely[tokens[place]] = text["logprobs"]["token_logprobs"][place]
        shown = sorted(most_likely.items(), key=lambda item: item[1])
        values = [math.exp(value) for _, value in shown]
        colors = ["crimson" if token == tokens[place] else "0.7" for token, _ in shown]
        panel.barh([token for token, _ in shown], values, color=colors)
        before = " ".join(tokens[max(0, place - 3) : place]) or prompt
        panel.set_title(f"after “{before}”", fontsize=9.5)
        panel.set_xlabel("probability; red: the token that was sampled", fontsize=8)
        panel.tick_params(labelsize=8.5)
        panel.spines[["top", "right"]].set_visible(False)
    below.supxlabel(command, family="monospace", fontsize=8, color="0.35")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Generate and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="My fellow Americans, tonight")
    parser.add_argument(
        "--options", default="--temperature 0.7 --top-p 0.9 --seed 3 --max-new-tokens 60", help="of lmdist-generate"
    )
    parser.add_argument("--plot", type=Path, default=Path("docs/images/text.png"), metavar="FILE")
    arguments = parser.parse_args()
    text, command = generate(arguments.bundle, arguments.prompt, arguments.options)
    plot(text, arguments.prompt, command, arguments.plot)
    print(f"{arguments.plot}: {text['text']}")


if __name__ == "__main__":
    main()
