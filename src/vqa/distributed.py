"""What one rank of a torchrun job needs to know and do. One rank takes the same path as many.

What exchanges values also works in a process that torchrun did not start: it is a job of one rank, without a group.
"""

import datetime
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from vqa import die_with_parent
from vqa.config import ConfigError, LaunchConfig

TIMEOUT = datetime.timedelta(minutes=10)
HINT_SECONDS = 2  # ranks that waited for another give up together, within about this time
SAME_REQUEST_SECONDS = 1  # torchrun passes on to its ranks what a cluster may also have sent them directly
T = TypeVar("T")


class LateRank(RuntimeError):
    """A rank was waited for longer than TIMEOUT; the message names it."""


class Stopped(RuntimeError):
    """All ranks leave their work at the same point, because one of them was asked to."""


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
        key = "launch.world_size is" if here == launch.world_size else "torchrun's --nproc-per-node is"
        raise ConfigError(
            f"{key} {here} but this machine has {torch.cuda.device_count()} GPUs: lower it, or set launch.device to cpu"
        )


@contextmanager
def process_group(launch: LaunchConfig) -> Iterator[Rank]:
    """Join the job that torchrun describes in the environment; leave it when the block ends.

    Raises ConfigError if torchrun did not start this process, or not with `launch.world_size` ranks;
    LateRank where gloo's time-out shows that one does not come. (NCCL's own watchdog ends the process.)
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
    store, _, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # One store through all restarts: without a prefix a new gang would meet the addresses of the dead one. (Where
        # every gang has a store of its own it needs none, and an agent that joined late counts restarts anew.)
        store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        yield Rank(rank, local_rank, world_size, device)
    except RuntimeError as error:
        if late := _late_ranks(str(error), store, rank, world_size):
            names = " and ".join(f"rank {number}" for number in late)
            raise LateRank(f"{names} did not come within {TIMEOUT.total_seconds():.0f} s: see what holds it") from error
        raise
    finally:
        dist.destroy_process_group()


def _late_ranks(message: str, store: dist.Store, rank: int, world_size: int) -> list[int]:
    """The ranks that others waited for in vain; none unless `message` is that of a collective that failed so.

    Every rank whose wait ends, by time-out or because a neighbour gave up, notes that in the store.
    """
    waited = "timed out" in message.lower() or "timeout" in message.lower()
    if not (waited or "connection" in message.lower()):
        return []
    store.set(f"waited/{rank}", "")
    if not waited:
        return []
    time.sleep(HINT_SECONDS)
    return [number for number in range(world_size) if not store.check([f"waited/{number}"])]


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all ranks, on every rank."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def barrier() -> None:
    """Wait until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(world_size x N, …) every rank's `rows` (N, …), rank after rank, on every rank.

    Gradients flow back to the rank a row came from: the sum of those that all ranks' losses have for it.
    """
    return _GatherRows.apply(rows) if dist.is_initialized() else rows


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
    if not dist.is_initialized():
        return [value]
    gathered = [None] * rank.world_size if rank.is_main else None
    dist.gather_object(value, gathered)
    return gathered or []


def from_main(value: object) -> object:
    """The main rank's `value`, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def main_first(work: Callable[[], T], rank: Rank) -> T | None:
    """What `work` gives on the main rank, None on the others, which wait; what it raises there is raised on all."""
    result, failure = None, None
    if rank.is_main:
        try:
            result = work()
        except Exception as error:
            failure = error
    if failure := from_main(failure):
        failure.from_main_rank = not rank.is_main  # for exit_with
        raise failure
    return result


def exit_with(error: Exception, sentence: str = "", alone: bool = False) -> NoReturn:
    """End this process with status 1 and one line, `error: <sentence or error>`, that only one of the ranks prints.

    That is the main rank, where every rank raises `error` alike. An error that may be of this rank `alone` is
    printed here too, unless it came from the main rank through `main_first`.
    """
    prints = os.environ.get("RANK", "0") == "0" or (alone and not getattr(error, "from_main_rank", False))
    sys.exit(f"error: {sentence or error}" if prints else 1)


def anyone(yes: bool | torch.Tensor, rank: Rank, group: dist.ProcessGroup | None = None) -> bool:
    """Whether `yes` on any rank, on every rank: one number is exchanged."""
    if rank.world_size == 1:
        return bool(yes)
    flag = torch.as_tensor(yes, dtype=torch.float32, device=rank.device).clone()
    dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return bool(flag)


_asked: list[float] = []  # the moments at which this process was asked to stop


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT ask the job to stop where `stop_if_asked` is next called.

    A second one, unless it comes within SAME_REQUEST_SECONDS, ends the process at once.
    """

    def ask(number: int, _) -> None:
        if _asked and time.monotonic() - _asked[0] > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _asked.append(time.monotonic())

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_asked(rank: Rank) -> None:
    """Raise Stopped on every rank if any was asked to stop. Every rank must call this equally often."""
    if anyone(bool(_asked), rank):
        raise Stopped("stopped")
