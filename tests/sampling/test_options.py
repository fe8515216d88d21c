"""The table of options: every row is a flag, a param and, where it says so, an input of the graphs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lmdist.errors import UsageError
from lmdist_export.generate import parser
from lmdist_export.graph.onnx_file import Graph
from lmdist_export.graph.sampling_nodes import option_inputs
from lmdist_export.graph.sizes import Sizes
from lmdist_export.options import (
    EVERY_FEATURE,
    FILTERS,
    GENERATION,
    GRAPH,
    PARAMS,
    REQUEST,
    Features,
    GenerationConfig,
    Options,
    Row,
    features_of,
    graph_inputs,
)
from lmdist_export.sampling.sampler import option_feed

BOUNDED = [row for row in PARAMS.values() if row.bounds]
SIZES = Sizes([8], 300, 8, tied=True)


def outside(row: Row) -> float:
    """A value just outside of a row's bounds."""
    assert row.bounds
    if math.isfinite(row.bounds.low):
        return row.bounds.low - (1 if row.bounds.includes_low else 0)
    return math.inf


@pytest.mark.parametrize("row", BOUNDED, ids=lambda row: row.name)
def test_a_value_out_of_bounds_is_rejected_by_the_name_that_the_caller_knows(row: Row) -> None:
    value: Any = outside(row)
    values: dict[str, Any] = {row.name: value}
    for as_flags, name in ((True, row.flag), (False, row.name)):
        with pytest.raises(UsageError) as raised:
            Options.from_values(values, as_flags=as_flags)
        assert str(raised.value).startswith(f"{name} is {value}; it must be ")
    if row.name in GENERATION:
        with pytest.raises(UsageError, match=f"^{row.name} is "):
            GenerationConfig(**values)


@pytest.mark.parametrize("row", PARAMS.values(), ids=lambda row: row.name)
def test_every_row_is_a_flag(row: Row) -> None:
    value = {bool: "", int: "3", float: "0.5", str: "the"}[row.type]
    flag = row.flag.replace("--", "--no-", 1) if row.default is True else row.flag
    arguments = parser().parse_args(["bundle", flag, *([value] if value else [])])
    options = Options.from_values(vars(arguments), as_flags=True)
    assert options.is_given(row.name)
    found = options.given[row.name] if row.name in GENERATION else getattr(options, row.name)
    assert found == ([value] if row.is_list else (not row.default) if row.type is bool else row.type(value))
    others = Options.from_values(vars(parser().parse_args(["bundle"])), as_flags=True)
    assert not any(others.is_given(name) for name in PARAMS)


def test_defaults_are_neutral_and_need_nothing_of_a_graph() -> None:
    assert {name: getattr(GenerationConfig(), name) for name in GRAPH} == {name: graph.neutral for name, graph in GRAPH.items()}
    assert features_of(GenerationConfig()) == Features()


@pytest.mark.parametrize("name", GRAPH)
def test_an_option_is_an_input_of_the_graphs_that_need_it(name: str) -> None:
    graph = GRAPH[name]
    values: dict[str, Any] = {name: 2 if GENERATION[name].type is int else 0.5}
    config = GenerationConfig(**values)
    for features in (features_of(config), replace(EVERY_FEATURE, cached=True)):
        inputs = option_inputs(Graph("inputs"), SIZES, features)
        assert (graph.name or name) in inputs
        feed = option_feed(config, features, SIZES.vocabulary_size)
        assert set(feed) == set(inputs) - {"counts", "in_prompt", "row_bias"}
        assert feed[graph.name or name].dtype == graph.dtype
        assert feed[graph.name or name].shape == graph.shape
    if graph.role == "filter":
        assert features_of(config) == Features(**{name: True})
        assert features_of(replace(config, do_sample=False)) == Features(greedy=True)
        assert set(graph_inputs(features_of(config), "filter")) <= {name, "top_k"}
    elif graph.role == "penalty":
        assert features_of(config) == Features(adjusted=True)


def test_the_names_of_a_request_are_not_those_of_a_config() -> None:
    assert not REQUEST.keys() & GENERATION.keys()
    assert FILTERS.keys() == {name for name in vars(Features()) if name not in ("greedy", "adjusted", "cached")}
