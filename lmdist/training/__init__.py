"""Training: batches, ranks, the step, the loop, optimizers, checkpoints, reports, evaluation.

Read loop.py first. The wing below it is the model; the commands above it are train.py and the launcher.
"""
