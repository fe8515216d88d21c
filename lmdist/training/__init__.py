"""The training loop and its parts: batches, ranks, step, optimizer, checkpoints, evaluation."""
