"""The command `lmdist-train`: a launcher that starts torchrun, restarts it after failures, and forwards requests to stop.

Nothing here knows what the ranks compute.
"""
