"""benchmarks/quality.py: turns in which only the running time counts, and the 5-gram floor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

import quality

ARPA = """\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-1.0\t<unk>\t0
0\t<s>\t-0.5
-0.7\t</s>\t0
-0.3\t7\t-0.25

\\2-grams:
-0.1\t<s> 7
-0.2\t7 </s>

\\end\\
"""


def test_an_n_gram_that_is_missing_backs_off_to_a_shorter_one(tmp_path):
    (tmp_path / "model.arpa").write_text(ARPA)
    line = ["<s>", "7", "7", "8", "</s>"]
    log10, backoff = quality.read_arpa(tmp_path / "model.arpa", set(quality.ngrams([line])))
    found = [quality.probability(tuple(line[: place + 1]), log10, backoff) for place in range(1, len(line))]
    assert found == pytest.approx([-0.1, -0.25 - 0.3, -0.25 - 1.0, -0.7])  # 7 after <s>; 7 after 7; unknown; </s> after it


def test_an_end_mark_ends_a_sentence_and_counts_as_a_token():
    assert list(quality.sentences(np.array([5, 6, 1, 7, 1, 8]))) == [
        ["<s>", "5", "6", "</s>"],
        ["<s>", "7", "</s>"],
        ["<s>", "8", "</s>"],
    ]


@pytest.mark.skipif(not shutil.which("lmplz"), reason="KenLM's lmplz is not installed")
def test_the_floor_of_a_text_that_follows_from_the_word_before_is_low():
    tokens = np.array([2, 3, 4, 5, 1] * 200)
    assert quality.perplexity(quality.kneser_ney_nats(tokens, tokens) or 0) < 1.2


COUNTER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time\\nwhile True:\\n  print('tick', flush=True); time.sleep(0.02)"])
time.sleep(600)
"""


def test_a_system_runs_in_its_turns_only(tmp_path):
    system = quality.System("ours", [sys.executable, "-c", COUNTER], tmp_path / "metrics.jsonl", tmp_path / "log")
    ticks = 0
    while not ticks:  # the machine may be busy
        assert not system.take_turn(1.0)
        ticks = system.log.read_text().count("tick")
    time.sleep(0.5)
    stopped = system.log.read_text().count("tick")
    assert stopped <= ticks + 1, "its child process runs while it is stopped"
    before, between = system.minutes, time.time()
    time.sleep(1)
    while system.log.read_text().count("tick") <= stopped:
        assert not system.take_turn(1.0)
    assert system.minutes_at(between) == before, "the time that it was stopped counts"
    assert system.minutes * 60 == pytest.approx(len(system.spans), abs=0.9)
    assert system.process is not None
    tree = psutil.Process(system.process.pid).children()
    system.end()
    _, alive = psutil.wait_procs(tree, timeout=10)  # a signal is sent at once and acted on when the kernel gets to it
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_a_system_that_fails_shows_its_messages(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no data')"]
    system = quality.System("ours", command, tmp_path / "metrics.jsonl", tmp_path / "log")
    with pytest.raises(SystemExit, match=r"no data\n\nours failed"):
        system.take_turn(60)


@pytest.mark.slow
def test_both_systems_train_on_a_generated_text(tmp_path):
    file = tmp_path / "rows.json"
    flags = ["--quick", "--minutes", "0.04", "--json", file, "--plot", tmp_path / "rows.png"]
    done = subprocess.run([sys.executable, quality.__file__, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["case"], row["variant"]): row for row in json.loads(file.read_text())}
    for split in ("valid", "test"):
        unigram = rows[f"generated {split}", "unigram"]["value"]
        assert rows[f"generated {split}", "lmdist"]["value"] < unigram
        assert rows[f"generated {split}", "baseline"]["ratio"] == 1
    curve = rows["generated valid", "lmdist"]["curve"]
    assert [minutes for minutes, _ in curve] == sorted(minutes for minutes, _ in curve)
    assert min(perplexity for _, perplexity in curve) == rows["generated valid", "lmdist"]["value"]
    assert (tmp_path / "rows.png").stat().st_size
