"""ONNX graphs, built from the sizes of a model: the file format, the cell, the layout of weights, network, sampling, graphs.

What is here imports no onnxruntime, no onnx and no torch, and reads no file.
"""
