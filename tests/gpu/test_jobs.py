"""Training jobs on a GPU, or where there is none, on the CPU: killed, under torchrun, evaluated, and without memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from corpora import chain, write_data_folder
from lmdist.training import evaluate
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist.training.checkpoints.retain import find_checkpoint
from lmdist.training.distributed import full_memory
from support.jobs import DROPOUT, SMALL, environment, fingerprint, losses, start, train, wait_for_steps

pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
FLAGS = [
    *SMALL,
    *("--data.folder=data", "--model.embedding_size=128", "--model.hidden_size=256", "--data.window=16"),
    *("--sample.words=0", f"--training.device={'cuda' if ON_GPU else 'cpu'}"),
]


SHORT = [*FLAGS, "--model.tied=false", "--training.steps=12", "--checkpoint.every_steps=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with data, in which jobs run, and one short run."""
    place = tmp_path_factory.mktemp("jobs")
    splits = {"train": chain(4_000, 300), "valid": chain(400, 300, seed=1), "test": chain(700, 300, seed=2)}
    write_data_folder(place / "data", splits, 300)
    train(1, *SHORT, "--run_folder=alone", cwd=place)
    return place


def test_a_job_that_is_killed_resumes_bit_for_bit(folder):
    precision = "fp16" if ON_GPU else "bf16"
    flags = [*FLAGS, *DROPOUT, f"--training.precision={precision}", "--training.steps=24", "--checkpoint.every_steps=4"]
    train(1, *flags, "--run_folder=whole", cwd=folder)
    outputs = [folder / "stdout", folder / "stderr"]
    (job,) = start(1, *flags, "--run_folder=killed", cwd=folder, outputs=outputs)
    wait_for_steps(folder / "killed", 10)
    assert job.pid
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    assert job.exitcode == -signal.SIGKILL
    done = train(1, *flags, "--run_folder=killed", "--resume=auto", cwd=folder)
    assert "resuming after step" in done.stderr
    assert fingerprint(folder / "killed") == fingerprint(folder / "whole")
    assert "without a CUDA graph" not in done.stderr
    for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN and no Infinity, also of steps that overflow in fp16


ONE_RANK = '''
from lmdist import train
from lmdist.training import distributed


class One(int):
    """1, which no comparison takes for the number of ranks of a job without a process group."""

    __eq__ = lambda self, other: other is self
    __gt__ = lambda self, other: other <= 1
    __hash__ = int.__hash__


distributed.int = lambda text: One(1) if text == "1" else int(text)
if __name__ == "__main__":
    train.run_as_process(train.main)
'''


@pytest.mark.parametrize("compression", ["none", "bf16"] if ON_GPU else ["none"])
def test_one_rank_with_a_process_group_trains_the_same(folder, compression):
    """By torchrun, with DDP, rows that are exchanged, and all flags and sums: NCCL and gloo side by side on a GPU."""
    script = folder / "one_rank.py"
    script.write_text(ONE_RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(script)]
    run = f"grouped-{compression}"
    command = [*torchrun, *SHORT, f"--run_folder={run}", f"--training.gradient_compression={compression}"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(losses(folder / run)) == 12
    tolerance = 1e-4 if compression == "none" else 0.02
    np.testing.assert_allclose(losses(folder / run), losses(folder / "alone"), rtol=tolerance)


def test_evaluation_is_that_of_fp64_on_a_cpu(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    evaluate.main(["alone", "--json", "--data=data"])
    figures = json.loads(capsys.readouterr().out)
    model = open_checkpoint(find_checkpoint(folder / "alone")).model().double()
    tokens = torch.from_numpy(np.fromfile(folder / "data" / "test.bin", "<u2").astype(np.int64))
    with torch.no_grad():
        state = tuple(part.double() for part in model.initial_state(1))
        hidden, _ = model(torch.cat([torch.tensor([1]), tokens[:-1]])[None], state)
        nats = -model.logits(hidden)[0].log_softmax(1).gather(1, tokens[:, None]).mean()
    assert figures["perplexity"] == pytest.approx(nats.exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "the GPU's"),
        (RuntimeError("CUDA error: out of memory"), "the GPU's"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU's"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU's"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "this machine's"),
        (MemoryError(), "this machine's"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), ""),
        (OSError("memory"), ""),
    ],
)
def test_memory_that_is_full_has_many_names(error, whose):
    assert full_memory(error) == whose


LITTLE_MEMORY = """
import torch
from lmdist import train

torch.cuda.set_per_process_memory_fraction(1e-4)
train.run_as_process(train.main)
"""


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU's memory; tests/training/test_train.py fills the machine's")
def test_a_gpu_without_memory_is_one_line(folder):
    command = [sys.executable, "-c", LITTLE_MEMORY, *FLAGS, "--model.hidden_size=1024", "--run_folder=large"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 64, done.stderr
    assert done.stderr.splitlines()[-1].startswith("lmdist.train: error: the GPU's memory is full: lower data.global_batch")
    assert "Traceback" not in done.stderr
