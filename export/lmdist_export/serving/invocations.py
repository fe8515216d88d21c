"""MLflow's scoring protocol: the forms in which /invocations takes prompts and params, and the form of its answers.

    prompts, params = prompts_and_params(given)         # of the JSON object of a request
    answer(completion)                                  # an element of `predictions`
    error_body("INVALID_PARAMETER_VALUE", "a sentence")

MLflow's own server answers malformed input in several ways and ignores names that it does not know; here each mistake is one
sentence. Both servers share this module: middleware.py before MLflow's, application.py in lmdist-serve. It knows no HTTP.

The gateway of MLflow sends `max_tokens`, and takes no predictions but strings: below TEXT_PATH both are understood.
"""

from __future__ import annotations

import json
from typing import Any

from lmdist_export.options import PARAMS, typed
from lmdist_export.sampling.completion import Completion
from lmdist_export.serving.json_body import BadRequest, quoted, strings_of

PATH = "/invocations"
TEXT_PATH = "/text"
"""Before PATH: predictions are strings, without the prompts. MLflow's gateway adds PATH to the address that it is given."""
FORMS = {
    "inputs": '["We must"]',
    "instances": '["We must"]',
    "dataframe_records": '[{"prompt": "We must"}]',
    "dataframe_split": '{"columns": ["prompt"], "data": [["We must"]]}',
}
"""MLflow's names for the input of a model, and an example of each."""
EXAMPLE = '{"inputs": ["We must"], "params": {"seed": 7}}'
GATEWAY_NAMES = {"max_tokens": "max_new_tokens"}
"""What MLflow's gateway calls params."""


def prompts_and_params(given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the prompts and the params of a request; raises UsageError for one of no known form."""
    for name in given:
        if name not in FORMS and name != "params":
            raise BadRequest(f"the body has {quoted(name)}, which is not known; known are {', '.join(FORMS)} and params")
    forms = [name for name in FORMS if name in given]
    if len(forms) != 1:
        found = " and ".join(forms) or "no input"
        raise BadRequest(f"the body has {found}; one of {', '.join(FORMS)} is expected, as {EXAMPLE}")
    return prompts_of(forms[0], given[forms[0]]), params_of(given.get("params"))


def prompts_of(form: str, given: Any) -> list[str]:
    """Return the prompts of an input in one of FORMS."""
    rows: list[Any]
    match form, given:
        case "dataframe_split", {"columns": ["prompt"], "data": list(rows)} if given.keys() <= {"columns", "data", "index"}:
            found = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
        case "inputs" | "instances", {"prompt": column, **others} if not others:
            found = column if isinstance(column, list) else [column]
        case "inputs" | "instances" | "dataframe_records", list(rows):
            found = [row["prompt"] if isinstance(row, dict) and row.keys() == {"prompt"} else row for row in rows]
        case _:
            raise BadRequest(f"{form} is {quoted(given)}; expected is {FORMS[form]}")
    return strings_of("prompt", found, f", as in {FORMS[form]}")


def params_of(given: Any) -> dict[str, Any]:
    """Return the params that are given, and not null; raises UsageError for an unknown name or a wrong type."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise BadRequest(f'params is {quoted(given)}; an object is expected, as {{"seed": 7}}')
    params = {}
    for name, value in given.items():
        if name not in PARAMS:
            raise BadRequest(f"params: {quoted(name)} is not known; known are {', '.join(PARAMS)}")
        if value is not None:
            params[name] = typed(PARAMS[name], value, quoted)
    return params


def as_gateway(given: dict[str, Any]) -> dict[str, Any]:
    """Return a request of MLflow's gateway by the names of the table, for texts without their prompts."""
    params = given.get("params")
    if isinstance(params, dict) or params is None:
        renamed = {GATEWAY_NAMES.get(name, name): value for name, value in (params or {}).items()}
        given = {**given, "params": {"echo": False, **renamed}}
    return given


def answer(text: Completion) -> dict[str, Any]:
    """Return a text as a JSON object: what lmdist-generate writes, the seed that gives it again, and what it warns of."""
    seed = {} if text.seed is None else {"seed": text.seed}
    return text.as_object() | seed | ({"warnings": text.warnings} if text.warnings else {})


def error_body(code: str, message: str) -> str:
    """Return the body of an error: an object with the names that MLflow's has."""
    return json.dumps({"error_code": code, "message": message})
