"""lmdist_export: a checkpoint becomes an ONNX bundle; a bundle becomes text, with no torch on the machine."""
