"""From text to a data folder, and from words back to text.

Readers of file formats, a de-duplicator above them, the tokenizer, the vocabulary, the corpus that becomes token files, and
the command lmdist-prepare. The tokenizer and the vocabulary serve training and sampling as well. Nothing here knows models.
"""
