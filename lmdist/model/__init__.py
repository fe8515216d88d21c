"""The language model and how it is computed: LSTM layers, loss, precision, CUDA graphs. Knows no optimizer, ranks or files."""
