"""Text from a bundle by onnxruntime: sessions, states, generation, beam search, scoring. Needs no torch."""
