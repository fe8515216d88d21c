"""The ranks of a job: the one file of the trainer that imports torch.distributed.

torchrun's environment variables name the number of ranks and this rank. Without torchrun there is one rank and no process
group. The rest of lmdist asks a `World` for sums, for this rank's part of a batch, and for a wrapped model, and a `RowAverage`
for the average of a gradient with few rows.

Shapes: W ranks, N tokens of this rank's batch, R rows read by all ranks, E embedding.
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

LONG_TIMEOUT = timedelta(minutes=30)
"""Between steps, where ranks wait longer than in one: some read more of a validation than others, rank 0 has a large model to
read, samples and checkpoints to write. A rank that dies meanwhile is noticed at once."""

CUBLAS_WORKSPACES = ":4096:8"
"""Eight buffers of 4,096 KiB, NVIDIA's setting for results that repeat; together as much as torch gives cuBLAS on an H100."""


@dataclass
class World:
    """The ranks of a job, as this one sees them."""

    rank: int
    size: int
    device: torch.device
    patient_group: dist.ProcessGroup | None = field(default=None, repr=False)
    """The same ranks with the timeout LONG_TIMEOUT, or their own where that is longer."""
    pending: tuple[dist.Work, Tensor] | None = field(default=None, repr=False)
    """The all-reduce that `any_delayed` has started, and its tensor."""

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes."""
        return self.rank == 0

    def part_of(self, global_batch: int) -> slice:
        """Return which sequences of a global batch are this rank's."""
        batch_size = global_batch // self.size
        return slice(self.rank * batch_size, (self.rank + 1) * batch_size)

    def wrap(self, model: nn.Module, compression: str, excluded: nn.Parameter | None = None) -> nn.Module:
        """Return the model with gradients averaged over the ranks in each backward pass, sent in bf16 by `compression` bf16.

        The gradient of the parameter `excluded` is not averaged: `RowAverage` does that.
        """
        if compression == "bf16" and self.device.type != "cuda":
            raise UsageError("training.gradient_compression bf16 needs GPUs; on CPUs it must be none")  # gloo has no bf16
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # DDP takes all parameters from rank 0, and averages the gradients of those that require one while it is built.
        if excluded is not None:
            excluded.requires_grad_(False)
        network = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        if excluded is not None:
            excluded.requires_grad_(True)
        if compression == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            network.register_comm_hook(None, bf16_compress_hook)
        return network

    def gradient_sync(self, network: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
        """Average the gradients over the ranks in this backward pass only if `enabled`, as for the last part of a batch."""
        return nullcontext() if enabled or not isinstance(network, DistributedDataParallel) else network.no_sync()

    def sum(self, values: list[float]) -> list[float]:
        """Return the sum of each value over the ranks, in fp64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, value: bool) -> bool:
        """Return whether `value` is true on some rank, which is waited for as in `wait_for_all`."""
        if self.size == 1:
            return value
        count = torch.tensor([float(value)])
        dist.all_reduce(count, group=self.patient_group)
        return bool(count.item())

    def any_delayed(self, value: bool) -> bool:
        """Return whether the `value` of the previous call was true on some rank: the same on all ranks, without a wait.

        The all-reduce of a call runs in the background until the next call. One rank has the answer at once.
        """
        if self.size == 1:
            return value
        flag = torch.tensor([float(value)])
        previous, self.pending = self.pending, (dist.all_reduce(flag, async_op=True), flag)  # type: ignore[assignment]
        if previous is None:
            return False
        work, answer = previous
        work.wait()
        return bool(answer.item())

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all ranks one below the other, (G / W, ...) -> (G, ...), on each rank."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def broadcast(self, text: str) -> str:
        """Return rank 0's `text` on every rank."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, device=torch.device("cpu"))
        return texts[0]

    def wait_for_all(self) -> None:
        """Wait until all ranks have come this far: longer than in a step, for one may have gigabytes to read or to write."""
        if self.size > 1:
            dist.barrier(group=self.patient_group)

    def gather_texts(self, text: str, limit: int = 4096) -> list[str]:
        """Return the texts of all ranks, each cut off after `limit` bytes of UTF-8, on each rank."""
        data = text.encode()[:limit].ljust(limit, b"\0")
        rows = self.gather(torch.frombuffer(bytearray(data), dtype=torch.uint8)[None])  # (W, limit)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]

    def close(self, *, interrupted: bool = False) -> bool:
        """Wait until all ranks have come this far, leave the process group; return whether one of them was interrupted."""
        if self.size == 1:
            return interrupted
        if self.pending:
            self.pending[0].wait()
        interrupted = self.any(interrupted)
        dist.destroy_process_group()
        return interrupted


class RowAverage:
    """The average over the ranks of the gradient of a matrix of which a batch reads few rows: an embedding that is not tied.

    DDP would send a zero for each number of each row that no rank has read. Here the ranks exchange the ids of their rows
    while they compute, and then all-reduce the rows that at least one of them has read: less than all rows on any number of
    ranks, whereas an all-gather of each rank's own rows would be more from some hundred ranks on. The gradient remains a
    dense tensor, so clipping, loss scaling and the optimizers do the same as on one rank. Without a parameter, or with one
    rank, nothing is done.
    """

    def __init__(self, world: World, parameter: nn.Parameter | None, compression: str) -> None:
        self.world = world
        self.parameter = parameter if world.size > 1 else None
        self.dtype = torch.bfloat16 if compression == "bf16" else torch.float32
        self.pending: tuple[dist.Work, Tensor] | None = None

    def start(self, ids: Tensor) -> None:
        """Start to exchange the ids of the rows that this rank's batch reads, a tensor on the CPU of one shape on all ranks."""
        if self.parameter is not None:
            own = ids.flatten().int()
            ids_of_all = own.new_empty(self.world.size, len(own))  # (W, N)
            self.pending = dist.all_gather(list(ids_of_all), own, async_op=True), ids_of_all  # type: ignore[assignment]

    def finish(self) -> None:
        """Average the gradient after the last backward pass of the batch."""
        if self.parameter is None:
            return
        assert self.pending is not None
        assert self.parameter.grad is not None
        (work, ids_of_all), self.pending, gradient = self.pending, None, self.parameter.grad
        work.wait()
        mask = torch.zeros(len(gradient), dtype=torch.bool)
        mask[ids_of_all.flatten().long()] = True
        index = mask.nonzero().squeeze(1)  # (R), sorted: the same on all ranks
        if gradient.device.type == "cuda":
            index = index.pin_memory().to(gradient.device, non_blocking=True)
        rows = gradient.index_select(0, index).to(self.dtype).div_(self.world.size)  # (R, E)
        dist.all_reduce(rows)
        gradient.index_copy_(0, index, rows.to(gradient.dtype))


def lost_peer(error: Exception) -> bool:
    """Return whether an error means that another rank has died or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def full_memory(error: BaseException) -> str:
    """Return whose memory could not be allocated, "the GPU's" or "this machine's"; empty for an error of another kind."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's"
    if isinstance(error, RuntimeError):
        # What CUDA, cuDNN and cuBLAS allocate by themselves, beside torch's tensors.
        if any(said in str(error) for said in ("CUDA error: out of memory", "STATUS_ALLOC_FAILED")):
            return "the GPU's"
        return "this machine's" if "can't allocate memory" in str(error) else ""
    return "this machine's" if isinstance(error, MemoryError) else ""


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that `name` (auto, cpu or cuda) is for a rank of this machine; raise UsageError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UsageError("the device is to be cuda, and torch sees no CUDA device: check nvidia-smi and the torch build")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"rank {local_rank} of this machine needs GPU number {local_rank}, and there are {torch.cuda.device_count()}: "
            f"start torchrun with --nproc_per_node={torch.cuda.device_count()}, or with --training.device cpu"
        )
    # Without it cuBLAS adds in another order now and then where cuDNN's LSTM uses several streams, and no run resumes bit for
    # bit. It is read at the first matrix multiplication.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES)
    torch.cuda.set_device(local_rank)
    return torch.device(name, local_rank)


def join_job(device: str, global_batch: int, accumulation: int, timeout_seconds: float) -> World:
    """Join the job that torchrun has started; raise UsageError if the device or the number of ranks does not fit."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if global_batch % (size * accumulation):
        fitting = [w for w in range(1, global_batch + 1) if global_batch % (w * accumulation) == 0]
        raise UsageError(
            f"data.global_batch {global_batch} cannot be divided evenly over {size} ranks x {accumulation} parts: "
            f"take a multiple of {size * accumulation}, or a number of ranks out of {fitting or 'none'}"
        )
    own_device = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    patient_group = None
    if size > 1:
        # gloo beside NCCL: flags and figures of the job are in the CPU's memory, and wait for no GPU.
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo",
            timeout=timeout,
            device_id=own_device if own_device.type == "cuda" else None,
        )
        patient_group = dist.new_group(backend="gloo", timeout=max(timeout, LONG_TIMEOUT))
        assert isinstance(patient_group, dist.ProcessGroup), patient_group  # a number on ranks outside it: none is
    return World(rank, size, own_device, patient_group)
