"""lmdist: word-level LSTM language models, from your own text to an ONNX bundle."""

__version__ = "0.1.0"
