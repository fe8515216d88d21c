"""lmdist-serve: the real process over HTTP answers as lmdist-generate, lmdist-score and the Python API do."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import lmdist
from lmdist_export import serve
from lmdist_export.options import PARAMS
from lmdist_export.serving.openai_answer import word_offsets
from support.failures import last_line
from support.serving import Serving
from support.small_bundles import PLAIN_WORDS

PATH = "/v1/completions"
NAME = "bundle"


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """lmdist-serve over the folder that lmdist-export wrote."""
    server = Serving(["-m", "lmdist_export.serve", str(bundle)], tmp_path_factory.mktemp("served"))
    try:
        server.wait()
        yield server
    finally:
        assert server.stop() == 0, server.log.read_text()


@pytest.fixture(scope="module")
def model(bundle: Path) -> lmdist.Model:
    return lmdist.load(bundle)


def complete(server: Serving, **asked: object) -> dict[str, Any]:
    """Return the answer to a request."""
    status, answer = server.post(asked, path=PATH)
    assert status == 200, answer
    return answer


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def events(server: Serving, **asked: object) -> list[Any]:
    """Return the events of a stream, whose last is [DONE]."""
    status, headers, body = server.request("POST", PATH, {**asked, "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), body
    *found, end, rest = body.decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


# --- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "ignore_eos": True, "n": 3},
        {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1, "no_repeat_ngram_size": 3},
        {"min_new_tokens": 25, "stop": ["the cat", "so"], "logit_bias": ["cat=2", "not=-inf"], "allow_unk": True},
        {"temperature": 0, "bad_words": ["the dog", "in"], "ignore_eos": True},
    ],
    ids=lambda options: "-".join(options) or "none",
)
def test_the_same_seed_is_the_same_text_everywhere(served: Serving, generated, model, options: dict[str, Any]) -> None:
    prompts = ["the cat", "we said that it is", ""]
    asked = {"max_new_tokens": 30, "seed": 7, **options}
    expected = [text["text"] for text in generated(*prompts, **asked)]
    assert texts(complete(served, prompt=prompts, echo=True, **asked)) == expected
    assert [text["text"] for text in served.texts(*prompts, **asked)] == expected
    assert [text.text for text in model.completions(prompts, **asked)] == expected
    one = events(served, prompt="the cat", echo=True, **(asked | {"n": 1}))
    assert "".join(event["choices"][0]["text"] for event in one) == expected[0]


@pytest.mark.slow
def test_a_prompt_and_its_completion_read_as_one_text(served: Serving, generated) -> None:
    asked = {"seed": 3, "max_new_tokens": 12, "ignore_eos": True}
    expected = generated("the cat", **asked)[0]["text"]
    assert "the cat" + texts(complete(served, prompt="the cat", **asked))[0] == expected
    assert "the cat " + texts(complete(served, prompt="the cat ", **asked))[0] == expected
    by_ids = complete(served, prompt=[2, 3], **asked)
    assert texts(by_ids) == texts(complete(served, prompt=[[2, 3]], **asked)) == [expected.removeprefix("the cat")]
    assert texts(complete(served, prompt=["the cat", "we"], n=2, **asked))[0] == texts(by_ids)[0]


@pytest.mark.slow
def test_an_answer_has_what_openai_names(served: Serving) -> None:
    answer = complete(served, model=NAME, prompt=["the cat", "we"], max_tokens=5, n=2, ignore_eos=True, user="somebody")
    assert (answer["object"], answer["model"], bool(re.fullmatch("cmpl-[0-9a-f]{24}", answer["id"]))) == (
        "text_completion",
        NAME,
        True,
    )
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
    again = complete(served, prompt=["the cat", "we"], max_tokens=5, n=2, ignore_eos=True, seed=answer["seed"])
    assert texts(again) == texts(answer)
    assert complete(served, prompt="The Xylophone", stop="\n", max_tokens=1)["warnings"] == [
        "not in the vocabulary, and read as <unk>: The, Xylophone; known in lowercase: the",
        'stop: not in the vocabulary, so never generated: "\\n"',
    ]


@pytest.mark.slow
def test_a_stream_of_several_texts(served: Serving) -> None:
    asked = {"prompt": ["the cat", "we"], "n": 2, "max_tokens": 40, "seed": 1, "logprobs": 2}
    plain = complete(served, **asked)
    streamed = events(served, **asked, stream_options={"include_usage": True})
    *pieces, last = streamed
    assert (last["choices"], last["usage"]) == ([], plain["usage"])
    assert all(event["usage"] is None for event in pieces)
    for choice in plain["choices"]:
        found = [event["choices"][0] for event in pieces if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in found) == choice["text"]
        assert [piece["finish_reason"] for piece in found] == [None] * (len(found) - 1) + [choice["finish_reason"]]
        assert found[-1]["logprobs"]["tokens"] == choice["logprobs"]["tokens"]
    beams = {"prompt": "the cat", "num_beams": 3, "n": 2, "max_tokens": 6}
    assert [event["choices"][0]["text"] for event in events(served, **beams)] == texts(complete(served, **beams))


@pytest.mark.slow
def test_best_of_returns_the_texts_of_the_highest_log_probability(served: Serving, model) -> None:
    asked = {"max_new_tokens": 6, "seed": 5, "temperature": 1.0, "ignore_eos": True}
    found = model.generate("the cat", n=8, logprobs=0, echo=False, **asked)
    ranked = sorted(found, key=lambda text: sum(text.token_logprobs) / max(1, len(text.tokens)), reverse=True)
    answer = complete(served, prompt="the cat", n=3, best_of=8, **asked)
    assert [text.removeprefix(" ") for text in texts(answer)] == [text.text for text in ranked[:3]]
    assert answer["usage"]["completion_tokens"] == sum(len(text.tokens) for text in found)
    # A text that a stop ends at once has no tokens, and is worse than any other.
    (stop, num_empty), *_ = Counter(text.tokens[0] for text in found if text.tokens[0].isalpha()).most_common(1)
    answer = complete(served, prompt="the cat", n=7, best_of=8, stop=stop, **asked)
    assert [bool(text) for text in texts(answer)] == [True] * (8 - num_empty) + [False] * (num_empty - 1)
    assert num_empty > 1


@pytest.mark.slow
def test_logit_bias_by_ids(served: Serving) -> None:
    asked = {"prompt": "the", "seed": 1, "max_tokens": 20, "temperature": 1}
    by_word = complete(served, **asked, logit_bias=["cat=-inf", "dog=3.5"])
    assert texts(complete(served, **asked, logit_bias={"3": -1000, "4": 3.5})) == texts(by_word)


# --- log-probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_is_scored_as_by_lmdist_score(served: Serving, model) -> None:
    text = "the cat  is not\there xylophone"
    for prompt in (text, [2, 3, 9, 10, 12, 0]):
        (choice,) = complete(served, prompt=prompt, echo=True, max_tokens=0, logprobs=2)["choices"]
        expected = model.score(text, end=False)
        found = choice["logprobs"]
        assert found["token_logprobs"] == pytest.approx(expected.log_probabilities.tolist(), abs=1e-6)
        assert found["unknown"] == expected.unknown.tolist()
        assert sum(found["token_logprobs"]) == pytest.approx(expected.log_probability, abs=1e-5)
        assert all(
            max(top.values()) >= value for top, value in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
        )
        assert all(2 <= len(top) <= 3 for top in found["top_logprobs"])
    written = complete(served, prompt=text, echo=True, max_tokens=0, logprobs=0)["choices"][0]
    assert written["text"] == text
    assert [text[offset:].split()[0] for offset in written["logprobs"]["text_offset"]] == text.split()
    assert events(served, prompt=text, echo=True, max_tokens=0, logprobs=0)[0]["choices"] == [written]


@pytest.mark.slow
def test_next_words_are_those_of_the_model(served: Serving, model) -> None:
    asked = {"prompt": "the president said", "max_tokens": 1, "min_new_tokens": 1, "temperature": 0, "logprobs": 5}
    found = complete(served, **asked)["choices"][0]["logprobs"]["top_logprobs"][0]
    expected = dict(model.next_words("the president said", 4))
    assert {word: pytest.approx(probability) for word, probability in expected.items()}.items() <= {
        word: 2.718281828459045**value for word, value in found.items()
    }.items()


@pytest.mark.slow
def test_log_probabilities_of_a_generated_text(served: Serving, generated) -> None:
    asked = {"seed": 2, "max_new_tokens": 8, "logprobs": 3, "ignore_eos": True}
    expected = generated("the cat", **asked)[0]["logprobs"]
    (choice,) = complete(served, prompt="the cat", **asked)["choices"]
    assert choice["logprobs"]["tokens"] == expected["tokens"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-6)
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token) or token == "<eos>"
    (echoed,) = complete(served, prompt="the cat", echo=True, **asked)["choices"]
    assert echoed["logprobs"]["tokens"] == ["the", "cat", *expected["tokens"]]
    assert echoed["logprobs"]["token_logprobs"][2:] == pytest.approx(expected["token_logprobs"], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "words", "offsets"),
    [
        ('He said, "no."', ["He", "said", ",", "``", "no", ".", "''"], [0, 3, 7, 9, 10, 12, 13]),
        ("The Cat can't", ["the", "cat", "ca", "n't"], [0, 4, 8, 10]),
        ("The dog of the Cat", ["the", "dog", "of", "the", "cat"], [0, 4, 8, 11, 15]),
        ("a\u200bb  b ", ["a", "b", "b"], [0, 2, 5]),
        ("one", ["one", "two"], [0, 3]),
    ],
)
def test_where_words_begin_in_a_text(text: str, words: list[str], offsets: list[int]) -> None:
    assert word_offsets(text, words) == offsets


# --- mistakes ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "an unknown name": ({"tempreature": 1}, 'the body has "tempreature", which is not known; did you mean temperature?', None),
    "chat": (
        {"messages": [{"role": "user", "content": "secret"}]},
        "messages is given; a word-level language model",
        "messages",
    ),
    "tools": ({"tools": []}, "has neither chat nor tools: POST /v1/completions takes a `prompt`", "tools"),
    "a suffix": ({"suffix": "x"}, "this model continues a text, and inserts nothing", "suffix"),
    "a prompt of another type": ({"prompt": 7}, "prompt is 7; a string, a list of strings", "prompt"),
    "a mixture": ({"prompt": ["the", 7]}, "prompt is [", "prompt"),
    "an id beyond": ({"prompt": [99999]}, "prompt has the token id 99999; the vocabulary has the ids 0 to ", "prompt"),
    "no prompt": ({"prompt": []}, "no prompt is given", None),
    "max_tokens": ({"max_tokens": "x"}, 'max_tokens is "x"; an integer is expected', "max_tokens"),
    "too many tokens": ({"max_tokens": 10**9}, "and max_tokens for each text or beam, together is 1,000,00", None),
    "nothing": ({"max_tokens": 0}, "max_tokens is 0, which is for the log-probabilities of a prompt", "max_tokens"),
    "two names": ({"max_tokens": 3, "max_new_tokens": 3}, "are two names of one option", "max_tokens"),
    "a temperature": ({"temperature": -1}, "temperature is -1.0; it must be at least 0", "temperature"),
    "a bias of a word": ({"logit_bias": {"the": 1}}, 'logit_bias has "the"; the id of a token', "logit_bias"),
    "a bias of a string": ({"logit_bias": {"3": "x"}}, 'logit_bias of 3 is "x"; a number', "logit_bias"),
    "an infinite bias": ({"logit_bias": {"3": 1e300}}, "logit_bias is 'cat=1e+300'; WORD=X is expected", "logit_bias"),
    "no texts": ({"n": 0, "best_of": 1}, "n is 0; it must be from 1 to 1,000,000", "n"),
    "fewer than none": ({"n": -1, "best_of": 3}, "n is -1; it must be from 1 to 1,000,000", "n"),
    "best of none": ({"best_of": 0}, "best_of is 0; it must be from 1 to 1,000,000", "best_of"),
    "half a character": ({"\ud800": 1}, 'the body has "\\ud800", which is not known', "\\ud800"),
    "half a character to write": ({"prompt": ["\ud83d"]}, "prompt has a lone surrogate", "prompt"),
    "half a character in a value": ({"stream": "\ude42"}, 'stream is "\\ude42"; true or false', "stream"),
    "best_of below n": ({"n": 3, "best_of": 2}, "best_of is 2, and n is 3", "best_of"),
    "best_of in a stream": ({"best_of": 2, "stream": True}, "without stream", "best_of"),
    "stream": ({"stream": "yes"}, 'stream is "yes"; true or false', "stream"),
    "stream_options": ({"stream_options": {}}, "stream_options is given without stream", "stream_options"),
    "logprobs": ({"logprobs": 21}, "logprobs is 21; this server accepts at most 20", "logprobs"),
    "logprobs below 0": ({"logprobs": -1}, "logprobs is -1; it must be from 0", "logprobs"),
    "a length penalty": ({"num_beams": 2, "length_penalty": 1e308}, "length_penalty is 1e+308; it must be", "length_penalty"),
    "beams and sampling": ({"num_beams": 2, "top_p": 0.5}, "num_beams is for beam search, and top_p for sampling", "num_beams"),
    "no token left": ({"logit_bias": [f"{word}=-inf" for word in [*PLAIN_WORDS, "<eos>"]]}, "no token is left", None),
    "characters": ({"prompt": "?!" * 150_000}, "the number of characters in prompts is 300,000; this server", None),
    "words": ({"prompt": "the " * 20_000}, "together is 20,200; this server accepts at most 20,000", None),
    "echoed": ({"prompt": "a" * 100_000, "max_tokens": 1, "n": 19_999, "echo": True}, "is 4,000,", None),
    "scored": (
        {"prompt": "the " * 5_000, "max_tokens": 1, "n": 4, "echo": True, "logprobs": 0},
        "the number of tokens in prompts and max_tokens, scored for each text, together is 20,004; this server",
        None,
    ),
    "stops": ({"stop": [" ".join(["the"] * 600)] * 400}, "characters in stop, bad_words together is 959,600", None),
}


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "sentence", "param"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_a_400_in_openais_form(served: Serving, asked: dict[str, Any], sentence: str, param: str | None) -> None:
    status, answer = served.post({"prompt": "the"} | asked, path=PATH)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), answer
    assert sentence in answer["error"]["message"]
    assert answer["error"]["param"] in (param, None if param else next(iter(asked)))
    assert "secret" not in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 1_000


@pytest.mark.slow
def test_what_is_not_here_is_a_404(served: Serving) -> None:
    status, answer = served.post({"prompt": "the", "model": "gpt"}, path=PATH)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
    status, answer = served.post({"prompt": "the", "model": "\ud800"}, path=PATH)
    assert (status, answer["error"]["message"]) == (404, r'the model "\ud800" is not here; this server has "bundle"')
    for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/responses"):
        status, answer = served.post({"messages": []}, path=path)
        assert status == 404
        assert "has neither chat nor tools: POST /v1/completions takes a `prompt`" in answer["error"]["message"]
    assert json.loads(served.request("GET", "/v1/models/gpt")[2])["error"]["code"] == "model_not_found"
    status, headers, body = served.request("GET", PATH)
    assert (status, headers["allow"]) == (405, "POST")
    assert json.loads(body)["error"]["message"] == "this path is served by POST only"
    status, _, body = served.request("GET", "/secret%20prompt")
    assert status == 404
    assert b"secret" not in body


@pytest.mark.slow
def test_a_page_whose_name_leads_here_is_refused(served: Serving) -> None:
    """DNS rebinding: its requests are of the same origin, and so no browser asks whether it may read their answers."""
    json_type = {"Content-Type": "application/json"}
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "a@localhost"):
        for method, path, body in (("POST", PATH, {"prompt": ""}), ("GET", "/v1/models", None), ("GET", "/ping", None)):
            status, _, answer = served.request(method, path, body, json_type | {"Host": host})
            assert (status, json.loads(answer)["error"]["type"]) == (403, "invalid_request_error"), host
        assert f'Host is "{host}", no name of this server: --allowed-host adds one' in json.loads(answer)["error"]["message"]
    status, _, answer = served.request("POST", "/invocations", {"inputs": ["the"]}, json_type | {"Host": "evil.example"})
    assert (status, json.loads(answer)["error_code"]) == (403, "PERMISSION_DENIED")
    for host in ("localhost:1", "LocalHost.", "news.localhost:8000", "127.0.0.1", "[::1]:8000", "192.168.1.7:80"):
        assert served.request("GET", "/ping", headers={"Host": host})[0] == 200, host


# --- what is beside ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_and_its_options_are_listed(served: Serving, model) -> None:
    listed = json.loads(served.request("GET", "/v1/models")[2])
    (only,) = listed["data"]
    assert (listed["object"], only["id"], only["object"], only["owned_by"]) == ("list", NAME, "model", "lmdist")
    assert json.loads(served.request("GET", f"/v1/models/{NAME}")[2]) == only
    facts = only["lmdist"]
    assert (facts["vocabulary_size"], facts["layer_sizes"], facts["precision"]) == (
        len(model.bundle.vocabulary),
        [10, 10],
        "fp32",
    )
    options = {option["name"]: option for option in facts["options"]}
    assert options.keys() == PARAMS.keys() - {"cache_weight"}  # the bundle has no neural cache
    assert (options["temperature"]["default"], options["temperature"]["minimum"]) == (0.7, 0)
    assert (options["max_new_tokens"]["maximum"], options["max_new_tokens"]["type"]) == (20_000, "integer")
    assert options["echo"]["default"] is False


@pytest.mark.slow
def test_figures_for_prometheus(served: Serving) -> None:
    def figure(name: str) -> float:
        page = served.request("GET", "/metrics")[2].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = {
        'lmdist_requests_total{route="/v1/completions",status="200"}': 2,
        'lmdist_requests_total{route="/v1/completions",status="400"}': 1,
        "lmdist_generated_tokens_total": 20,
        "lmdist_prompt_tokens_total": 4,
        "lmdist_time_to_first_token_seconds_count": 1,
    }
    rows, calls = "lmdist_batch_size_sum", "lmdist_batch_size_count"
    before = {name: figure(name) for name in (*names, rows, calls)}
    complete(served, prompt="the cat", max_tokens=10, ignore_eos=True)
    events(served, prompt="the cat", max_tokens=10, ignore_eos=True)
    served.post({"prompt": 7}, path=PATH)
    assert {name: figure(name) - before[name] for name in names} == names
    assert figure('lmdist_batch_size_bucket{le="+Inf"}') == figure(calls)
    assert figure(rows) - before[rows] == figure(calls) - before[calls] > 0, "each of the two texts was alone in its batch"
    assert figure("lmdist_queued_tokens") == figure("lmdist_queued_requests") == 0
    assert figure("process_resident_memory_bytes") > 1e7


@pytest.mark.slow
def test_requests_are_logged_without_their_texts(served: Serving) -> None:
    headers = {"Content-Type": "application/json", "X-Request-Id": "mine-1", "Authorization": "Bearer sk-secret"}
    _, answered, _ = served.request("POST", PATH, {"prompt": "xylophone", "max_tokens": 3, "ignore_eos": True}, headers)
    assert answered["x-request-id"] == "mine-1"
    _, answered, _ = served.request("GET", "/xylophone?prompt=xylophone", headers={"X-Request-Id": "not mine\tbut"})
    assert re.fullmatch("[0-9a-f]{32}", answered["x-request-id"])
    served.post(b'{"prompt": "xylophone', path=PATH)
    lines = [json.loads(line) for line in served.log.read_text().splitlines() if line.startswith("{")]
    line = next(line for line in lines if line["request_id"] == "mine-1")
    assert (
        line.items()
        >= {
            "client": "127.0.0.1",
            "method": "POST",
            "route": "/v1/completions",
            "status": 200,
            "prompt_tokens": 1,
            "generated_tokens": 3,
        }.items()
    )
    assert "xylophone" not in served.log.read_text()
    assert "secret" not in served.log.read_text()
    assert "Traceback" not in served.log.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflows_protocol(served: Serving) -> None:
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    client = ScoringServerClient("127.0.0.1", served.port)
    client.wait_server_ready(timeout=10)
    params = {"seed": 7, "max_new_tokens": 4, "ignore_eos": True}
    answer: Any = client.invoke(pd.DataFrame({"prompt": ["the cat"]}), params)
    assert answer["predictions"] == served.texts("the cat", **params)
    for path in ("/ping", "/health"):
        assert served.request("GET", path)[0] == 200
    assert served.request("GET", "/version")[2].decode() == lmdist.__version__
    status, answer = served.post({"inputs": ["the"], "params": {"top_p": 7}})
    assert (status, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert answer["message"] == "top_p is 7.0; it must be above 0 and at most 1 (1 keeps all)"


@pytest.mark.slow
def test_what_cannot_be_served_is_one_line(tmp_path: Path, served: Serving, bundle: Path, capsys) -> None:
    for words, code, sentence in (
        ([str(tmp_path), "--port=0"], 66, "is not a bundle"),
        (
            [str(bundle), "--port", str(served.port)],
            65,
            f"port {served.port} of 127.0.0.1 cannot be used: Address already in use",
        ),
        ([str(bundle), "--host", "no.such.host.invalid"], 64, "--host is 'no.such.host.invalid'"),
        ([str(bundle), "--allowed-host", "http://a.example"], 64, "--allowed-host is 'http://a.example'; a name alone"),
    ):
        found, line = last_line(serve.main, capsys, *words)
        assert (found, sentence in line) == (code, True), line
