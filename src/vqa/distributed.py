"""What one rank of a torchrun job needs to know and do. One rank takes the same path as many."""

import ctypes
import datetime
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vqa.config import ConfigError, LaunchConfig

AGENT = "VQA_AGENT_PID"  # set by launch
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Rank:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def check_devices(launch: LaunchConfig) -> None:
    """Raise ConfigError if this machine cannot give each of its ranks its own device.

    Its ranks are all there are, unless torchrun says how many of them it started here.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", launch.world_size))
    if launch.device == "cuda" and torch.cuda.device_count() < here:
        said = "launch.world_size is" if here == launch.world_size else "torchrun's --nproc-per-node is"
        raise ConfigError(
            f"{said} {here} but this machine has {torch.cuda.device_count()} GPUs: "
            "lower it, or set launch.device to cpu"
        )


@contextmanager
def process_group(launch: LaunchConfig) -> Iterator[Rank]:
    """Join the job that torchrun describes in the environment; leave it when the block ends.

    Raises ConfigError if torchrun did not start this process, or not with `launch.world_size` ranks.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ:
        raise ConfigError(f"start with torchrun: torchrun --standalone --nproc-per-node {launch.world_size} -m …")
    if int(started) != launch.world_size:
        raise ConfigError(f"torchrun started {started} ranks but launch.world_size is {launch.world_size}")
    die_with_parent()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(launch.threads_per_rank)
    if launch.device == "cuda":
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Rank(rank, local_rank, dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def die_with_parent() -> None:
    """Have Linux end this process when its parent ends, however that happens: no orphans.

    A rank takes seconds to get here. If the torchrun that started it (its pid is in AGENT where
    `launch` started that) is gone by then, the rank ends at once.
    """
    PR_SET_PDEATHSIG = 1
    with suppress(OSError, AttributeError):  # another system than Linux: torchrun's own clean-up has to do
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if "RANK" in os.environ and os.environ.get(AGENT, str(os.getppid())) != str(os.getppid()):
        os._exit(1)


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all ranks, on every rank."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(world_size x N, …) every rank's `rows` (N, …), rank after rank, on every rank.

    Gradients flow back to the rank a row came from: the sum of those that all ranks' losses have for it.
    """
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    """PyTorch's own gathering with gradients has another name in every other release."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient).chunk(dist.get_world_size())[dist.get_rank()]


def gather_objects(value: object, rank: Rank) -> list:
    """Every rank's `value`, in rank order, on the main rank; an empty list on the others."""
    gathered = [None] * rank.world_size if rank.is_main else None
    dist.gather_object(value, gathered)
    return gathered or []


def from_main(value: object) -> object:
    """The main rank's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
