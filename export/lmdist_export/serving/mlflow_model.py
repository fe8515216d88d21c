"""A bundle as MLflow serves it: prompts and options come in, texts go out; what is wrong is a 400 and a sentence.

    mlflow models serve -m bundles/demo --env-manager local
    mlflow models serve -m models:/NAME@champion --env-manager local

The bundle's folder holds `MLmodel` and a file of three lines that names this module, so the code that serves is that of the
lmdist that is installed. invocation.py reads what comes over HTTP; MLflow calls `predict` in a thread for each request;
batching.py makes the texts of all of them.
No torch: the environment has lmdist[serve].
"""

from __future__ import annotations

import logging
import platform
import secrets
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from lmdist import __version__
from lmdist.errors import UsageError
from lmdist_export.bundle import Bundle
from lmdist_export.sampling.completion import Options, as_object
from lmdist_export.sampling.generation import BATCH_SIZE
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.serving.batching import Batcher, Overdue, Request
from lmdist_export.serving.middleware import CLIENT_GONE, error_body, param_types, stand_before, texts_of

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
SERVER = "mlflow.pyfunc.scoring_server.app"
"""The module that `mlflow models serve` and uvicorn import; it loads the model."""

MOST_WORDS = 20_000
"""Read and made for one request: no other waits long for its prompt, and it ends within the server's time."""
MOST_BEAMS = 64
MOST_LOGPROBS = 20
MOST_PHRASES = 1_000
"""Stops, bad words and logit biases."""

KINDS = {int: DataType.long, float: DataType.double, str: DataType.string, bool: DataType.boolean}


class Refused(MlflowException):
    """What is answered in place of texts: a sentence."""

    def serialize_as_json(self) -> str:
        """The body of the answer; MLflow would put all of the input before the sentence."""
        return error_body(self.error_code, str(self))


class ServedModel(PythonModel):
    """The model that MLflow loads, and asks for texts."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the bundle and make a first word, so that a server that is up is ready."""
        config = {"provider": "cpu", "threads": 0, "batch_size": BATCH_SIZE} | (context.model_config or {})
        self.bundle = Bundle.load(Path(context.artifacts["bundle"]))
        self.sampler = Sampler(self.bundle, config["provider"], config["threads"])
        self.batcher = Batcher(self.sampler, config["batch_size"])
        self.seconds = MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get()
        self.batcher.make(self.request([[]], Options(max_new_tokens=1, min_new_tokens=0, seed=0)), self.seconds)
        stand_before(sys.modules.get(SERVER))

    # Not list[str]: of a predict with such an annotation MLflow makes the signature, and drops the params.
    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """The texts that go on from the column `prompt`, as objects of JSON; raises Refused."""
        try:
            options = Options(**{name: value for name, value in (params or {}).items() if value is not None})
            prompts = [self.bundle.tokenizer.tokenize(prompt) for prompt in texts_of("prompt", model_input["prompt"])]
            request = self.request([self.bundle.vocabulary.encode(words) for words in prompts], options)
            if gone := CLIENT_GONE.get():
                gone.add_done_callback(lambda _: request.give_up())
            texts = self.batcher.make(request, self.seconds)
            drawn = {} if request.config.greedy or request.config.num_beams > 1 else {"seed": request.seed}
            return [as_object(self.sampler, text, prompts[text.prompt_number], options) | drawn for text in texts]
        except UsageError as error:
            raise Refused(str(error), INVALID_PARAMETER_VALUE) from None
        except Overdue:
            raise Refused(f"the texts were not made within {self.seconds} seconds", TEMPORARILY_UNAVAILABLE) from None
        except Exception as error:
            logging.getLogger(__name__).exception("a request could not be answered")
            raise Refused(f"{type(error).__name__}: the server's log has more", INTERNAL_ERROR) from None

    def request(self, prompts: list[list[int]], options: Options) -> Request:
        """What is asked for; raises UsageError where it is too much or does not go together."""
        if not prompts:
            raise UsageError("no prompt is given; an empty one is the beginning of a text")
        phrases = {name: texts_of(name, getattr(options, name)) for name in ("stop", "bad_words", "logit_bias")}
        expect(f"the number of {', '.join(phrases)} together", sum(map(len, phrases.values())), MOST_PHRASES)
        expect("logprobs", options.logprobs or 0, MOST_LOGPROBS)
        config = options.generation_config(self.bundle)
        expect("num_beams", config.num_beams, MOST_BEAMS)
        words = sum(len(prompt) + max(options.n, config.num_beams) * config.max_new_tokens for prompt in prompts)
        expect("the number of words in prompts, and max_new_tokens for each text or beam, together", words, MOST_WORDS)
        seed = secrets.randbelow(2**32) if options.seed is None else options.seed
        return Request(self.sampler, prompts, config, seed, options.n, options.stops(self.bundle), options.ignore_eos)


def expect(what: str, value: int, most: int) -> None:
    """Raise UsageError where something is more than a server takes."""
    if value > most:
        raise UsageError(f"{what} is {value:,}; this server takes at most {most:,}")


# --- the folder ----------------------------------------------------------------------------------------------------


def signature() -> ModelSignature:
    """What a request holds, and what an answer.

    No param has a default here: what is not given is what generation_config.json says when the model is loaded.
    """
    params = [
        ParamSpec(name, KINDS[of], [] if is_list else None, (-1,) if is_list else None)
        for name, (of, is_list) in param_types().items()
    ]
    answer = {"prompt_number": int, "index": int, "text": str, "words": None, "finish_reason": str, "seed": int}
    outputs: list[Any] = [ColSpec(KINDS[of] if of else Array(DataType.string), name) for name, of in answer.items()]
    return ModelSignature(Schema([ColSpec(DataType.string, "prompt")]), Schema(outputs), ParamSchema(params))


def write_model(folder: Path, run_id: str | None) -> None:
    """Make a bundle's folder a model of MLflow, made by the run `run_id`; its other files are neither changed nor copied."""
    model = Model(run_id=run_id, signature=signature())
    add_to_model(
        model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        model_code_path=CODE,
        python_env=ENVIRONMENT,
        model_config={"provider": "cpu", "threads": 0, "batch_size": BATCH_SIZE},
        artifacts={"bundle": {"path": ".", "uri": "."}},
    )
    model.model_size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    model.save(folder / MLMODEL)
    for name, text in {CODE: CODE_TEXT, REQUIREMENTS: requirements(), ENVIRONMENT: ENVIRONMENT_TEXT}.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def requirements() -> str:
    """What an environment needs that serves."""
    return f"lmdist[cpu,serve]=={__version__}\nmlflow-skinny=={MLFLOW_VERSION}\n"


CODE_TEXT = """from mlflow.models import set_model

from lmdist_export.served_model import ServedModel

set_model(ServedModel())
"""
ENVIRONMENT_TEXT = f"""python: {platform.python_version()}
build_dependencies: []
dependencies:
- -r {REQUIREMENTS}
"""
