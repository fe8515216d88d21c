"""A bundle as a model of MLflow: prompts and options in, texts out; a mistake is answered with status 400 and a sentence.

    mlflow models serve -m bundles/demo --env-manager local
    mlflow models serve -m models:/NAME@champion --env-manager local

The bundle's folder holds `MLmodel` and a file of three lines that imports this module, so a bundle is served by the installed
lmdist. middleware.py validates what comes over HTTP; MLflow calls `predict` in a thread for each request; service.py
generates the texts of all of them. No torch: the environment has lmdist[cpu,serve].
"""

from __future__ import annotations

import logging
import os
import platform
import reprlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from lmdist import __version__
from lmdist.errors import UsageError
from lmdist_export.bundle import Bundle
from lmdist_export.options import PARAMS, Options
from lmdist_export.sampling.completion import to_completion
from lmdist_export.sampling.generation import BATCH_SIZE
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.serving.batching import QueueFull, RequestTimeout
from lmdist_export.serving.invocations import answer, error_body
from lmdist_export.serving.json_body import strings_of
from lmdist_export.serving.middleware import AS_TEXT, CLIENT_DISCONNECTED, install
from lmdist_export.serving.service import Service

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported; tracking/store.py sets it too
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns of annotations of its own
    from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model, ModelSignature
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
    from mlflow.pyfunc import add_to_model
    from mlflow.pyfunc.model import PythonModel, PythonModelContext
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType
    from mlflow.version import VERSION as MLFLOW_VERSION

CODE = "served_model.py"
REQUIREMENTS = "requirements.txt"
ENVIRONMENT = "python_env.yaml"
MLMODEL = "MLmodel"
OWN_FILES = (CODE, REQUIREMENTS, ENVIRONMENT, MLMODEL)
"""The files that make a bundle a model of MLflow."""
SERVER = "mlflow.pyfunc.scoring_server.app"
"""The module that `mlflow models serve` and uvicorn import; it loads the model."""

MODEL_CONFIG: dict[str, Any] = {"provider": "cpu", "threads": 0, "batch_size": BATCH_SIZE, "cors_origins": []}
"""What SERVING_MODEL_CONFIG may set: MLflow ignores names that MLmodel does not have."""

TYPES = {int: DataType.long, float: DataType.double, str: DataType.string, bool: DataType.boolean}


class RequestError(MlflowException):
    """An error that is answered with one sentence."""

    def serialize_as_json(self) -> str:
        """Return the body of the answer; MLflow's own has all of the input in it."""
        return error_body(self.error_code, str(self))


class ServedModel(PythonModel):
    """The model that MLflow loads, and whose `predict` it calls."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the bundle and generate a token, so that the server answers /ping only when it is ready."""
        config = MODEL_CONFIG | (context.model_config or {})
        sampler = Sampler(Bundle.load(Path(context.artifacts["bundle"])), config["provider"], config["threads"])
        self.service = Service(sampler, config["batch_size"])
        self.timeout_seconds = MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get()
        self.service.warm_up(self.timeout_seconds)
        install(sys.modules.get(SERVER), strings_of("cors_origins", config["cors_origins"]))

    # Not list[str]: for such an annotation MLflow derives a signature of its own, which drops the params.
    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Return the texts that continue prompts, as JSON objects; raises RequestError."""
        try:
            service = self.service
            prompts = service.prompts(strings_of("prompt", column(model_input)))
            prompts, resolved = service.resolve(prompts, Options.from_values(params or {}))
            request = service.request(prompts, resolved, logprobs=resolved.options.logprobs)
            if disconnected := CLIENT_DISCONNECTED.get():
                disconnected.add_done_callback(lambda _: request.cancel())
            texts = service.batcher.generate(request, self.timeout_seconds)
            found = [to_completion(service.sampler, text, prompts[text.prompt_number], resolved) for text in texts]
            return [text.text for text in found] if AS_TEXT.get() else list(map(answer, found))
        except UsageError as error:
            raise RequestError(str(error), INVALID_PARAMETER_VALUE) from None
        except RequestTimeout:
            message = f"the texts were not generated within {self.timeout_seconds} seconds"
            raise RequestError(message, TEMPORARILY_UNAVAILABLE) from None
        except QueueFull as error:
            raise RequestError(str(error), TEMPORARILY_UNAVAILABLE) from None
        except Exception as error:
            logging.getLogger(__name__).exception("a request could not be answered")
            raise RequestError(f"{type(error).__name__}: the server's log has more", INTERNAL_ERROR) from None


def column(given: pd.DataFrame) -> list[Any]:
    """Return the prompts of what MLflow makes of an input; raises UsageError for another column than `prompt`.

    A list of strings becomes a column without a name; {"prompt": ["We must"]} becomes a row of one list.
    """
    names = [*given.columns]
    if names not in (["prompt"], [0]):
        found = f"the input has the columns {reprlib.repr(names)[1:-1]}" if names else "the input has no column"
        raise UsageError(f"{found}; a list of strings, or one column, named prompt, is expected")
    cells = given[names[0]].tolist()
    return cells[0] if len(cells) == 1 and isinstance(cells[0], list) else cells


# --- the folder ----------------------------------------------------------------------------------------------------


def signature() -> ModelSignature:
    """Return the names and types of a request and of an answer.

    Params have no defaults here: what is not given is what generation_config.json says when the model is loaded.
    """
    params = [
        ParamSpec(name, TYPES[row.type], [] if row.is_list else None, (-1,) if row.is_list else None)
        for name, row in PARAMS.items()
    ]
    answer = {
        "prompt_number": int,
        "index": int,
        "text": str,
        "words": None,
        "finish_reason": str,
        "seed": int,
        "warnings": None,
    }
    outputs: list[Any] = [ColSpec(TYPES[of] if of else Array(DataType.string), name) for name, of in answer.items()]
    # The column has no name here, so that MLflow takes a list of strings too.
    return ModelSignature(Schema([ColSpec(DataType.string)]), Schema(outputs), ParamSchema(params))


def write_model(folder: Path, run_id: str | None, *, has_pieces: bool) -> None:
    """Add the files of an MLflow model, of the run `run_id`, to a bundle's folder; its other files stay as they are.

    One that `has_pieces` of words needs their library.
    """
    model = Model(run_id=run_id, signature=signature())
    add_to_model(
        model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        model_code_path=CODE,
        python_env=ENVIRONMENT,
        model_config=MODEL_CONFIG,
        artifacts={"bundle": {"path": ".", "uri": "."}},
    )
    model.model_size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    model.save(folder / MLMODEL)
    needed = requirements(has_pieces=has_pieces)
    for name, text in {CODE: CODE_TEXT, REQUIREMENTS: needed, ENVIRONMENT: ENVIRONMENT_TEXT}.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def requirements(*, has_pieces: bool) -> str:
    """Return the requirements of an environment that serves, also a model of pieces of words."""
    extras = "cpu,serve,subword" if has_pieces else "cpu,serve"
    return f"lmdist[{extras}]=={__version__}\nmlflow-skinny=={MLFLOW_VERSION}\n"


CODE_TEXT = """from mlflow.models import set_model

from lmdist_export.served_model import ServedModel

set_model(ServedModel())
"""
ENVIRONMENT_TEXT = f"""python: {platform.python_version()}
build_dependencies: []
dependencies:
- -r {REQUIREMENTS}
"""
