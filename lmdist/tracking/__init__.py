"""A run's folder, its metrics, and their upload to MLflow. Knows nothing of the model."""
