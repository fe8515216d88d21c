"""From documents to a data folder: readers of file formats, words, vocabulary, token files, the command lmdist-prepare."""
