"""What an ONNX file declares: its inputs, outputs and metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable

import onnx
from onnx import ValueInfoProto


def described(values: Iterable[ValueInfoProto]) -> dict[str, tuple[int, list[object]]]:
    """Return type and axes of inputs or outputs, by name."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def metadata_of(model: onnx.ModelProto) -> dict[str, object]:
    """Return the metadata of a graph."""
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}
