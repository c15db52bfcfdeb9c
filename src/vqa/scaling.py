"""The same training on 1, 2 and 4 ranks: what it learns (the same), and how fast (predicted, then measured).

    torchrun --standalone --nproc-per-node N -m vqa.scaling --config FILE

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
from typing import Literal, Self

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from vqa import sources
from vqa.benchmark import WARMUP_STEPS, median_result
from vqa.config import ConfigError, LaunchConfig, RunConfig, Section, load_section
from vqa.distributed import Rank, check_devices, gather_objects, process_group
from vqa.evaluate import predict
from vqa.loops import loops
from vqa.objectives import OBJECTIVES, Alignment, Answers
from vqa.prediction import ACCUMULATED_PARTS, exposed_seconds
from vqa.runs import Result, Run, RunError
from vqa.train import Trainer, load_data

PARITY_STEPS = 50  # loss curves are compared over the first so many steps
TOLERANCE = 1e-3  # relative, of the loss curves
EXCHANGES = 10  # of a whole gradient, that bandwidth is measured with
KNOBS = {  # options of DistributedDataParallel, one at a time
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "buckets of 1 MB": {"bucket_cap_mb": 1},
    "one bucket": {"bucket_cap_mb": 1000},
    "find_unused_parameters": {"find_unused_parameters": True},  # as in the earlier study
    "bf16 gradients": {},
}


class ScalingConfig(Section):
    """What is measured (`kind`), on which runs; `run` also says on how many ranks."""

    kind: Literal["parity", "speed", "loops"]
    run: RunConfig
    others: list[RunConfig] = Field(default_factory=list)  # parity: compared after it, in the same job
    steps: int = 0  # speed, loops: timed steps an arm
    parent: Self | None = None  # parity: the same job on one rank

    @property
    def name(self) -> str:
        return f"{self.run.role}-{self.kind}-{self.run.launch.world_size}-ranks"

    @property
    def launch(self) -> LaunchConfig:
        return self.run.launch


def parity_configs(runs: list[RunConfig], world_sizes: list[int]) -> list[ScalingConfig]:
    """One parity job a world size, each but the first compared with the first."""
    configs: list[ScalingConfig] = []
    for ranks in world_sizes:
        first, *others = (
            run.model_copy(update={"launch": run.launch.model_copy(update={"world_size": ranks})}) for run in runs
        )
        parent = configs[0] if configs else None
        configs.append(ScalingConfig(kind="parity", run=first, others=others, parent=parent))
    return configs


class Recorder:
    """Takes the place of train's Reporter and keeps every step: its loss, its images, the first gradient."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []  # this rank's share; the mean over ranks is the step's
        self.images: list[np.ndarray] = []  # of this rank, one entry a step
        self.gradient: np.ndarray | None = None  # (parameters,) after DDP's mean, as the optimizer meets it
        trainer.optimizer.register_step_pre_hook(self._keep_gradient)
        self._batch, trainer.split.batch = trainer.split.batch, self._keep_images

    def _keep_gradient(self, *_) -> None:
        if self.gradient is None:
            parameters = self.trainer.objective.model.parameters()
            self.gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).cpu().numpy()

    def _keep_images(self, images: np.ndarray, flips: np.ndarray | None = None):
        self.images.append(images)
        return self._batch(images, flips)

    def step(self, epoch: int, step: int, pairs: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """What Trainer.epoch says of each step it took."""
        self.losses.append(loss.cpu())


def parity(config: ScalingConfig, source: sources.Source, rank: Rank, run: Run) -> list[Result]:
    """Train each of the runs and write what world sizes are compared by: metrics.jsonl and <run>.npz.

    The loop is Trainer.epoch, the one that trains every model of the study.
    """
    rows = []
    for number, trained in enumerate([config.run, *config.others]):
        torch.manual_seed(trained.seed)
        objective = OBJECTIVES[trained.objective](trained, source, rank)
        objective.model.to(rank.device)
        trainer = Trainer(trained, objective, rank)
        recorder = Recorder(trainer)
        for epoch in range(trained.train.epochs):
            trainer.epoch(epoch, recorder)
        shares = gather_objects((torch.stack(recorder.losses).numpy(), np.stack(recorder.images)), rank)
        right, answered = _answered(objective, rank)
        if not rank.is_main:
            continue
        losses = np.mean([loss for loss, _ in shares], axis=0)  # (S,)
        images = np.sort(np.concatenate([seen for _, seen in shares], axis=1), axis=1)  # (S, B)
        name = arm_name(trained)
        for step, loss in enumerate(losses):
            run.log_metrics(arm=name, step=step + 1, loss=float(loss))
        with run.replacing(f"{number}.npz") as path, path.open("wb") as file:
            np.savez(file, losses=losses, images=images, gradient=recorder.gradient, right=right, answered=answered)
        labels = {"engine": name}
        last = losses[-trainer.steps_per_epoch :].mean()
        rows.append(Result("final_loss", float(last), "nats", labels=labels))
        if answered:
            rows.append(Result("questions_answered", answered, "count", split="test", labels=labels))
            rows.append(Result("questions_right", right, "count", split="test", labels=labels))
        if config.parent:
            rows += compared(
                Run(config.parent, run.module).folder / f"{number}.npz", run.folder / f"{number}.npz", labels
            )
    return rows


def arm_name(run: RunConfig) -> str:
    """answers | alignment, and what batch statistics are used where there are any."""
    encoder = run.model.image_encoder
    per_rank = encoder.kind == "resnet18" or encoder.stem == "conv"
    return f"{run.objective}, BatchNorm" if per_rank else run.objective


def _answered(objective: Answers | Alignment, rank: Rank) -> tuple[float, int]:
    """Right answers and all answers of the test split, on the main rank; none where no questions are learned."""
    if not isinstance(objective, Answers):
        return 0, 0
    frame = predict(objective.model, objective.splits["test"], rank)
    return (float(frame["correct"].sum()), len(frame)) if rank.is_main else (0, 0)


def compared(reference: Path, other: Path, labels: dict[str, str]) -> list[Result]:
    """How far two parity files lie apart: loss curves, first gradients, images of each step, counts."""
    with np.load(reference) as one, np.load(other) as many:
        loss = np.abs(many["losses"] / one["losses"] - 1)[:PARITY_STEPS].max()
        gradient = np.linalg.norm(many["gradient"] - one["gradient"]) / np.linalg.norm(one["gradient"])
        images = int((many["images"] != one["images"]).any(1).sum())
        rows = [
            Result("loss_max_relative_difference", float(loss), "ratio", labels=labels),
            Result("gradient_relative_difference", float(gradient), "ratio", labels=labels),
            Result("steps_with_other_images", images, "count", labels=labels),
        ]
        for name in ("answered", "right") if one["answered"] else ():
            rows.append(Result(f"questions_{name}_difference", int(many[name] - one[name]), "count", labels=labels))
        return rows


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


def earlier_form(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of parity and speed as the earlier study's table: set-up, final loss, accuracy, speed, note."""
    rows = rows.astype({"world_size": int})
    learned = rows[rows["engine"] == "answers"].pivot_table(index="world_size", columns="metric", values="value")
    timed = rows[(rows["metric"] == "step_seconds") & (rows["engine"] == "plain")].set_index("world_size")
    table = []
    for ranks, found in learned.iterrows():
        right = 100 * found["questions_right"] / found["questions_answered"]
        speed = timed.loc[1, "value"] / timed.loc[ranks, "value"] if ranks in timed.index else float("nan")
        apart = found.get("loss_max_relative_difference", 0.0)
        note = f"loss curve within {apart:.0e} of one rank's" if ranks > 1 else "the reference"
        table.append(
            {
                "set-up": f"{ranks} rank{'s' if ranks > 1 else ''}",
                "final loss": f"{found['final_loss']:.4f}",
                "accuracy, %": f"{right:.2f}",
                "relative speed": f"{speed:.2f}×",
                "note": note,
            }
        )
    return pd.DataFrame(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what world size changes; start with torchrun.")
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        config = load_section(ScalingConfig, arguments.config)
        check_devices(config.launch)
        run = Run(config, module="vqa.scaling")
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
