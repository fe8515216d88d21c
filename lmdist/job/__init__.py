"""The command lmdist-train: torchrun, started as often as it takes. Knows nothing of what the ranks compute."""
