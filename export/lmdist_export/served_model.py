"""The name by which a registered bundle's `served_model.py` imports the model that MLflow serves; the code is in serving/."""

from lmdist_export.serving.mlflow_model import ServedModel

__all__ = ["ServedModel"]
