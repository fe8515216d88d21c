"""Bundles of pieces of words: the text of a prompt stays as it is, streams show whole words, stops are found in the text."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import lmdist
from lmdist.errors import DataError, UsageError
from lmdist.settings import PrepareSettings
from lmdist.storage.checksums import OWN_CHECKSUM, own_checksum
from lmdist.text.pieces import Pieces, Saved
from lmdist.text.prepare import prepare
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary
from lmdist_export import export
from lmdist_export.api import Model
from lmdist_export.bundle import Bundle
from lmdist_export.options import Options
from lmdist_export.sampling.completion import to_completion
from lmdist_export.sampling.generation import Batch, Generation, Text, append, log_probabilities
from lmdist_export.sampling.resolved_options import resolve
from lmdist_export.sampling.stops import Stops
from lmdist_export.sampling.writing import taken_again, whole_words
from lmdist_export.serving.batching import Scoring
from lmdist_export.serving.openai_answer import choice, writer_of
from lmdist_export.serving.openai_request import read_request
from lmdist_export.serving.service import Service
from support.small_bundles import TEXTS_OF_PIECES, UNTIED, in_fresh_process, make_run_of_pieces, neutral

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder, a run and a bundle of pieces."""
    place = tmp_path_factory.mktemp("pieces")
    export.main([str(make_run_of_pieces(place)), "-o", str(place / "bundle")])
    neutral(place / "bundle")
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return lmdist.load(folder / "bundle")


@pytest.mark.parametrize("prompt", ["The president", "The presid", "The president ", "日本", "🙂", "a  \n", ""])
def test_the_text_is_the_prompt_and_what_continues_it(model: Model, prompt: str) -> None:
    for seed in range(4):
        options = {"seed": seed, "max_new_tokens": 30, "ignore_eos": True}
        whole = model.generate(prompt, **options)
        added = model.generate(prompt, echo=False, **options)
        assert whole.text == prompt + added.text
        assert whole.tokens == added.tokens
        for echo, expected in ((True, whole), (False, added)):
            stream = model.stream(prompt, echo=echo, **options)
            assert "".join(stream) == expected.text
            assert stream.completion
            assert stream.completion.text == expected.text
        assert len(whole.tokens) == 30


@pytest.mark.parametrize("prompt", ["The president", "The presid", "The president ", "日本", "a  \n", ""])
def test_a_server_writes_the_same_text(model: Model, prompt: str) -> None:
    service = Service(model.sampler)
    for stop in ([], ["es", "日"]):
        given = {"prompt": prompt, "seed": 3, "max_tokens": 30, "ignore_eos": True, "stop": stop}
        asked = read_request(given, service, "pieces")
        (text,) = service.batcher.generate(service.request(asked.tokenized, asked.resolved), 60)
        expected = model.generate(prompt, seed=3, max_new_tokens=30, ignore_eos=True, stop=stop, echo=False).text
        assert choice(asked, text, 0, None)["text"] == expected
        writer = writer_of(asked, text)
        assert "".join([*(piece for token in text.tokens for piece in writer.write([token])), writer.end(text)]) == expected
    asked = read_request({"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0}, service, "pieces")
    scoring = Scoring(model.sampler, [asked.tokenized[0].ids], 0)
    service.batcher.submit(scoring)
    assert scoring.finished.wait(60)
    found = choice(asked, Text(asked.tokenized[0].ids, 0, 0, finish_reason="length"), 0, scoring.scores[0])
    offsets = [*found["logprobs"]["text_offset"], len(prompt)]
    assert found["text"] == prompt
    assert offsets == sorted(offsets)


def test_a_stream_shows_whole_words() -> None:
    pieces = [" pres", "", "id", "ent", " aren", "'t", ",", " 日", "本", "語", "\n", "a" * 70, "b", " end"]
    shown = list(whole_words(pieces))
    assert shown[:6] == [" president", " aren't,", " 日", "本", "語", "\n"]
    assert "".join(shown) == "".join(pieces)
    assert shown[-1] == " end"


def test_stops_are_found_in_the_text(model: Model) -> None:
    options = {"seed": 3, "max_new_tokens": 200, "ignore_eos": True}
    text = model.generate("The", echo=False, **options).text
    stops = [text[place : place + length] for place in range(10, len(text) - 3, 23) for length in (1, 2, 3)]
    stops = [stop for stop in stops if "\ufffd" not in stop]
    assert len(stops) > 10
    for stop in stops:
        expected = text[: text.index(stop)]
        found = model.generate("The", echo=False, stop=[stop, "never found"], **options)
        assert (found.text, found.finish_reason) == (expected, "stop")
        stream = model.stream("The", echo=False, stop=stop, **options)
        assert "".join(stream) == expected
    found = model.generate("The", num_beams=3, max_new_tokens=12, stop=[" ", "e"], echo=False)
    assert not {" ", "e"} & set(found.text)


def test_a_stop_inside_of_a_piece_keeps_the_character_before_it(model: Model) -> None:
    """A piece may be the end of a character and more, where models do not split before punctuation."""
    assert model.bundle.tokenizer.model
    contents = [*model.bundle.tokenizer.model.entries.contents]
    first, second, third = ("日".encode()[place : place + 1] for place in range(3))
    tokens = [contents.index(first), contents.index(second), contents.index(third)]
    contents[tokens[2]] = third + b"."
    service = Service(model.sampler)
    for prompt, generated, whole in (("", tokens, "日"), ("a ", tokens, "a 日"), (tokens[:1], tokens[1:], "日")):
        asked = read_request({"prompt": prompt, "max_tokens": 9}, service, "pieces")
        text = Text(asked.tokenized[0].ids, 0, 0)
        append(text, generated, Generation(asked.resolved.config, Stops([b"."], contents)))
        assert (text.tokens, text.rest, text.finish_reason) == (generated[:-1], third, "stop")
        assert choice(asked, text, 0, None)["text"] == "日"
        assert to_completion(model.sampler, text, asked.tokenized[0], asked.resolved).text == whole


def test_the_space_of_a_prompt_is_there_once(model: Model) -> None:
    """Also before a piece that has none, and before a stop inside of a piece that has one."""
    cases = (("'t", "x", "'t"), ("▁the", "x", "the"), ("▁the", "he", "t"), ("▁the", "the", ""), ("▁the", " ", "the"))
    for piece, stop, expected in cases:
        assert piece in model.bundle.vocabulary.ids
        options = {"logit_bias": [f"{piece}=100"], "max_new_tokens": 1, "stop": stop, "seed": 1}
        options |= {"logprobs": 0} if piece == "'t" else {}  # otherwise it begins with the space
        assert model.generate("The president ", **options).text == f"The president {expected}"
        assert "".join(model.stream("The president ", echo=False, **options)) == expected
        service = Service(model.sampler)
        asked = read_request({**options, "prompt": "The president "}, service, "pieces")
        (text,) = service.batcher.generate(service.request(asked.tokenized, asked.resolved), 60)
        assert choice(asked, text, 0, None)["text"] == expected


# --- token healing -------------------------------------------------------------------------------------------------


def healed(model: Model) -> list[str]:
    """Beginnings of a text whose last piece is also the beginning of others."""
    prompts = [TEXTS_OF_PIECES[0][:length] for length in range(3, 60)]
    found = [prompt for prompt in prompts if (seam := model.prompt(prompt).seam) and seam.removed]
    assert 5 < len(found) < len(prompts)
    return found


def test_a_text_goes_on_in_the_piece_at_the_end_of_its_prompt(model: Model) -> None:
    assert model.bundle.tokenizer.model
    contents = model.bundle.tokenizer.model.entries.contents
    for prompt in healed(model):
        asked = model.prompt(prompt)
        assert asked.seam
        opened, begins = asked.open(), asked.seam.begin.tokens
        assert opened.tokens == asked.tokens[:-1]
        assert {contents[token] for token in begins} == {
            content for content in contents if content.startswith(contents[asked.ids[-1]])
        }
        state = model.sampler.start([[1, *opened.ids]])
        logits, _ = model.sampler.next_logits(state)
        best = max(begins, key=lambda token: logits[0, token])
        options = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True, "echo": False}
        found = model.generate(prompt, **options)
        expected = model.bundle.tokenizer.detokenize([*opened.tokens, model.bundle.vocabulary.words[best]])
        assert (prompt + found.text).startswith(expected)
        assert len(found.tokens) == 3
        assert found.follows_all == (best == asked.ids[-1])
        whole = model.generate(prompt, logprobs=2, **options)  # not healed
        assert whole.top_logprobs
        assert {*whole.top_logprobs[0]} == {word for word, _ in model.next_words(prompt, k=2)}
        if found.follows_all:
            assert found.tokens == whole.tokens
        for after in (None, model.read(prompt)):
            assert model.bundle.tokenizer.detokenize(model.read(found, after=after).tokens) == prompt + found.text
        assert model.bundle.tokenizer.detokenize(model.read("'s", after=model.read(prompt)).tokens) == f"{prompt}'s"


def test_the_same_seed_gives_the_same_text_after_a_seam_everywhere(model: Model, tmp_path: Path) -> None:
    prompts, options = healed(model)[:6], {"seed": 11, "max_new_tokens": 12, "ignore_eos": True, "presence_penalty": 0.5}
    service = Service(model.sampler)
    asked = read_request({"prompt": prompts, "n": 3, "echo": True, **options}, service, "pieces")
    served = service.batcher.generate(service.request(asked.tokenized, asked.resolved), 60)
    written = {(text.prompt_number, text.number): choice(asked, text, 0, None)["text"] for text in served}
    assert len({*written.values()}) > 10
    for number, prompt in enumerate(prompts):
        texts = [text.text for text in model.generate(prompt, n=3, **options)]
        assert texts == [written[number, index] for index in range(3)]
        state = model.read(prompt)
        state.save(tmp_path / "state.npz")
        for read in (state, model.load_prompt(tmp_path / "state.npz")):
            assert [text.text for text in model.generate(read.fork(3), **options)] == texts
            assert [model.generate(fork, **options).text for fork in read.fork(3)] == texts


def test_a_stop_lies_behind_what_the_prompt_has(model: Model) -> None:
    words, tried = model.bundle.vocabulary.words, 0
    for prompt in healed(model):
        seam, tokenizer = model.prompt(prompt).seam, model.bundle.tokenizer
        assert seam
        assert tokenizer.model
        contents = tokenizer.model.entries.contents
        longer = next((token for token in seam.begin.tokens if len(contents[token]) > seam.begin.overlap + 1), None)
        if longer is None:
            continue
        tried += 1
        added = contents[longer][seam.begin.overlap :].decode()
        options = {"logit_bias": [f"{words[longer]}=1000"], "max_new_tokens": 1, "seed": 1}
        assert model.generate(prompt, **options).text == prompt + added
        assert model.generate(prompt, stop=prompt[-1] + added, **options).text == prompt + added
        cut = model.generate(prompt, stop=added[1:], **options)
        assert (cut.text, cut.tokens, cut.finish_reason) == (prompt + added[0], [], "stop")
        assert "".join(model.stream(prompt, stop=added[1:], **options)) == cut.text
        assert model.read(cut).tokens == model.prompt(prompt).tokens
    assert tried > 3


def forbidding(model: Model, prompt: str) -> list[str]:
    """Biases with which no piece may begin a text after a prompt."""
    return [f"{model.bundle.vocabulary.words[token]}=-inf" for token in model.prompt(prompt).begin.tokens]


def test_no_option_forbids_the_end_of_a_prompt(model: Model) -> None:
    repeating = "a presid a presid"
    for prompt in (*healed(model), repeating):
        forbidden = forbidding(model, prompt)
        options: dict[str, Any] = {"logit_bias": forbidden, "seed": 1, "max_new_tokens": 3, "ignore_eos": True}
        options |= {"no_repeat_ngram_size": 2} if prompt == repeating else {}
        alone = model.generate(prompt, **options)
        assert alone.follows_all
        assert alone.text.startswith(prompt)
        assert len(alone.tokens) == 3
        assert not {f"{token}=-inf" for token in alone.tokens} & {*forbidden}
        assert [text.text for text in model.generate(["We must", prompt], **options)][1] == alone.text
    prompt = "The president "  # after a space the piece is a part of the text
    none = model.generate(prompt, logit_bias=forbidding(model, prompt), seed=1)
    assert (none.text, none.finish_reason) == (prompt, "exhausted")


def test_texts_are_ranked_by_the_scores_of_what_is_generated(model: Model) -> None:
    service = Service(model.sampler)
    given = {"prompt": healed(model)[:8], "best_of": 4, "max_tokens": 5, "seed": 3, "ignore_eos": True}
    asked = read_request(given, service, "pieces")
    texts = service.batcher.generate(service.request(asked.tokenized, asked.resolved, logprobs=0), 60)
    again = [text for text in texts if taken_again(text, asked.tokenized[text.prompt_number])]
    assert 0 < len(again) < len(texts)
    for text in texts:
        assert text.scores
        assert text.scores[0] == pytest.approx(log_probabilities(model.sampler, text, 0)[0])


def test_what_came_again_is_found_without_a_copy_of_the_prompt(model: Model) -> None:
    prompt = model.prompt("The people said " * 5_000 + "The presid")
    text = Text([*prompt.open().ids, prompt.ids[-1]], 0, 0, begin=prompt.begin)
    tracemalloc.start()
    try:
        assert taken_again(text, prompt) == [prompt.ids[-1]]
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


def test_texts_of_all_seams_begin_in_one_call(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = healed(model)[:8]
    options = {"seed": 4, "max_new_tokens": 6, "ignore_eos": True}
    assert len({model.prompt(prompt).begin for prompt in prompts}) > 5
    alone = [model.generate(prompt, **options).text for prompt in prompts]
    calls: list[tuple[int, int]] = []
    step = Batch.step

    def counted(batch: Batch) -> list[tuple[Text, list[int]]]:
        pace, before = batch.pace.tokens, len(batch)
        growth = step(batch)
        calls.append((before, max(len(tokens) for _, tokens in growth)))
        assert batch.pace.tokens == pace or calls[-1][1] > 1  # a first call does not teach how fast others are
        return growth

    monkeypatch.setattr(Batch, "step", counted)
    assert [text.text for text in model.generate(["We must", *prompts], **options)][1:] == alone
    assert calls[0] == (1 + len(prompts), 1)
    assert len(calls) <= 3


def test_reading_on_keeps_the_space_of_a_model_that_puts_one_before_texts(folder: Path, tmp_path: Path) -> None:
    learned = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<eos>"], show_progress=False)
    learned.train_from_iterator(TEXTS_OF_PIECES * 5, trainer=trainer)
    pieces = Pieces(Saved(library="tokenizers", model=json.loads(learned.to_str())))
    assert pieces.adds_space
    other = lmdist.load(folder / "bundle")
    unused = [f"<x{number}>" for number in range(other.bundle.sizes.vocabulary_size - len(pieces.words))]
    vars(other.bundle)["tokenizer"] = WordTokenizer(other.bundle.tokenizer.settings, model=pieces)
    vars(other.bundle)["vocabulary"] = Vocabulary([*pieces.words, *unused])
    whole, read = other.prompt("The p"), other.read(" p", after=other.read("The"))
    read.save(tmp_path / "p.npz")
    assert read.seam == whole.seam
    assert whole.seam
    assert whole.seam.given == " p"
    for seed in range(3):
        expected = other.generate(whole, seed=seed, max_new_tokens=3)
        assert expected.text.startswith("The p")
        for prompt in (read, other.load_prompt(tmp_path / "p.npz")):
            assert other.generate(prompt, seed=seed, max_new_tokens=3).text == expected.text


def rewriting(model: Model, **changes: object) -> Bundle:
    """The bundle of a model, with other settings or with a normalizer, as models of others have."""
    tokenizer = model.bundle.tokenizer
    assert tokenizer.model
    saved = tokenizer.model.saved
    if normalizer := changes.pop("normalizer", None):
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
        assert isinstance(saved["model"], dict)
        saved = Saved(library="tokenizers", model=saved["model"] | {"pre_tokenizer": split, "normalizer": {"type": normalizer}})
    settings = dataclasses.replace(tokenizer.settings, **changes)
    bundle = copy.copy(model.bundle)
    vars(bundle)["tokenizer"] = WordTokenizer(settings, model=Pieces(saved))
    return bundle


def test_stops_are_looked_for_as_the_model_writes_them(model: Model) -> None:
    def stops(bundle: Bundle) -> list[bytes]:
        options = Options.from_values({"stop": [" The End", "\nNo…\n", "\n\n"]})
        return [bytes(stop) for stop in resolve(options, bundle).stops.stops]

    assert stops(model.bundle) == [b" The End", "\nNo…\n".encode(), b"\n\n"]
    assert stops(rewriting(model, lowercase=True)) == [b" the end", "\nno…\n".encode(), b"\n\n"]
    assert stops(rewriting(model, normalizer="NFKC")) == [b" The End", b"\nNo...\n", b"\n\n"]


@pytest.mark.parametrize("changes", [{"lowercase": True}, {"normalizer": "NFKC"}])
def test_offsets_lie_in_the_text_that_was_given(model: Model, changes: dict[str, object]) -> None:
    service = Service(model.sampler)
    service.bundle = rewriting(model, **changes)
    given = "İİİİİİİİ the… ﬁﬁﬁ… people"
    asked = read_request({"prompt": given, "echo": True, "max_tokens": 0, "logprobs": 0}, service, "pieces")
    tokens = asked.tokenized[0].ids
    scores = [0.0] * len(tokens), [[] for _ in tokens]
    offsets = choice(asked, Text(tokens, 0, 0, finish_reason="length"), 0, scores)["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(given)


def test_bad_words_and_biases_are_with_and_without_a_space(model: Model) -> None:
    words = model.bundle.vocabulary.words
    assert {"▁the", "the"} <= set(words) or "▁the" in words
    options = {"seed": 1, "max_new_tokens": 200, "ignore_eos": True}
    found = model.generate("The.", logit_bias=["the=50"], **options).tokens
    assert set(found) <= {"▁the", "the"}
    assert "▁the" not in model.generate("The", bad_words=["the"], **options).tokens
    assert model.generate("The.", logit_bias=["▁the=50"], **options).tokens[0] == "▁the"


def test_scores_vectors_and_next_words(model: Model) -> None:
    score = model.score("The president said\nthat.")
    assert not score.unknown.any()
    assert score.tokens[-1] == "<eos>"
    assert model.bundle.tokenizer.detokenize(score.tokens[:-1]) == "The president said\nthat."
    assert model.vector("the").shape == (6,)
    assert len(model.next_words("The president", k=3)) == 3
    assert [*model.generate(["The", "We"], max_new_tokens=3)]


def test_a_prompt_that_was_read_continues_with_its_space(model: Model, tmp_path: Path) -> None:
    state = model.read("The president ")
    state.save(tmp_path / "said.npz")
    for before in (state, model.load_prompt(tmp_path / "said.npz")):
        both = model.read("said", after=before)
        assert model.bundle.tokenizer.detokenize(both.tokens) == "The president said"
        assert both.ids == model.prompt("The president said").ids


def test_it_needs_no_torch_and_the_command_streams(folder: Path) -> None:
    arguments = [folder / "bundle", "--prompt", "The pres", "--seed", "1", "--max-new-tokens", "20", "--stream"]
    done = in_fresh_process("generate", arguments, {"torch", "pandas", "sentencepiece", "nltk"})
    assert done.stderr.splitlines()[-1] == "set()"
    assert done.stdout.startswith("The pres")


def test_the_bundle_has_the_files_of_its_pieces(folder: Path, model: Model) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(folder / "bundle/tokenizer.json"))
    assert theirs.encode(TEXTS_OF_PIECES[0]).ids == model.prompt(TEXTS_OF_PIECES[0]).ids
    assert "lmdist[cpu,serve,subword]" in (folder / "bundle/requirements.txt").read_text()
    assert (folder / "bundle/text.json").read_bytes() == (folder / "data/text.json").read_bytes()


def test_pieces_of_another_vocabulary_are_refused(folder: Path, tmp_path: Path) -> None:
    import hashlib
    import shutil

    other = shutil.copytree(folder / "bundle", tmp_path / "bundle")
    words = (other / "vocab.txt").read_text().splitlines()
    (other / "vocab.txt").write_text("".join(f"{word}\n" for word in [*words[:-2], words[-1], words[-2]]))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["vocab.txt"]["sha256"] = hashlib.sha256((other / "vocab.txt").read_bytes()).hexdigest()
    manifest[OWN_CHECKSUM] = own_checksum(manifest)
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"the pieces of text.json are not the words of vocab.txt"):
        lmdist.load(other).generate("The")


def test_without_the_library_it_is_one_line(folder: Path) -> None:
    code = (
        "import sys; from importlib.machinery import PathFinder; find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *more: None if name == 'tokenizers' else find(name, *more)\n"
        f"from lmdist_export.generate import main; main([{str(folder / 'bundle')!r}, '--prompt', 'a'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 64
    assert "the package tokenizers is not installed: pip install" in done.stderr.splitlines()[-1]


def test_a_run_starts_from_the_same_pieces_only(folder: Path, tmp_path: Path) -> None:
    from lmdist.training.data import DataFolder
    from lmdist.training.starting_point import check_base, load_base

    base = load_base(str(folder / "runs/small"))
    prepare(PrepareSettings(inputs=[str(folder / "a.jsonl")], vocabulary=str(folder / "runs/small"), seed=3), tmp_path / "same")
    check_base(base, UNTIED, DataFolder(tmp_path / "same"))
    prepare(PrepareSettings(inputs=[str(folder / "a.jsonl")], tokenizer="bpe", vocabulary_size=300), tmp_path / "other")
    with pytest.raises(UsageError, match=r"has other pieces of words than .*: prepare it with --vocabulary"):
        check_base(base, UNTIED, DataFolder(tmp_path / "other"))
