"""ONNX graphs, built from the sizes of a model. Knows no onnxruntime and reads no file."""
