"""The ranks of a job: the one file in which torch.distributed is said.

A job is whatever torchrun started: its environment says how many ranks there are and which one this is. Without torchrun
there is one rank, and no process group is made. The rest of lmdist only asks a `World` for sums, rows and a wrapped model.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lmdist.errors import UsageError

PATIENCE = timedelta(minutes=30)
"""For the end: rank 0 may have a large checkpoint and a long sample to write. A rank that dies meanwhile is noticed at once."""


@dataclass
class World:
    """All the ranks of a job, seen from this one."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = field(default=None, repr=False)
    """The same ranks, which wait for each other longer."""
    question: tuple[dist.Work, Tensor] | None = field(default=None, repr=False)
    """What the ranks were asked last, and are answering in the background."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def rows(self, global_batch: int) -> slice:
        """The rows of a global batch that are this rank's."""
        share = global_batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: nn.Module, compression: str) -> nn.Module:
        """The model with gradients averaged over the ranks in each backward; by `compression` bf16 they travel rounded."""
        if compression == "bf16" and self.device.type != "cuda":
            raise UsageError("training.gradient_compression bf16 needs GPUs; on CPUs it must be none")  # gloo has no bf16
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        if compression == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            network.register_comm_hook(None, bf16_compress_hook)
        return network

    def accumulating(self, network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Keep the ranks' gradients apart until the last part of a batch."""
        return nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()

    def sum(self, values: list[float]) -> list[float]:
        """The sum of each value over the ranks, in fp64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, here: bool) -> bool:
        """Whether it holds on some rank."""
        return self.sum([float(here)])[0] > 0

    def any_before(self, here: bool) -> bool:
        """Whether it held on some rank when this was called last: known without waiting, and to all ranks alike."""
        if self.size == 1:
            return here
        flag = torch.tensor([float(here)])
        before, self.question = self.question, (dist.all_reduce(flag, async_op=True), flag)  # type: ignore[assignment]
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks one below the other: (G / W, ...) -> (G, ...), the same on each rank."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def agree(self, text: str | None) -> str | None:
        """What rank 0 says, on every rank."""
        said = [text]
        if self.size > 1:
            dist.broadcast_object_list(said, device=torch.device("cpu"))
        return said[0]

    def close(self) -> None:
        """Leave the process group, when all ranks have come this far."""
        if self.size > 1:
            if self.question:
                self.question[0].wait()
            dist.all_reduce(torch.zeros(1), group=self.patient)
            dist.destroy_process_group()


def lost_peer(error: RuntimeError) -> bool:
    """Whether a rank fails because another one went away, or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def start(device: str, global_batch: int, accumulation: int, timeout_seconds: float) -> World:
    """Join the job that torchrun has started; raises UsageError where the device or the number of ranks does not fit."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if global_batch % (size * accumulation):
        fitting = [w for w in range(1, global_batch + 1) if global_batch % (w * accumulation) == 0]
        raise UsageError(
            f"data.global_batch {global_batch} cannot be shared out evenly over {size} ranks x {accumulation} parts: "
            f"take a multiple of {size * accumulation}, or a number of ranks out of {fitting or 'none'}"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("training.device is cuda, and torch sees no CUDA device: check nvidia-smi and the torch build")
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"rank {rank} wants GPU number {local_rank}, and this machine has {torch.cuda.device_count()}: "
                f"start torchrun with --nproc_per_node={torch.cuda.device_count()}, or with --training.device cpu"
            )
        torch.cuda.set_device(local_rank)
    place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    patient = None
    if size > 1:
        # gloo beside NCCL: what the ranks tell each other about the job is in the CPU's memory, and waits for no GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=place if device == "cuda" else None,
        )
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(patient, dist.ProcessGroup), patient  # a number for those who are not in it: all are
    return World(rank, size, place, patient)
