"""From a finished run to a folder that answers without PyTorch.

python -m vqa.quantize runs/<run> FOLDER

FOLDER/
    model-fp32.onnx  model-int8.onnx  tokenizer.json
    config.json      answers, preprocessing, SHA-256 of each file
    README.md        the card: what it is, how good, how large, how fast, measured where
"""

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from vqa.deployment.onnx_int8 import Logits

SETTLING_SECONDS = 0.05  # of untimed calls before a timed one
K = TypeVar("K")


def interleaved(arms: dict[K, Logits], inputs: dict[str, np.ndarray], rounds: int) -> dict[K, list[float]]:
    """Seconds of each arm on the same inputs: every arm in turn, then again, so that drift hits all alike.

    Before its timed call an arm runs untimed for SETTLING_SECONDS, one call at least, until the threads
    of the arm before, which spin a while in wait for more work, sleep and its own are awake.
    """
    seconds: dict[K, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, logits in arms.items():
            settled = time.perf_counter() + SETTLING_SECONDS
            logits(**inputs)
            while time.perf_counter() < settled:
                logits(**inputs)
            started = time.perf_counter()
            logits(**inputs)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_memory(work: Callable[[], None], device: torch.device) -> int:
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
