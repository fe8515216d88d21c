"""A run's folder and its copy in MLflow.

Data flows one way: the logger of rank 0 writes `metrics.jsonl` and the run metadata; the uploader process, or the command
`lmdist-sync`, replays the folder into MLflow. Nothing here knows the model or the training loop.
"""
