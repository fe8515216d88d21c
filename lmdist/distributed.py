"""The ranks of a job: the one file in which torch.distributed is said.

A job is whatever torchrun started: its environment says how many ranks there are and which one this is. Without torchrun
there is one rank, and no process group is made. The rest of lmdist only asks a `World` for sums, rows and a wrapped model.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lmdist.errors import UsageError

TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for its peers before it takes them for dead."""


@dataclass(frozen=True)
class World:
    """All the ranks of a job, seen from this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def rows(self, global_batch: int) -> slice:
        """The rows of a global batch that are this rank's."""
        share = global_batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks in each backward."""
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def accumulating(self, network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Keep the ranks' gradients apart until the last part of a batch."""
        return nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()

    def sum(self, values: list[float]) -> list[float]:
        """The sum of each value over the ranks, in fp64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, here: bool) -> bool:
        """Whether it holds on some rank."""
        return self.sum([float(here)])[0] > 0

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
            dist.broadcast_object_list(said, device=self.device)
        return said[0]

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def start(device: str, global_batch: int, accumulation: int) -> World:
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
    if size > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=place if device == "cuda" else None)
    return World(rank, size, place)
