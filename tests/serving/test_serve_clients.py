"""lmdist-serve with clients that are not ours: the openai package, curl, MLflow's gateway, lm-evaluation-harness' requests."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

import lmdist
from lmdist_export import export
from support.serving import Serving
from support.small_bundles import make_run_of_pieces, neutral

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    server = Serving(["-m", "lmdist_export.serve", str(bundle), "--name", "news"], tmp_path_factory.mktemp("clients"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def model(bundle: Path) -> lmdist.Model:
    return lmdist.load(bundle)


# --- the openai package --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(served: Serving) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_package(client: Any, model: lmdist.Model) -> None:
    expected = model.generate("the cat", max_new_tokens=12, seed=7, top_k=5, temperature=0.9).text
    answer = client.completions.create(
        model="news", prompt="the cat", max_tokens=12, seed=7, temperature=0.9, extra_body={"top_k": 5}
    )
    assert "the cat" + answer.choices[0].text == expected
    assert (answer.usage.prompt_tokens, answer.choices[0].finish_reason in ("stop", "length")) == (2, True)
    assert [listed.id for listed in client.models.list()] == ["news"]
    stream = client.completions.create(
        model="news",
        prompt="the cat",
        max_tokens=12,
        seed=7,
        temperature=0.9,
        extra_body={"top_k": 5},
        stream=True,
        stream_options={"include_usage": True},
    )
    *pieces, last = stream
    assert "the cat" + "".join(piece.choices[0].text for piece in pieces) == expected
    assert last.usage == answer.usage


def test_log_probabilities_by_the_openai_package(client: Any, model: lmdist.Model) -> None:
    answer = client.completions.create(model="news", prompt="the cat is", echo=True, max_tokens=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert sum(found.token_logprobs) == pytest.approx(model.score("the cat is", end=False).log_probability, abs=1e-5)
    assert (found.tokens, found.text_offset) == (["the", "cat", "is"], [0, 4, 8])


def test_errors_by_the_openai_package(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.completions.create(model="news", prompt="the", temperature=-1)
    with pytest.raises(openai.NotFoundError, match=r"the model .*gpt.* is not here"):
        client.completions.create(model="gpt", prompt="the")
    with pytest.raises(openai.NotFoundError, match="has neither chat nor tools"):
        client.chat.completions.create(model="news", messages=[{"role": "user", "content": "the"}])


# --- the openai package, and pieces of words -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_pieces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, lmdist.Model]]:
    """The client of a server of pieces of words, and the model in this process."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("pieces")
    export.main([str(make_run_of_pieces(folder)), "-o", str(folder / "bundle")])
    bundle = neutral(folder / "bundle")
    server = Serving(["-m", "lmdist_export.serve", str(bundle), "--name", "pieces"], folder)
    try:
        server.wait()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
            yield client, lmdist.load(bundle)
    finally:
        server.stop()


def streamed(client: Any, **asked: Any) -> str:
    """The text of a stream, whose every event but the last one has some."""
    pieces = [event.choices[0].text for event in client.completions.create(model="pieces", stream=True, **asked)]
    assert all(pieces[:-1])
    return "".join(pieces)


def test_offsets_of_pieces_lead_into_the_text(of_pieces: tuple[Any, lmdist.Model]) -> None:
    client, model = of_pieces
    assert model.bundle.tokenizer.model
    content_of, prompt = model.bundle.tokenizer.model.content_of, "The president said 日本語 🙂 🚀. Naïve"
    parts = {str(token): -100 for token, content in enumerate(content_of.values()) if content.decode(errors="ignore") == ""}
    answer = client.completions.create(
        model="pieces", prompt=prompt, max_tokens=40, seed=2, echo=True, logprobs=1, logit_bias=parts,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.text.startswith(prompt)
    found = choice.logprobs
    assert len(found.tokens) == answer.usage.total_tokens
    assert found.text_offset == sorted(found.text_offset)
    whole = 0
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        with suppress(UnicodeDecodeError):
            written = content_of[token].decode().lstrip(" ")
            assert choice.text[offset:].startswith(written), (token, offset)
            whole += 1
    assert whole > 40
    assert "".join(model.bundle.tokenizer.pieces(found.tokens)) == choice.text


def test_stops_across_pieces_by_the_openai_package(of_pieces: tuple[Any, lmdist.Model]) -> None:
    client, model = of_pieces
    asked = {"prompt": "The president said", "max_tokens": 120, "seed": 5, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(model="pieces", **asked).choices[0].text
    assert streamed(client, **asked) == text
    words = model.generate("The president said", max_new_tokens=120, seed=5, ignore_eos=True, echo=False).tokens
    borders = list(accumulate(len(piece) for piece in model.bundle.tokenizer.pieces(words)))
    stops = [text[border - 1 : border + 2] for border in borders[20:100:9] if "\ufffd" not in text[border - 1 : border + 2]]
    assert len(stops) > 2
    for stop in stops:
        (choice,) = client.completions.create(model="pieces", stop=[stop, "never found"], **asked).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
        assert streamed(client, stop=stop, **asked) == choice.text


def test_a_stream_has_whole_characters(of_pieces: tuple[Any, lmdist.Model]) -> None:
    """An emoji that no text had is several pieces, and comes with the last of them, also where the prompt has the others."""
    client, model = of_pieces
    ids = model.bundle.vocabulary.encode(model.bundle.tokenizer.tokenize("🚀"))
    assert len(ids) > 2
    asked: dict[str, Any] = {"prompt": ids[:-1], "max_tokens": 1, "logit_bias": {str(ids[-1]): 100}}
    assert streamed(client, **asked) == client.completions.create(model="pieces", **asked).choices[0].text == "🚀"
    bias = {str(token): 6 for token in {*ids, *model.prompt(" 🙂 日本語").ids}}
    for seed in range(4):
        asked = {"prompt": "🚀 ", "max_tokens": 100, "seed": seed, "logit_bias": bias}
        assert streamed(client, **asked) == client.completions.create(model="pieces", **asked).choices[0].text


# --- curl ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_sees_a_text_grow(served: Serving) -> None:
    body = {"prompt": "the", "max_tokens": 1_000, "ignore_eos": True, "no_repeat_ngram_size": 9, "stream": True}
    words = ["curl", "-sN", f"http://127.0.0.1:{served.port}/v1/completions", "-H", "Content-Type: application/json"]
    curl = subprocess.Popen([*words, "-d", json.dumps(body)], stdout=subprocess.PIPE)
    assert curl.stdout
    with curl.stdout as events:
        first = json.loads(events.readline().removeprefix(b"data: "))
        assert first["choices"][0]["finish_reason"] is None
        assert curl.poll() is None, "the text came at once"
        rest = events.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert curl.wait() == 0


# --- MLflow's gateway ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # MLflow's own
@pytest.mark.parametrize("provider", ["mlflow-model-serving", "openai"])
def test_the_providers_of_mlflows_gateway(served: Serving, model: lmdist.Model, provider: str) -> None:
    """The code of MLflow's gateway that asks models, without the server around it, which has packages of its own."""
    pytest.importorskip("aiohttp")
    from mlflow.gateway.config import EndpointConfig, Provider
    from mlflow.gateway.providers import get_provider
    from mlflow.gateway.schemas.completions import RequestPayload

    address = f"http://127.0.0.1:{served.port}"
    settings = {"model_server_url": f"{address}/text"} if provider != "openai" else {
        "openai_api_base": f"{address}/v1",
        "openai_api_key": "none",
    }  # fmt: skip
    config = EndpointConfig(
        name="news",
        endpoint_type="llm/v1/completions",  # pyright: ignore[reportArgumentType]
        model={"provider": provider, "name": "news", "config": settings},  # pyright: ignore[reportArgumentType]
    )
    asked = RequestPayload.model_validate({"prompt": "the cat", "max_tokens": 8, "temperature": 0, "n": 1, "stop": ["so"]})
    answer = asyncio.run(get_provider(Provider(provider))(config).completions(asked))
    expected = model.generate("the cat", max_new_tokens=8, temperature=0, stop="so", echo=False).text
    assert answer.choices[0].text.removeprefix(" ") == expected


# --- lm-evaluation-harness -----------------------------------------------------------------------------------------


@pytest.mark.skipif(
    shutil.which("lm_eval") is None, reason="lm_eval is not installed: pip install lm_eval[api], where you like"
)
def test_lm_evaluation_harness_sums_what_lmdist_score_sums(served: Serving, model: lmdist.Model, tmp_path: Path) -> None:
    """The command, with a task of continuations and one of whole texts; it finds the tokenizer at the server."""
    documents = [
        {"context": "the cat", "target": "is not here"},
        {"context": "we", "target": "said that it is so"},
        {"context": "that it is", "target": "an unheardof dog"},
    ]
    (tmp_path / "documents.jsonl").write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    for name, kind, text, target, metric in (
        ("pairs", "loglikelihood", "{{context}}", " {{target}}", "acc"),
        ("texts", "loglikelihood_rolling", "", "{{context}} {{target}}", "word_perplexity"),
    ):
        task = {
            "task": name, "output_type": kind, "doc_to_text": text, "doc_to_target": target, "num_fewshot": 0,
            "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
            "test_split": "test", "metric_list": [{"metric": metric}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))  # which YAML reads
    address = f"base_url=http://127.0.0.1:{served.port}/v1/completions"
    command = ["lm_eval", "run", "--model", "local-completions", "--model_args", f"{address},model=news"]
    command += [
        "--tasks",
        "pairs,texts",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "found"),
        "--log_samples",
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("pairs", "texts"):
        (file,) = (tmp_path / "found").rglob(f"samples_{name}_*.jsonl")
        found = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        for document, sample in zip(documents, found, strict=True):
            score = model.score(f"{document['context']} {document['target']}", end=False)
            first = len(document["context"].split()) if name == "pairs" else 0
            (answer,) = sample["filtered_resps"]
            total = float(answer[0] if isinstance(answer, list) else answer)
            assert total == pytest.approx(float(score.log_probabilities[first:].sum()), abs=1e-4)


def test_what_lm_evaluation_harness_sends(served: Serving, model: lmdist.Model) -> None:
    """The requests of its `local-completions` by hand: it needs a hundred megabytes of packages.

    For the likelihood of a continuation it sends the ids of both, asks for one token more, echoed, with one log-probability,
    and sums those of the continuation: all after the context but the last (lm_eval/models/openai_completions.py).
    """
    pairs = [("the cat", "is not here"), ("we", "said"), ("that it is", "so")]
    ids = model.bundle.vocabulary.encode
    contexts = [ids(context.split()) for context, _ in pairs]
    prompts = [[*context, *ids(rest.split())] for context, (_, rest) in zip(contexts, pairs, strict=True)]
    asked = {"model": "news", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    status, answer = served.post(asked, path="/v1/completions")
    assert status == 200, answer
    for choice, context, (before, rest) in zip(answer["choices"], contexts, pairs, strict=True):
        scored = model.score(f"{before} {rest}", end=False).log_probabilities
        found = choice["logprobs"]["token_logprobs"][len(context) : -1]
        assert sum(found) == pytest.approx(float(scored[len(context) :].sum()), abs=1e-5)
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        greedy = [max(top.values()) == value for top, value in zip(tops, found, strict=True)]
        best = [model.next_words(f"{before} {' '.join(rest.split()[:place])}", 1)[0][0] for place in range(len(found))]
        assert greedy == [word == most_likely for word, most_likely in zip(rest.split(), best, strict=True)]
    assert "<eos>" in [choice["logprobs"]["tokens"][-1] for choice in answer["choices"]], "none has ended by the mark"


def test_ids_behind_the_mark_that_a_text_begins_after(served: Serving, model: lmdist.Model) -> None:
    """lm-evaluation-harness puts the mark of the tokenizer in front of a whole text, as a context of one token."""
    status, answer = served.post({"prompt": "that the cat is so", "add_special_tokens": False}, path="/tokenize")
    assert (status, answer["count"]) == (200, 5)
    assert answer["tokens"] == model.bundle.vocabulary.encode("that the cat is so".split())
    mark = json.loads(served.request("GET", "/tokenizer_info")[2])["eos_token"]
    assert served.post({"prompt": mark}, path="/tokenize")[1]["tokens"] == [1]
    assert served.post({"tokens": answer["tokens"]}, path="/detokenize") == (200, {"prompt": "that the cat is so"})
    prompts = [[1, *answer["tokens"]], answer["tokens"]]
    asked = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "ignore_eos": True}
    with_mark, without = (choice["logprobs"] for choice in served.post(asked, path="/v1/completions")[1]["choices"])
    assert {name: values[1:] for name, values in with_mark.items()} == without
    assert [values[0] for values in with_mark.values()] == [mark, None, None, 0, False]
    assert sum(without["token_logprobs"][:-1]) == pytest.approx(model.score("that the cat is so", end=False).log_probability)
    for path, body, sentence in (
        ("/tokenize", {}, "no prompt is given; expected is"),
        ("/tokenize", {"prompt": ["the"]}, 'prompt is ["the"]; a string is expected'),
        ("/detokenize", {"tokens": [99_999]}, "tokens has the token id 99999; the vocabulary has the ids 0 to"),
        ("/detokenize", {}, "tokens is null; a list of token ids is expected"),
    ):
        status, answer = served.post(body, path=path)
        assert (status, sentence in answer["error"]["message"]) == (400, True), answer
