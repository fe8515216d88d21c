"""lmdist_export: a checkpoint becomes an ONNX bundle; a bundle becomes text, with no torch on the machine."""

PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""The precisions of a bundle's weights."""
EXPORT_COMMAND = "lmdist-export"
