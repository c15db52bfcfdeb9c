"""04_scaling: training steps on 1, 2, … ranks, each of DDP's options, and a prediction, in turn within one job."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from vqa.config import RunConfig
from vqa.distributed import Rank, gather_objects
from vqa.evaluation.timing import Arm, interleave, median_result
from vqa.experiments.measurement import WARMUP_STEPS, Measurement, measures, step_images
from vqa.experiments.step_time_model import ACCUMULATED_PARTS, exposed_seconds
from vqa.results import Result
from vqa.training.objectives import Answers
from vqa.training.train import Trainer

EXCHANGES = 10  # of a whole gradient, that bandwidth is measured with
PLAIN, SMALL_BUCKETS, BF16_GRADIENTS = "plain", "buckets of 1 MB", "bf16 gradients"
OPTIONS = {  # of DistributedDataParallel, one at a time
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    SMALL_BUCKETS: {"bucket_cap_mb": 1},
    "one bucket": {"bucket_cap_mb": 1000},
    "find_unused_parameters": {"find_unused_parameters": True},  # as in the earlier study
    BF16_GRADIENTS: {},
}


@dataclass(frozen=True)
class StepVariant:
    """One way to take a training step: by the first `ranks` ranks, accumulating or not, exchanging gradients or not.

    A plain step shares out one global batch. An accumulated one takes ACCUMULATED_PARTS of them, each whole
    on some rank. `half` of a global batch is what one of two ranks computes, here with the machine to itself.
    """

    ranks: int
    accumulated: bool = False
    exchange: bool = True
    option: str = PLAIN
    half: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        arm = "half the images" if self.half else self.option if self.exchange else "no exchange"
        return {"arm": arm + (", accumulated" if self.accumulated else ""), "world_size": self.ranks}

    @property
    def parts(self) -> int:
        """Micro-batches a rank."""
        return ACCUMULATED_PARTS // self.ranks if self.accumulated else 1

    def images(self, global_batch_size: int) -> int:
        """Images a step, over all ranks."""
        return global_batch_size * ACCUMULATED_PARTS if self.accumulated else global_batch_size // (1 + self.half)


class VariantArm(Arm):
    """Training steps of one StepVariant, with a model and an optimizer of their own, fed with image numbers.

    All ranks start a step together. Those beyond the variant's own then do nothing.
    """

    def __init__(self, variant: StepVariant, run: RunConfig, m: Measurement, group: dist.ProcessGroup | None):
        super().__init__(variant.labels, self.train, prepare=lambda _: dist.barrier())
        torch.manual_seed(run.seed)
        self.variant, self.rank, self.images = variant, m.rank, variant.images(run.train.global_batch_size)
        alone = replace(m.rank, world_size=1)
        objective = Answers(run.model_copy(update={"parent": None}), m.source, alone)
        objective.model.to(m.rank.device).train()
        self.trainer, self.split = Trainer(run, objective, alone), objective.train_split
        if variant.exchange and variant.ranks > 1 and m.rank.rank < variant.ranks:
            options = OPTIONS.get(variant.option, {})
            self.trainer.model = DistributedDataParallel(self.trainer.model, process_group=group, **options)
            self.trainer.rank = objective.rank = replace(m.rank, world_size=variant.ranks)
            if variant.option == BF16_GRADIENTS:
                self.trainer.model.register_comm_hook(group, bf16_compress_hook)

    def train(self, images: np.ndarray) -> None:
        """One step on the first of `images` that the variant takes, making the batches included."""
        if self.rank.rank < self.variant.ranks:
            images = images[: self.images]
            shares = np.split(images, self.variant.ranks * self.variant.parts)[self.rank.rank :: self.variant.ranks]
            self.trainer.update([self.split.batch(share).to(self.rank.device) for share in shares], images)


def variants(sizes: list[int]) -> list[StepVariant]:
    """All that is measured with numbers of ranks `sizes`, which begin with 1."""
    made = [StepVariant(n, accumulated) for n in sizes for accumulated in (False, True)]
    made += [replace(variant, exchange=False) for variant in made if variant.ranks > 1] + [StepVariant(1, half=True)]
    return made + [StepVariant(2, option=option) for option in OPTIONS if len(sizes) > 1]


@measures
def speed(m: Measurement) -> list[Result]:
    """Steps on 1, 2, … ranks, in turn, all in this one job.

    Plain ones share out the same global batch, accumulated ones the same ACCUMULATED_PARTS global batches.
    `no exchange` variants compute the same but keep their gradients. A step lasts as long as its slowest rank.
    """
    sizes = [n for n in (1, 2, 4) if n <= m.rank.world_size]
    groups = {n: dist.new_group(range(n)) for n in sizes}
    arms = [VariantArm(variant, m.first, m, groups[variant.ranks]) for variant in variants(sizes)]
    split, largest = arms[0].split, max(arm.images for arm in arms)
    order = np.random.default_rng(m.first.seed)  # of the arms, the same on every rank
    interleave(arms, step_images(m.first, len(split), m.config.steps, largest), WARMUP_STEPS, order)
    model = arms[0].trainer.model
    gradient = sum(p.numel() * p.element_size() for p in model.parameters())  # bytes
    bandwidth = {n: gradient / exchange_seconds(model, m.rank, groups[n], n) for n in sizes if n > 1}
    shares = gather_objects([arm.seconds for arm in arms], m.rank)
    traced = [StepVariant(2), StepVariant(2, option=SMALL_BUCKETS)]
    overlap = [row for arm in arms if arm.variant in traced for row in _overlap(arm, m)]
    if not m.rank.is_main:
        return []
    slowest = {
        arm.variant: np.max([share[place] for share in shares[: arm.variant.ranks]], axis=0)
        for place, arm in enumerate(arms)
    }
    exchanged = [Result("exchange_bytes_per_second", rate, world_size=n) for n, rate in bandwidth.items()]
    waits = {n: exposed_seconds(gradient, rate) for n, rate in bandwidth.items()}
    return [*step_results(slowest, waits), *exchanged, *overlap]


def step_results(seconds: dict[StepVariant, np.ndarray], waits: dict[int, float]) -> list[Result]:
    """Step times from the `seconds` (steps,) of each variant, and what they are over each other, step by step.

    Predicted is a step that computes what it does without exchange and then waits, `waits` seconds by ranks, for an
    exchange among ranks that do nothing else.
    """
    rows = []
    for variant, spent in seconds.items():
        found = {"step_seconds": spent}
        alone = seconds[StepVariant(1, variant.accumulated)]
        if variant.ranks > 1 or variant.half:
            found["scaling_efficiency"] = alone / (max(variant.ranks, 2) * spent)
        if variant.ranks > 1 and variant.exchange and variant.option == PLAIN:
            predicted = seconds[replace(variant, exchange=False)] + waits[variant.ranks]
            found |= {"predicted_step_seconds": predicted, "measured_over_predicted_ratio": spent / predicted}
        if variant.option in OPTIONS:
            found["step_time_ratio"] = spent / seconds[StepVariant(variant.ranks)]
        rows += [median_result(metric, values, **variant.labels) for metric, values in found.items()]
    return rows


class TouchAll(torch.nn.Module):
    """A loss that touches every weight of `model` and computes next to nothing: its backward pass is DDP's own work."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self) -> torch.Tensor:
        return torch.stack([weight.sum() for weight in self.model.parameters()]).sum()


def exchange_seconds(model: torch.nn.Module, rank: Rank, group: dist.ProcessGroup, ranks: int) -> float:
    """Seconds in which `ranks` otherwise idle ranks exchange one gradient: the median of EXCHANGES.

    All that DDP does for it counts: into buckets, the all-reduce, out again.
    """
    touched, seconds = TouchAll(model), []
    if rank.rank < ranks:
        shared = DistributedDataParallel(touched, process_group=group)
    for _ in range(WARMUP_STEPS + EXCHANGES):
        dist.barrier()
        if rank.rank < ranks:
            seconds.append(_backward_seconds(shared) - _backward_seconds(touched))
    model.zero_grad()
    return float(np.median(seconds[WARMUP_STEPS:])) if seconds else float("inf")


def _backward_seconds(module: torch.nn.Module) -> float:
    loss = module()
    if loss.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _overlap(arm: VariantArm, m: Measurement) -> list[Result]:
    """The share of all-reduce time during which the backward pass was computing, from a profiler trace."""
    images = np.arange(m.first.train.global_batch_size)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(m.config.steps):
            arm.prepare(images)
            arm.work(images)
    if not m.rank.is_main:
        return []
    events = [(event.name, event.time_range.start, event.time_range.end) for event in profiled.events()]
    reducing = [span for name, *span in events if name.endswith(":all_reduce")]
    backward = [span for name, *span in events if name.startswith("autograd::engine::evaluate_function")]
    return [Result("overlap_share", 100 * shared_share(reducing, backward), **arm.labels)]


def shared_share(spans: list[list[float]], others: list[list[float]]) -> float:
    """The share of the time covered by `spans` (start, end) that `others` cover too."""
    ends = np.unique(np.concatenate([np.ravel(spans), np.ravel(others)]))
    middle, length = (ends[1:] + ends[:-1]) / 2, np.diff(ends)
    inside, both = (np.zeros(len(middle), bool) for _ in range(2))
    for start, end in spans:
        inside |= (start < middle) & (middle < end)
    for start, end in others:
        both |= (start < middle) & (middle < end)
    return float(length[inside & both].sum() / length[inside].sum())
