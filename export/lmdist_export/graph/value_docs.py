"""What the inputs and outputs of the graphs in files are, a sentence each: the doc strings that Netron and other tools show.

This module knows no nodes. docs/bundle.md has the same names, with types and axes.
"""

from __future__ import annotations

from lmdist_export.options import GENERATION, GRAPH

STEP_DOC = "One step of a language model: tokens and a state in, the logits of the token after each and the next state out."
GENERATION_DOC = "Generates text: prompts, a state and random numbers in, new tokens and the next state out."

DOCS = {
    "tokens": "ids of the tokens to read, a text a row; a text begins with eos_id of the metadata and a state of zeros",
    "h": "the outputs of all LSTM layers before the tokens, side by side, first layer first",
    "c": "the cells of all LSTM layers before the tokens, side by side, first layer first",
    "logits": "logits of the token after each of the tokens",
    "next_h": "h after the tokens: the next call's h",
    "next_c": "c after the tokens: the next call's c",
    "prompt": "ids of the prompts; of row b the first lengths[b] count, the rest is padding",
    "lengths": "tokens of each prompt, at least one",
    "uniform": "random numbers in [0, 1) that decide the tokens: N of them generate N tokens",
    "bias": "added to the logits of all rows; -inf for a token that is never generated",
    "stops": "tokens that end a text, at least one; -1 is none",
    "going": "false for a row that has ended already",
    "counts": "how often each token was generated",
    "in_prompt": "the tokens that a repetition penalty finds in the prompt",
    "row_bias": "added to the logits of each row, already divided by the temperature",
    "words": "ids of the new tokens",
    "mass": "finite if the logits were",
    "next_going": "false for a row that has ended: it has generated a stop",
    "next_counts": "the next call's counts",
} | {graph.name or name: f"of the option {name}: {GENERATION[name].option.help}" for name, graph in GRAPH.items()}
