"""The same training on 1, 2 and 4 ranks: what it learns (the same), and how fast (predicted, then measured).

    torchrun --standalone --nproc-per-node N -m vqa.experiments.scaling_speed --config FILE

`parity`  a run's own loop, every step's loss recorded, against the same job on one rank
`speed`   steps on 1, 2, … ranks in turn within one job, DDP's options one at a time, beside a prediction
`loops`   this study's loop against transformers.Trainer and a bare loop (vqa.loops)
"""

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from vqa.config import ConfigError, RunConfig, load_section
from vqa.data import source as sources
from vqa.distributed import Rank, check_devices, gather_objects, process_group
from vqa.evaluation.metrics import median_result
from vqa.experiments.measurement import WARMUP_STEPS
from vqa.experiments.scaling_loops import loops
from vqa.experiments.scaling_parity import ScalingConfig, parity
from vqa.experiments.step_time_model import ACCUMULATED_PARTS, exposed_seconds
from vqa.results import Result
from vqa.run_folder import Run, RunError
from vqa.training.objectives import Answers
from vqa.training.train import Trainer, load_data

EXCHANGES = 10  # of a whole gradient, that bandwidth is measured with
KNOBS = {  # options of DistributedDataParallel, one at a time
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "buckets of 1 MB": {"bucket_cap_mb": 1},
    "one bucket": {"bucket_cap_mb": 1000},
    "find_unused_parameters": {"find_unused_parameters": True},  # as in the earlier study
    "bf16 gradients": {},
}


@dataclass(frozen=True)
class Way:
    """One way to take a training step: by the first `ranks` ranks, accumulating or not, exchanging gradients or not.

    A plain step shares out one global batch. An accumulated one takes ACCUMULATED_PARTS of them, each whole
    on some rank. `half` of a global batch is what one of two ranks computes, here with the machine to itself.
    """

    ranks: int
    accumulated: bool = False
    exchange: bool = True
    knob: str = "plain"
    half: bool = False

    @property
    def labels(self) -> dict[str, str]:
        engine = "half the images" if self.half else self.knob if self.exchange else "no exchange"
        return {"engine": engine + (", accumulated" if self.accumulated else ""), "world_size": str(self.ranks)}

    @property
    def parts(self) -> int:
        """Micro-batches a rank."""
        return ACCUMULATED_PARTS // self.ranks if self.accumulated else 1

    def images(self, global_batch_size: int) -> int:
        """Images a step, over all ranks."""
        return global_batch_size * ACCUMULATED_PARTS if self.accumulated else global_batch_size // (1 + self.half)


class Arm:
    """A model, its optimizer and its steps' seconds for one Way. Ranks beyond the Way's own only wait."""

    def __init__(self, way: Way, run: RunConfig, source: sources.Source, rank: Rank, group: dist.ProcessGroup | None):
        torch.manual_seed(run.seed)
        self.way, self.rank, self.seconds = way, rank, []
        self.images = way.images(run.train.global_batch_size)
        alone = Rank(rank.rank, rank.local_rank, 1, rank.device)
        objective = Answers(run, source, alone)
        objective.model.to(rank.device).train()
        self.trainer = Trainer(run, objective, alone)
        if way.exchange and way.ranks > 1 and rank.rank < way.ranks:
            options = KNOBS.get(way.knob, {})
            self.trainer.model = DistributedDataParallel(self.trainer.model, process_group=group, **options)
            self.trainer.rank = objective.rank = Rank(rank.rank, rank.local_rank, way.ranks, rank.device)
            if way.knob == "bf16 gradients":
                self.trainer.model.register_comm_hook(group, bf16_compress_hook)

    def step(self, images: np.ndarray) -> None:
        """One whole training step on the first of `images` that the Way takes, timed on each of its ranks.

        Making the batches is part of it.
        """
        dist.barrier()
        if self.rank.rank >= self.way.ranks:
            return
        images = images[: self.images]
        started = time.perf_counter()
        shares = np.split(images, self.way.ranks * self.way.parts)[self.rank.rank :: self.way.ranks]
        batches = [self.trainer.split.batch(share).to(self.rank.device) for share in shares]
        self.trainer.update(batches, images)
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)


def speed(config: ScalingConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Steps on 1, 2, … ranks, in turn, all in this one job.

    Plain ones share out the same global batch, accumulated ones the same ACCUMULATED_PARTS global batches.
    `no exchange` ways compute the same but keep their gradients. A step lasts as long as its slowest rank.
    Predicted is a step that computes what it does without exchange, then exchanges as ranks do that do nothing else.
    """
    sizes = [n for n in (1, 2, 4) if n <= rank.world_size]
    groups = {n: dist.new_group(range(n)) for n in sizes}
    ways = [Way(n, accumulated) for n in sizes for accumulated in (False, True)]
    ways += [replace(way, exchange=False) for way in ways if way.ranks > 1] + [Way(1, half=True)]
    ways += [Way(2, knob=knob) for knob in KNOBS if rank.world_size > 1]
    arms = [Arm(way, config.run, source, rank, groups[way.ranks]) for way in ways]
    _in_turn(arms, config)
    gradient = sum(p.numel() * p.element_size() for p in arms[0].trainer.model.parameters())
    bandwidth = {n: gradient / _exchange_seconds(arms[0].trainer.model, rank, groups[n], n) for n in sizes if n > 1}
    shares = gather_objects([arm.seconds for arm in arms], rank)
    overlap = [
        row for arm in arms if arm.way in (Way(2), Way(2, knob="buckets of 1 MB")) for row in _overlap(arm, config)
    ]
    if not rank.is_main:
        return []
    found = {way: np.max([share[place] for share in shares[: way.ranks]], axis=0) for place, way in enumerate(ways)}
    rows = [_median("step_seconds", seconds, "s", way) for way, seconds in found.items()]
    rows += [Result("exchange_bytes_per_second", b, "B/s", labels={"world_size": str(n)}) for n, b in bandwidth.items()]
    for way in ways:
        alone = found[Way(1, way.accumulated)]
        if way.ranks > 1 or way.half:
            rows.append(_median("scaling_efficiency", alone / (max(way.ranks, 2) * found[way]), "ratio", way))
        if way.ranks > 1 and way.exchange and way.knob == "plain":
            silent = found[Way(way.ranks, way.accumulated, exchange=False)]
            predicted = silent + exposed_seconds(gradient, bandwidth[way.ranks])
            rows.append(_median("predicted_step_seconds", predicted, "s", way))
            rows.append(_median("measured_over_predicted_ratio", found[way] / predicted, "ratio", way))
        if way.knob in KNOBS:
            rows.append(_median("step_time_ratio", found[way] / found[Way(way.ranks)], "ratio", way))
    return rows + overlap


def _in_turn(arms: list[Arm], config: ScalingConfig) -> None:
    """Every arm takes step 1, then every arm step 2, …, each time in another order; warm-up is forgotten.

    Drift and what the arm before left in the caches then hit all alike.
    """
    generator = np.random.default_rng(config.run.seed)
    order = generator.permutation(len(arms[0].trainer.split))
    size = max(arm.images for arm in arms)
    for step in range(WARMUP_STEPS + config.steps):
        images = np.take(order, np.arange(step * size, (step + 1) * size), mode="wrap")
        for place in generator.permutation(len(arms)):
            arms[place].step(images)
    for arm in arms:
        del arm.seconds[:WARMUP_STEPS]


def _median(metric: str, values: np.ndarray | list[float], unit: str, way: Way) -> Result:
    return median_result(metric, list(values), unit, way.labels)


class _Touched(torch.nn.Module):
    """A loss that touches every weight of `model` and computes next to nothing: its backward pass is DDP's own work."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self) -> torch.Tensor:
        return torch.stack([weight.sum() for weight in self.model.parameters()]).sum()


def _exchange_seconds(model: torch.nn.Module, rank: Rank, group: dist.ProcessGroup, ranks: int) -> float:
    """Seconds in which `ranks` otherwise idle ranks exchange one gradient: the median of EXCHANGES.

    All that DDP does for it counts: into buckets, the all-reduce, out again.
    """
    touched, seconds = _Touched(model), []
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


def _overlap(arm: Arm, config: ScalingConfig) -> list[Result]:
    """The share of all-reduce time during which the backward pass was computing, from a profiler trace."""
    images = np.arange(config.run.train.global_batch_size)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(config.steps):
            arm.step(images)
    if not arm.rank.is_main:
        return []
    events = [(event.name, event.time_range.start, event.time_range.end) for event in profiled.events()]
    reducing = [span for name, *span in events if name.endswith(":all_reduce")]
    backward = [span for name, *span in events if name.startswith("autograd::engine::evaluate_function")]
    return [Result("overlap_share", 100 * shared_share(reducing, backward), "%", labels=arm.way.labels)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what world size changes; start with torchrun.")
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        config = load_section(ScalingConfig, arguments.config)
        check_devices(config.launch)
        run = Run(config, module="vqa.experiments.scaling_speed")
        with process_group(config.launch) as rank, run.writing() if rank.is_main else nullcontext():
            (run.folder / "metrics.jsonl").unlink(missing_ok=True)
            source = load_data(config.run, rank)
            if config.kind == "parity":
                rows = parity(config, source, rank, run)
            else:
                rows = {"speed": speed, "loops": loops}[config.kind](config, source, rank)
            if rank.is_main:
                run.finish(rows)
            for row in rows:
                print(f"{row.metric:32} {row.value:.4g} {row.unit}  {' '.join(row.labels.values())}", flush=True)
    except (ConfigError, RunError, sources.SourceError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
