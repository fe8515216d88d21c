"""lmdist_export: a checkpoint becomes an ONNX bundle; a bundle becomes text, with no torch on the machine."""

PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""Of a bundle's weights."""
