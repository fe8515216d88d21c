"""The writer of ONNX's format against onnx and protobuf."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, helper, numpy_helper

from lmdist_export.graph import onnx_file
from lmdist_export.graph.onnx_file import Graph, attribute, message, model_of
from support.onnx_models import described


@given(value=st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300))
def test_integers_are_those_of_protobuf(value: int) -> None:
    assert message([(3, value)]) == (AttributeProto(i=value).SerializeToString() or message([(3, 0)]))
    assert AttributeProto.FromString(attribute("a", value)) == helper.make_attribute("a", value)
    numbers = [value, 0, -value // 3]
    assert AttributeProto.FromString(attribute("a", numbers)) == helper.make_attribute("a", numbers)


@given(value=st.integers(-(2**24), 2**24).map(lambda number: number / 64), text=st.text(max_size=300))
def test_floats_and_texts_are_those_of_protobuf(value: float, text: str) -> None:
    assert AttributeProto.FromString(attribute("a", value)) == helper.make_attribute("a", value)
    assert AttributeProto.FromString(message([(1, text), (4, text.encode())])) == AttributeProto(name=text, s=text.encode())


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    kind=st.sampled_from(sorted(onnx_file.TYPES)),
    texts=st.dictionaries(st.text(max_size=5), st.text(max_size=200), max_size=3),
)
def test_what_is_written_is_what_onnx_reads(shape: list[int], kind: int, texts: dict[str, str]) -> None:
    values = np.random.default_rng(0).integers(0, 2, shape).astype(onnx_file.TYPES[kind])
    g = Graph("example")
    x = g.input("x", kind, ["rows", 3])
    name = g.constant(values)
    assert g.constant(values.copy()) == name  # what is the same is there once
    outer = g("Add", x, name)
    body = g.subgraph("inside")
    body.output(body("Add", outer, body.constant(values)), "inner", kind, [])
    g.output(g("If", x, then_branch=body, else_branch=body), "y", kind, ["rows", 3])
    model = onnx.load_model_from_string(model_of(g, texts).content)
    [stored] = model.graph.initializer
    found = numpy_helper.to_array(stored)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert np.array_equal(found, values)
    assert {entry.key: entry.value for entry in model.metadata_props} == texts
    assert described(model.graph.input) == {"x": (kind, ["rows", 3])}
    assert described(model.graph.output) == {"y": (kind, ["rows", 3])}
    add, branch = model.graph.node
    assert branch.output == ["y"]  # without a copy
    assert (add.op_type, list(add.input), add.domain) == ("Add", ["x", name], "")
    inside = {entry.name: entry.g for entry in branch.attribute}["then_branch"]
    assert list(inside.node[0].input) == [add.output[0], name]
    assert not inside.initializer
