"""The language model and how it computes: LSTM layers, loss, precision, CUDA graphs. Knows no optimizer, ranks or files."""
