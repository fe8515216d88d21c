"""Serving: MLflow's own server over a bundle, from its folder and from a registry, answers as lmdist-generate does."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest

from lmdist.errors import DataError, UsageError
from lmdist.storage.checksums import sha256
from lmdist.storage.reading import write_json
from lmdist.text.tokenizer import WordTokenizer
from lmdist_export import export
from lmdist_export.bundle import Bundle
from lmdist_export.serving import registry
from lmdist_export.serving.mlflow_model import column
from servers import Server, free_port
from support.serving import Serving
from support.small_bundles import PLAIN_WORDS, UNTIED, command, edit_json, make_run

MODEL_FILES = {"MLmodel", "served_model.py", "requirements.txt", "python_env.yaml"}
APP = "mlflow.pyfunc.scoring_server.app:app"


ORIGIN = "https://pages.example"
"""Of the pages that may read the answers of `serving`."""


@pytest.fixture(scope="module")
def serving(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`mlflow models serve` over the folder that lmdist-export wrote."""
    arguments = ["-m", "mlflow", "models", "serve", "-m", str(bundle), "--env-manager", "local"]
    server = Serving(arguments, tmp_path_factory.mktemp("serving"), SERVING_MODEL_CONFIG=json.dumps({"cors_origins": [ORIGIN]}))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


# --- the folder ----------------------------------------------------------------------------------------------------


def test_the_folder_is_a_model_of_mlflow_and_a_bundle_as_before(bundle: Path) -> None:
    listed = Bundle.load(bundle).manifest["files"]
    assert {path.name for path in bundle.iterdir()} - set(listed) == {*MODEL_FILES, "manifest.json", "generation_config.json"}
    requirements = (bundle / "requirements.txt").read_text()
    assert "lmdist[cpu,serve]==" in requirements
    assert "torch" not in requirements
    assert str(bundle) not in (bundle / "MLmodel").read_text()


def test_a_model_that_is_loaded_takes_the_inputs_of_the_server(bundle: Path, generated) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(str(bundle))
    params = {"seed": 7, "max_new_tokens": 5}
    expected = [text | {"seed": 7} for text in generated("the cat", "", **params)]
    prompts = ["the cat", ""]
    for given in (prompts, {"prompt": prompts}, [{"prompt": prompt} for prompt in prompts], pd.DataFrame({"prompt": prompts})):
        assert model.predict(given, params) == expected
    assert model.predict("the cat", params) == model.predict({"prompt": "the cat"}, params) == expected[:1]


@pytest.mark.parametrize(
    ("columns", "found"),
    [(["prompt", "id"], "the columns 'prompt', 'id'"), (["id"], "the columns 'id'"), ([], "no column")],
)
def test_other_columns_are_named(columns: list[str], found: str) -> None:
    message = f"the input has {found}; a list of strings, or one column, named prompt, is expected"
    with pytest.raises(UsageError, match=message):
        column(pd.DataFrame({name: ["a", "b"] for name in columns}))


def test_stops_and_bad_words_are_tokenized_once_a_request_however_many_texts(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(str(bundle))
    counts: Counter[str] = Counter()
    tokenize = WordTokenizer.tokenize

    def counted(self: WordTokenizer, text: str, *, continues: bool = False) -> list[str]:
        counts[text] += 1
        return tokenize(self, text, continues=continues)

    monkeypatch.setattr(WordTokenizer, "tokenize", counted)
    texts = model.predict(["the cat", "the dog"], {"stop": ["xyzzy"], "bad_words": ["plugh"], "n": 20, "max_new_tokens": 1})
    assert len(texts) == 40
    assert all(len(text["warnings"]) == 2 for text in texts)
    assert counts["the cat"] == 1
    assert counts["xyzzy"] == counts["plugh"] == 1


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_eos": True, "n": 3},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
        {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1, "no_repeat_ngram_size": 3},
        {"min_new_tokens": 25, "stop": ["the cat", "so"], "echo": False},
        {"bad_words": ["the dog", "in"], "logit_bias": ["cat=2", "not=-inf"], "allow_unk": True},
        {"temperature": 0, "logprobs": 2, "ignore_eos": True},
    ],
    ids=lambda options: "-".join(options) or "none",
)
def test_texts_are_those_of_lmdist_generate(serving: Serving, generated, options: dict[str, object]) -> None:
    asked = {"max_new_tokens": 30, "seed": 7, **options}
    prompts = ("the cat", "we said that it is", "")
    answers = serving.texts(*prompts, **asked)
    assert all(("seed" not in text) if options.get("temperature") == 0 else text.pop("seed") == 7 for text in answers)
    assert answers == generated(*prompts, **asked)


@pytest.mark.slow
def test_a_search_is_that_of_lmdist_generate(serving: Serving, generated) -> None:
    asked = {"num_beams": 4, "n": 2, "max_new_tokens": 12, "length_penalty": 0.5}
    assert serving.texts("the cat", "we", **asked) == generated("the cat", "we", **asked)


@pytest.mark.slow
def test_the_returned_seed_repeats_the_text(serving: Serving) -> None:
    first, second = (serving.texts("the dog", ignore_eos=True, max_new_tokens=40)[0] for _ in range(2))
    assert first["seed"] != second["seed"]
    assert serving.texts("the dog", ignore_eos=True, max_new_tokens=40, seed=first["seed"]) == [first]


@pytest.mark.slow
def test_every_form_of_input_is_the_same_input(serving: Serving) -> None:
    params = {"seed": 1, "max_new_tokens": 5, "top_p": None}
    forms = [
        {"dataframe_records": [{"prompt": "the"}, {"prompt": "a"}]},
        {"dataframe_split": {"columns": ["prompt"], "data": [["the"], ["a"]]}},
        {"inputs": {"prompt": ["the", "a"]}},
        {"inputs": [{"prompt": "the"}, {"prompt": "a"}]},
        {"inputs": ["the", "a"]},
        {"instances": ["the", "a"]},
        {"instances": {"prompt": ["the", "a"]}},
        {"instances": [{"prompt": "the"}, {"prompt": "a"}]},
        {"dataframe_split": {"index": [0, 1], "columns": ["prompt"], "data": [["the"], ["a"]]}},
    ]
    answers = [serving.post(form | {"params": params}) for form in forms]
    in_capitals = serving.post(forms[0] | {"params": params}, 'Application/JSON; charset="UTF-8"')
    assert [*answers, in_capitals] == [answers[0]] * (len(forms) + 1)
    assert answers[0][0] == 200


@pytest.mark.slow
def test_prompts_are_texts_whatever_they_look_like(serving: Serving) -> None:
    prompts = ["", "7", "007", "nan", "null", "NA", "true", "2020-01-01", "the\0", "naïve 😀"]
    assert [text["text"] for text in serving.texts(*prompts, max_new_tokens=1, stop=PLAIN_WORDS)] == prompts


@pytest.mark.slow
def test_32_clients_at_once_get_what_each_gets_alone(serving: Serving, generated) -> None:
    asked = [
        {"seed": number, "max_new_tokens": 20 + number % 2, "ignore_eos": True} | ({"top_p": 0.8} if number % 4 == 0 else {})
        for number in range(32)
    ]
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda params: serving.texts("the cat", **params)[0], asked))
    assert [text["seed"] for text in answers] == list(range(32))
    for params, answer in zip(asked[:8], answers[:8], strict=True):
        answer.pop("seed")
        assert [answer] == generated("the cat", **params)


@pytest.mark.slow
def test_words_that_are_not_in_the_vocabulary_are_named(serving: Serving) -> None:
    known, unknown = serving.texts("the cat", "The Xylophone", max_new_tokens=3, seed=1)
    assert "warnings" not in known
    assert unknown["warnings"] == ["not in the vocabulary, and read as <unk>: The, Xylophone; known in lowercase: the"]
    asked = {"max_new_tokens": 30, "seed": 1, "ignore_eos": True}
    (text,) = serving.texts("the cat", bad_words=["xyzzy", "x" * 1_000, "dog"], logit_bias=["xyzzy=2"], **asked)
    long = f"{'x' * 12}...{'x' * 13}"
    assert text.pop("warnings") == [
        f"bad_words: not in the vocabulary, so never generated: 'xyzzy', '{long}'",
        "logit_bias: not in the vocabulary, so never generated: 'xyzzy'",
    ]
    assert [text] == serving.texts("the cat", bad_words=["dog"], **asked)


@pytest.mark.slow
def test_a_string_in_place_of_a_list_is_a_list_of_one(serving: Serving) -> None:
    asked = {"max_new_tokens": 30, "seed": 1, "ignore_eos": True}
    (text,) = serving.texts("the cat", stop="the", **asked)
    assert text["finish_reason"] == "stop"
    assert [text] == serving.texts("the cat", stop=["the"], **asked)


# --- invalid requests ----------------------------------------------------------------------------------------------


def one(**params: object) -> dict[str, object]:
    return {"dataframe_records": [{"prompt": "the"}], "params": params}


REFUSED = {
    "an unknown param": (one(max_tokens=5), 'params: "max_tokens" is not known; known are max_new_tokens, '),
    "out of range": (one(top_p=7), "top_p is 7.0; it must be above 0 and at most 1"),
    "a text for a number": (one(top_p="much"), 'top_p is "much"; a number is expected'),
    "a list for a number": (one(top_p=[1]), "top_p is [1]; a number is expected"),
    "true for a number": (one(max_new_tokens=True), "max_new_tokens is true; an integer is expected"),
    "a number with a fraction": (one(max_new_tokens=2.5), "max_new_tokens is 2.5; an integer is expected"),
    "a number for a flag": (one(ignore_eos=1), "ignore_eos is 1; true or false is expected"),
    "too large a number": (one(seed=2**64), "seed is 18446744073709551616; an integer of at most 64 bits is expected"),
    "far too large a number": (b'{"inputs": ["the"], "params": {"seed": %s}}' % (b"9" * 5_000), "has a number of thousands of"),
    "an object for a list": (one(stop={"cat": 1}), 'stop is {"cat": 1}; a list of strings is expected'),
    "a list in a list": (one(stop=["the", ["cat"]]), 'stop number 1 is ["cat"]; a string is expected'),
    "nothing in a list": (one(stop=[None]), "stop number 0 is null; a string is expected"),
    "too many words": (one(max_new_tokens=10**9), "together is 1,000,000,001; this server accepts at most 20,000"),
    "too many texts": (one(n=1_000), "this server accepts at most 20,000"),
    "too many echoes": (
        {"inputs": ["a" * 100_000], "params": {"n": 15, "max_new_tokens": 1, "echo": True}},
        "in prompts and their warnings, repeated with each text, together is 3,000,630; this server accepts at most 2,000,000",
    ),
    "too many beams": (one(num_beams=65, max_new_tokens=1), "num_beams is 65; this server accepts at most 64"),
    "too many likeliest": (one(logprobs=21), "logprobs is 21; this server accepts at most 20"),
    "no text at all": (one(n=0), "n is 0; it must be from 1 to 1,000,000"),
    "a seed below 0": (one(seed=-1), "seed is -1; it must be from 0 to 18,446,744,073,709,551,615"),
    "sampling and beam search": (
        one(num_beams=2, top_p=0.5),
        "num_beams is for beam search, and top_p for sampling: give only one of them",
    ),
    "no word left": (one(logit_bias=[f"{word}=-inf" for word in [*PLAIN_WORDS, "<eos>"]]), "no token is left to sample"),
    "not a number": (b'{"inputs": ["the"], "params": {"temperature": NaN}}', "temperature is nan; it must be at least 0"),
    "params of another kind": ({"inputs": ["the"], "params": [1]}, 'params is [1]; an object is expected, as {"seed": 7}'),
    "another column": (
        {"dataframe_records": [{"text": "a"}]},
        'prompt number 0 is {"text": "a"}; a string is expected, as in [{',
    ),
    "a column more": ({"inputs": [{"prompt": "a", "id": 3}]}, 'prompt number 0 is {"prompt": "a", "id": 3}; a string is'),
    "other columns": ({"dataframe_split": {"columns": ["id"], "data": [[1]]}}, 'dataframe_split is {"columns": ["id"], "data"'),
    "a row of two": (
        {"dataframe_split": {"columns": ["prompt"], "data": [["a", "b"]]}},
        'prompt number 0 is ["a", "b"]; a string',
    ),
    "a split of a text": ({"dataframe_split": "the"}, 'dataframe_split is "the"; expected is {"columns": ["prompt"], '),
    "a number for a prompt": ({"dataframe_records": [{"prompt": 7}]}, "prompt number 0 is 7; a string is expected"),
    "a number for an input": ({"inputs": ["the", 7]}, 'prompt number 1 is 7; a string is expected, as in ["We must"]'),
    "nothing for a prompt": ({"dataframe_records": [{"prompt": "the"}, {}]}, "prompt number 1 is {}; a string is expected"),
    "null for a prompt": ({"inputs": [None]}, "prompt number 0 is null; a string is expected"),
    "a list for a prompt": ({"instances": [["the"]]}, 'prompt number 0 is ["the"]; a string is expected'),
    "half of a character": (b'{"inputs": ["\\ud800"]}', "prompt number 0 has a lone surrogate"),
    "records of another kind": ({"dataframe_records": None}, 'dataframe_records is null; expected is [{"prompt": "We'),
    "a text for the inputs": ({"inputs": "the"}, 'inputs is "the"; expected is ["We must"]'),
    "a long text for the inputs": ({"inputs": "the " * 99}, f'inputs is "{"the " * 9}the...; expected is ["We must"]'),
    "no prompts": ({"dataframe_split": {"columns": ["prompt"], "data": []}}, "no prompt is given"),
    "no input": ({"params": {}}, "the body has no input; one of inputs, instances, dataframe_records, dataframe_split is"),
    "two inputs": ({"inputs": ["a"], "instances": ["b"]}, "the body has inputs and instances; one of "),
    "another name": ({"input": ["the"]}, 'the body has "input", which is not known; known are inputs, '),
    "a name beside": ({"inputs": ["the"], "parameters": {}}, 'the body has "parameters", which is not known'),
    "another program's form": ({"prompt": "the", "temperature": 1}, 'the body has "prompt", which is not known'),
    "a list": (["the"], 'the body is ["the"]; an object is expected, as {"inputs": '),
    "nothing": (b"", "the body is not JSON (Expecting value: line 1, column 1); expected is {"),
    "no JSON": (
        b'{"inputs": ["the secret',
        "the body is not JSON (Unterminated string starting at: line 1, column 13); expected",
    ),
    "no UTF-8": (b'{"inputs": ["\xff"]}', "byte 14 of the body is not UTF-8"),
    "brackets": (b"[" * 100_000, "the body is nested too deeply"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("body", "sentence"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_a_400_and_a_sentence(serving: Serving, body: object, sentence: str) -> None:
    status, answer = serving.post(body)
    assert (status, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert sentence in answer["message"]
    assert len(answer["message"]) < 400
    assert "stack_trace" not in answer
    assert "secret" not in answer["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "content_type",
    [
        *("text/csv", "application/vnd.apache.parquet", "text/plain", "application/x-www-form-urlencoded", ""),
        *("application/json; charset=latin-1", "application/json; profile=x", "application/jsonlines"),
    ],
)
def test_a_body_that_is_not_json_is_a_415_and_a_sentence(serving: Serving, content_type: str) -> None:
    status, answer = serving.post(b"prompt\nthe secret\n", content_type)
    message = f'Content-Type is "{content_type}"' if content_type else "no Content-Type is given"
    assert (status, answer["message"]) == (415, f"{message}; application/json is expected, in UTF-8")


@pytest.mark.slow
def test_a_body_that_is_too_long_is_a_413_and_a_sentence(serving: Serving) -> None:
    status, answer = serving.post({"inputs": ["the " * 2**23]})
    assert (status, answer["message"]) == (413, "the body has 33,554,448 bytes; this server accepts at most 1,048,576")
    assert serving.texts("the")


@pytest.mark.slow
def test_no_other_path_is_served(serving: Serving) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{serving.port}/version", timeout=60) as answer:
        assert answer.status == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "body"),
    [("OPTIONS", None), ("POST", one(max_new_tokens=1)), ("POST", one(top_p=7))],
    ids=["preflight", "answer", "error"],
)
def test_pages_of_the_origins_that_were_given_may_read_answers(serving: Serving, method: str, body: object) -> None:
    assert serving.allowed_origin(ORIGIN, method, body) == ORIGIN
    assert serving.allowed_origin("https://other.example", method, body) is None


# --- several clients -----------------------------------------------------------------------------------------------

LONG = {"max_new_tokens": 19_000, "ignore_eos": True, "no_repeat_ngram_size": 9}
"""No sequence may be repeated, so each call generates one token: sixteen take more than half a minute."""


def cpu_seconds(process_id: int) -> float:
    """Return the CPU seconds of a process and its children."""
    import psutil

    server = psutil.Process(process_id)
    return sum(sum(process.cpu_times()[:2]) for process in (server, *server.children(recursive=True)))


@pytest.mark.slow
def test_nothing_is_generated_for_a_client_that_disconnected(serving: Serving) -> None:
    body = json.dumps(one(**LONG)).encode()
    for _ in range(20):
        client = http.client.HTTPConnection("127.0.0.1", serving.port)
        client.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        client.close()
    deadline = time.monotonic() + 20
    while True:
        before = cpu_seconds(serving.process.pid)
        time.sleep(1)
        if cpu_seconds(serving.process.pid) - before < 0.1:
            break
        assert time.monotonic() < deadline, "the server still generates their texts"


@pytest.mark.slow
def test_a_short_request_does_not_wait_for_many_long_ones(serving: Serving) -> None:
    clients = [http.client.HTTPConnection("127.0.0.1", serving.port) for _ in range(9)]
    for client in clients:
        client.request("POST", "/invocations", json.dumps(one(**LONG)).encode(), {"Content-Type": "application/json"})
    assert serving.texts("the", max_new_tokens=1)
    answered, _, _ = select.select([client.sock for client in clients], [], [], 0)
    assert not answered
    for client in clients:
        client.close()


@pytest.mark.slow
def test_invalid_requests_are_not_logged_as_errors(serving: Serving) -> None:
    assert serving.post(one(top_p=7))[0] == 400
    assert "Traceback" not in serving.log.read_text()


# --- the registry --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_registered_served_by_its_alias_and_drained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], empty_store: Path
) -> None:
    """From a run to a server in production: a version of the run's model, served from the registry by uvicorn alone."""
    import mlflow

    tracking = Server(tmp_path)
    shutil.copy(empty_store, tmp_path / "server.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    tracking.start()
    try:
        client = mlflow.MlflowClient(tracking.uri)
        run_id = client.create_run("0").info.run_id
        run = make_run(tmp_path, UNTIED, "whitespace", PLAIN_WORDS)
        write_json(run / "mlflow.json", {"run_id": run_id})
        monkeypatch.chdir(tmp_path)
        with patch.dict(os.environ):  # which the command sets for MLflow
            export.main([str(run), "-o", "bundle", "--register", "news.en"])
            printed = capsys.readouterr().out
            export.main(["bundle", "--register", "news.en", "--alias", "second"])
        logging.disable(logging.NOTSET)
        assert f"registered   news.en, version 1, alias champion  ({tracking.uri})\nof run       {run_id}\n" in printed
        assert "mlflow models serve -m models:/news.en@champion --env-manager local\n" in printed
        assert "version 2, alias second" in capsys.readouterr().out
        watching = Serving(["-m", "lmdist_export.serve", "models:/news.en@champion", "--watch", "0.2"], tmp_path)
        watching.wait()
        assert watching.post(one(max_tokens=5))[0] == 400
        client.set_registered_model_alias("news.en", "champion", "2")
        deadline = time.monotonic() + 60
        while "news.en: from now on version 2 answers" not in watching.log.read_text():
            assert time.monotonic() < deadline, watching.log.read_text()
            time.sleep(0.1)
        assert watching.post(one(max_new_tokens=5))[0] == 200
        assert watching.stop() == 0
        client.set_registered_model_alias("news.en", "champion", "1")

        version = client.get_model_version_by_alias("news.en", "champion")
        assert (version.version, version.run_id) == ("1", run_id)
        model = client.get_logged_model(str(version.source).removeprefix("models:/"))
        assert (model.name, model.source_run_id, str(model.status)) == ("news_en", run_id, "READY")
        assert model.params["precision"] == "fp32"
        compared = {"bundle/compared_tokens", "bundle/compared_perplexity", "bundle/compared_perplexity_by_torch"}
        assert {metric.key for metric in model.metrics or ()} >= {"bundle/megabytes", *compared}

        server = Serving(
            ["-m", "uvicorn", APP, "--timeout-graceful-shutdown", "60"],
            tmp_path,
            __pyfunc_model_path__="models:/news.en@champion",
        )
        server.wait()
        assert server.post(one(max_tokens=5))[0] == 400
        assert server.post(b"prompt\nthe\n", "text/csv")[0] == 415
        assert server.allowed_origin(ORIGIN, "OPTIONS") is None  # no page, unless cors_origins has it
    finally:
        tracking.kill()
    answers: list[list[dict[str, Any]]] = []
    asked = {"seed": 5, "max_new_tokens": 2_000, "ignore_eos": True, "no_repeat_ngram_size": 9}
    clients = [threading.Thread(target=lambda: answers.append(server.texts("the cat", **asked))) for _ in range(4)]
    for client_thread in clients:
        client_thread.start()
    time.sleep(1)
    assert not answers, "the texts are too short for this test"
    code = server.stop()
    for client_thread in clients:
        client_thread.join()
    assert code in (0, -signal.SIGTERM)  # uvicorn ends by the signal, when all is answered
    assert [len(texts[0]["words"]) for texts in answers] == [2_000] * 4
    assert answers == [answers[0]] * 4


@pytest.mark.slow
def test_a_bundle_of_a_run_that_the_store_does_not_know(bundle: Path, tmp_path: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    done = command("lmdist_export.export", bundle, "--register", "small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "version 1, alias champion  (sqlite:///mlflow.db)" in done.stdout
    assert "(a new one: the training's is not in this store)" in done.stdout


def test_only_what_the_manifest_names_is_registered_and_what_runs_is_the_installed_package(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path
) -> None:
    import mlflow
    from mlflow.artifacts import download_artifacts

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, tmp_path / 'store.db')}")
    monkeypatch.chdir(tmp_path)
    copy, secret = tmp_path / "copy", tmp_path / "secret"
    shutil.copytree(bundle, copy)
    secret.write_text("secret")
    (copy / "served_model.py").write_text("raise SystemExit('not ours')")
    (copy / "MLmodel").unlink()
    (copy / "MLmodel").symlink_to(secret)
    (copy / "leak.txt").symlink_to(secret)
    (copy / "more.py").write_text("import os")
    registry.register(copy, "safe", "champion")
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("safe", "champion")
    listed = Bundle.load(bundle).manifest["files"]
    downloaded = Path(download_artifacts("models:/safe@champion", dst_path=str(tmp_path / "downloaded")))
    files = {path.name for path in downloaded.iterdir()} - {"registered_model_meta"}
    assert files == {*listed, *MODEL_FILES, "manifest.json", "generation_config.json"}
    assert (downloaded / "served_model.py").read_text() == (bundle / "served_model.py").read_text()
    assert "secret" not in (downloaded / "MLmodel").read_text()
    assert Bundle.load(downloaded).manifest == Bundle.load(bundle).manifest
    assert re.match("LSTM 6-10-10, .* fp32", str(version.description))

    manifest = Bundle.load(bundle).manifest
    code = copy / "served_model.py"
    edit_json(copy / "manifest.json", files=manifest["files"] | {code.name: facts_of(code)})
    with pytest.raises(DataError, match=r"the manifest names served_model\.py"):
        registry.register(copy, "safe", "champion")
    write_json(copy / "manifest.json", manifest)
    (copy / "generation_config.json").unlink()
    (copy / "generation_config.json").symlink_to(bundle / "generation_config.json")
    with pytest.raises(DataError, match="is a link"):
        registry.register(copy, "safe", "champion")


def facts_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@pytest.mark.slow
def test_an_unreachable_mlflow_is_reported_without_the_password(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@127.0.0.1:{free_port()}")
    done = command("lmdist_export.export", bundle, "--register", "small", cwd=tmp_path)
    assert done.returncode == 75
    assert "secret" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"this registers it later: lmdist-export {bundle} --register small")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "b", "--register", "a/b"), "--register 'a/b' is no name for a model"),
        (("-o", "b", "--register", "a", "--alias", "Latest"), "--alias 'Latest' is no alias"),
        (("-o", "b", "--alias", "a"), "give --register NAME as well"),
        (("--register", "a"), "without -o a bundle is registered as it is, and"),
        ((), "-o is missing"),
        (("-o", "b", "--register", "a", "--layout", "sherpa-onnx"), "--register a: --layout sherpa-onnx"),
    ],
)
def test_mistakes_are_seen_before_any_work(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        export.main([str(tmp_path), *arguments])
    assert stop.value.code == 64
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["news", "news.en 2", "a/b", "a:b", " ", "", ".", "..", "é"])
@pytest.mark.parametrize("alias", ["champion", "a-b_2", "latest", "v3", "a b", "", "x" * 256])
def test_names_are_rejected_as_mlflow_refuses_them(name: str, alias: str) -> None:
    from mlflow import MlflowException
    from mlflow.utils import validation

    def taken(check: Any, *arguments: str) -> bool:
        try:
            check(*arguments)
        except (MlflowException, UsageError):
            return False
        return True

    by_mlflow = (
        taken(validation._validate_model_name, name)
        and taken(validation._validate_model_alias_name, alias)
        and taken(validation._validate_model_alias_name_reserved, alias)
    )
    assert taken(registry.check_names, name, alias) == by_mlflow


@pytest.mark.parametrize(("given", "kept"), [(None, "true"), ("false", "false")])
def test_mlflow_sends_telemetry_only_where_the_user_asks_for_it(given: str | None, kept: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_DISABLE_TELEMETRY"}
    if given is not None:
        environment["MLFLOW_DISABLE_TELEMETRY"] = given
    # mlflow reads the variable when it is imported, so it must be set by then.
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'mlflow':\n"
        "            print(os.environ.get('MLFLOW_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import lmdist_export.served_model\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [kept]
