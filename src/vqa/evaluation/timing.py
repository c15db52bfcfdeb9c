"""What something costs: seconds of several arms taken in turn, medians with intervals, peak memory."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from vqa.results import Result

SETTLING_SECONDS = 0.05  # of untimed calls before a timed one, see `settle`


@dataclass
class Arm:
    """One of several ways to do a thing, and the seconds that each time took.

    `labels` are fields of Result that tell it from the other arms: arm, model, fusion, precision, engine, world_size.
    `work` does the thing on one input, whatever the inputs of a measurement are: a model's input arrays, or the image
    numbers of a training step. `prepare` gets the same input just before, untimed: a barrier that lets all ranks start
    together, or `settle(work)`. A rank that has no part in an arm gives a `work` that does nothing.
    """

    labels: dict[str, Any]
    work: Callable[[Any], Any]
    prepare: Callable[[Any], Any] | None = None
    seconds: list[float] = field(default_factory=list)

    def step(self, given: Any) -> None:
        """Prepare, then work on `given`, and append the seconds of the work to `seconds`."""
        if self.prepare:
            self.prepare(given)
        _synchronize()
        started = time.perf_counter()
        self.work(given)
        _synchronize()
        self.seconds.append(time.perf_counter() - started)

    def result(self, metric: str, values: Sequence[float] | np.ndarray | None = None, quantile: float = 0.5) -> Result:
        """`median_result` of `values`, by default the seconds, under this arm's labels."""
        return median_result(metric, self.seconds if values is None else values, quantile, **self.labels)


def interleave(
    arms: Sequence[Arm], inputs: Iterable[Any], warm_up: int = 0, order: np.random.Generator | None = None
) -> None:
    """Let every arm work on the first input, then every arm on the second, …, so that drift hits all alike.

    Afterwards each arm has one entry in `seconds` per input but for the first `warm_up`, entry n of all arms for the
    same input. With `order` the arms take turns in a new random order for each input, so that what one leaves in the
    caches hits no arm more than another; on several ranks it must be seeded alike.
    """
    for given in inputs:
        for place in range(len(arms)) if order is None else order.permutation(len(arms)):
            arms[place].step(given)
    for arm in arms:
        del arm.seconds[:warm_up]


def ratio(slow: Arm, fast: Arm) -> np.ndarray:
    """How many times as long `slow` took as `fast`, input by input: shape (inputs,)."""
    return np.array(slow.seconds) / np.array(fast.seconds)


def settle(work: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A `prepare` that calls `work` for SETTLING_SECONDS, at least once.

    The threads of the arm before spin a while in wait for more work, and slow down whatever runs next. After these
    calls they sleep, and the arm's own threads are awake.
    """

    def prepare(given: Any) -> None:
        settled = time.perf_counter() + SETTLING_SECONDS
        work(given)
        while time.perf_counter() < settled:
            work(given)

    return prepare


def _synchronize() -> None:
    """Wait for the GPU, if this process uses one: its kernels run on after the call that started them."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median_result(metric: str, values: Sequence[float] | np.ndarray, quantile: float = 0.5, **labels: Any) -> Result:
    """The median of `values` (or another quantile), with a 95 % interval from 2,000 bootstrap resamples.

    `labels` are fields of Result.
    """
    resampled = np.random.default_rng(0).choice(np.asarray(values), (2000, len(values)))
    low, high = np.quantile(np.quantile(resampled, quantile, axis=1), [0.025, 0.975])
    return Result(metric, float(np.quantile(values, quantile)), float(low), float(high), **labels)


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `work` held at one time, beyond what was held before it.

    On a CPU: the highest running sum of the profiler's record of every allocation and release, which
    counts tensors exactly and is not blurred by what the C library keeps.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes)]).max())
