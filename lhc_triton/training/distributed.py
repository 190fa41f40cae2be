"""Many processes, one run: who is who under torchrun, sums over all, shares of a batch, one batch norm."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(minutes=10)
# What the backends say when the other end of a connection is gone; none of them has a type of its own for it.
_LOST = ("connection closed by peer", "connection reset", "broken pipe", "gloo", "nccl", "timed out")


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def share(self, indices: Tensor) -> Tensor:
        """Return this process's part of ``indices`` [N]: adjacent ones, N / size of them, more or less."""
        return indices.tensor_split(self.size)[self.rank]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors (one shape and type everywhere), the same bits on all."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        _sum_in_place(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of the processes' tensors (of one shape and floating type), the same bits on all."""
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum(torch.zeros((), device=self.device)).item()  # a device only queues the sum

    def check_same(self, what: str, value: str) -> None:
        """Raise ValueError on every process unless all have the same ``value``; ``what`` names it."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(value.encode()).digest()), dtype=torch.uint8)
        table = torch.zeros(self.size, len(digest), dtype=torch.int64, device=self.device)
        table[self.rank] = digest.to(table)
        table = self.sum(table)
        others = (table != table[0]).any(1).nonzero().flatten().tolist()
        if others:
            raise ValueError(
                f"rank {others[0]} has another {what} than rank 0: give every process the same settings, "
                "data and run folder (a folder that all machines see)"
            )

    def check_shared(self, folder: Path) -> None:
        """Raise ValueError on every process unless all see in ``folder`` what the first one writes there."""
        if self.size == 1:
            return
        moment = time.time_ns() if self.is_main else 0
        token = folder / f".{self.sum(torch.tensor(moment)).item()}.tmp"  # no earlier run has left this name
        if self.is_main:
            token.touch()
        self.barrier()
        blind = torch.zeros(self.size, dtype=torch.int64)
        blind[self.rank] = not token.exists()
        others = self.sum(blind).nonzero().flatten().tolist()
        if self.is_main:
            token.unlink()
        if others:
            raise ValueError(
                f"rank {others[0]} does not see {folder} of rank 0: give a run folder that all machines see"
            )

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that its gradients become means over the processes; alone it stays as it is."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices)
        # Batch norm's statistics and the masks are equal on all processes without being sent in every step.
        wrapped.broadcast_buffers = False
        return wrapped

    def synchronise_batch_norm(self, model: nn.Module) -> nn.Module:
        """Make batch norm take its statistics over the processes' batches together; state_dict keys stay."""
        if self.size == 1:
            return model
        if self.device.type == "cuda":
            synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return synchronised
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.BatchNorm2d:
                    setattr(parent, name, _BatchNormOverRanks.of(child))
        return model

    def average_batch_norm(self, model: nn.Module) -> None:
        """Give all processes the mean of their running statistics (equal already where synchronised)."""
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in (module.running_mean, module.running_var):
                    if buffer is not None:
                        buffer.copy_(self.mean(buffer))


@contextmanager
def exchanging(model: nn.Module, last: bool) -> Iterator[None]:
    """The context of a forward and backward pass: gradients are exchanged in the last one of a step only."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    with warnings.catch_warnings(), nullcontext() if last else model.no_sync():
        # Strides of axes of length 1 mean nothing, and differ: torch remarks on that.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or train alone where it started none.

    The environment says who is there (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). CPUs talk
    through gloo, CUDA devices through NCCL. A process group that the program has made already is used and
    left as it is.

    Args:
        device: "cpu", "cuda" (under torchrun the device of the process's local rank) or "cuda:N".

    Raises:
        ValueError: the device is not there, or one device is named for several processes.
        ConnectionError: another process of the run was lost.
    """
    made = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if made else _number("WORLD_SIZE", 1)
    place = _device(device, _number("LOCAL_RANK", 0) if size > 1 else None)
    if size == 1:
        yield World(0, 1, place)
        return
    if not made:
        if place.type == "cuda":
            torch.cuda.set_device(place)
        _join(place)
    rank = dist.get_rank()
    try:
        yield World(rank, size, place)
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in _LOST):
            raise ConnectionError(
                f"rank {rank} of {size} lost another process of the run, whose own message says why; "
                "the same command goes on from the last checkpoint"
            ) from error
        raise
    finally:
        if not made:
            dist.destroy_process_group()


def _sum_in_place(tensor: Tensor) -> None:
    """Sum over the processes, and return only when no thread of gloo's holds the tensor any more.

    Such a thread lets go of it after the sum is known, and needs Python's lock for that. Where the program
    ends in between, the thread finds an interpreter that is gone and aborts the process. gloo's threads
    outlive the group (torch 2.13), so that destroying it is no way around.
    """
    holders = tensor._use_count()  # type: ignore[attr-defined]
    try:
        dist.all_reduce(tensor)
    finally:
        while tensor.device.type == "cpu" and tensor._use_count() > holders:  # type: ignore[attr-defined]
            time.sleep(0)


def _join(device: torch.device) -> None:
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))
    store.set_timeout(_TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = fresh_store(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def fresh_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Agree on a part of a store that no earlier process has written to.

    torchrun keeps its store over a restart. Under their old names, new processes would find the addresses of
    the ones that are gone and wait for them; and no number that torchrun hands out is both new in a restart
    and the same on all machines. So rank 0 makes up a name, and gives it to every process that asks: what an
    earlier process asked is answered as well, but confirmed by none.

    Args:
        store: shared by the processes, and perhaps by earlier ones.
        rank: this process.
        size: how many there are.

    Raises:
        ConnectionError: a process did not come within ten minutes.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"lhc/asks/{rank}", mine)
        name = store.get(f"lhc/answer/{mine}").decode()
        store.set(f"lhc/{name}/has/{rank}", "")
        return dist.PrefixStore(f"lhc/{name}", store)
    missing = set(range(1, size))
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"lhc/asks/{other}"]):
                store.set(f"lhc/answer/{store.get(f'lhc/asks/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"lhc/{mine}/has/{other}"])}
        if time.monotonic() > deadline:
            raise ConnectionError(f"rank {min(missing)} of {size} did not come; start all processes again")
        time.sleep(0.02)
    return dist.PrefixStore(f"lhc/{mine}", store)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(
            f"the environment variable {name} is {text!r}, not a whole number; start with torchrun"
        )
    return int(text)


def _device(name: str, local_rank: int | None) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one of cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not one of cpu, cuda, cuda:N")
    if device.type == "cuda" and local_rank is not None:
        if ":" in name:
            raise ValueError(f"device {name!r} is one device for several processes; give cuda")
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} is not there; {torch.cuda.device_count()} CUDA devices are")
    return device


class _SumOverRanks(torch.autograd.Function):
    """A sum over the processes; so is its gradient, since every process's loss depends on each summand."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        _sum_in_place(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        _sum_in_place(total)
        return total


class _BatchNormOverRanks(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, for CPUs, which torch's SyncBatchNorm does not serve.

    The sums are taken in float64, so that the variance may be formed from the mean of squares.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> _BatchNormOverRanks:
        """Take over parameters and statistics: the same Parameter objects."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made._parameters.update(norm._parameters)
        made._buffers.update(norm._buffers)
        return made.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise this process's part [N, C, H, W] of the batch."""
        if not self.training or self.momentum is None or self.running_mean is None:
            return super().forward(input)
        values = input.double()
        count = values.new_full((1,), values.numel() // values.shape[1])
        sums = _SumOverRanks.apply(torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), count]))
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * total / (total - 1).clamp_min(1)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)  # type: ignore[union-attr]
        normal = (values - mean.view(-1, 1, 1)) * (variance + self.eps).rsqrt().view(-1, 1, 1)
        return (normal * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(input.dtype)
