"""The training loop: the only one, for one rank or many, teacher or student.

    torchrun --standalone --nproc-per-node N -m vqa.train --profile default --role teacher

and on several hosts the same command on each, with torchrun's --nnodes and --rdzv-endpoint, and all
ranks counted in launch.world_size; params/l4x4.slurm does it under SLURM.

A step's loss is the sum over its pairs divided by their number on all ranks, and the order of
images does not depend on the number of ranks: world size changes the speed, not what is learned.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vqa import sources
from vqa.batches import Batch, EpochPlan
from vqa.config import ConfigError, RunConfig, TrainConfig, load_profile, load_section, parse_overrides
from vqa.distributed import Rank, all_reduce_sum, check_devices, from_main, process_group
from vqa.models.vqa_model import parameter_count
from vqa.objectives import OBJECTIVES, Alignment, Answers
from vqa.runs import Result, Run, RunError

LOGS_PER_EPOCH = 4


class TrainingError(RuntimeError):
    """Training that cannot go on; its message says where it stopped."""


def train(config: RunConfig, run: Run, rank: Rank) -> None:
    """Train as `config` says, keep the best model by validation, then meet the test split once.

    Everything lands in `run`'s folder. Raises TrainingError on a gradient that is not finite.
    """
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(rank.device.type == "cpu")
    objective = OBJECTIVES[config.objective](config, load_data(config, rank), rank)
    objective.network.to(rank.device)
    model = objective.model
    trainer = Trainer(config, objective, rank)
    reporter = Reporter(run, rank, trainer)
    reporter.say(f"{run.folder.name}: {parameter_count(model):,} parameters, {len(objective.train_split):,} images")

    best, best_epoch = -1.0, 0
    weights = run.folder / "checkpoints" / "best.safetensors"
    for epoch in range(config.train.epochs):
        trainer.epoch(epoch, reporter)
        score = objective.judge()
        if better := score > best:
            best, best_epoch = score, epoch
            if rank.is_main:
                with run.replacing("checkpoints/best.safetensors") as path:
                    save_model(model, str(path))
        reporter.epoch(epoch, score, better)
        if config.train.patience and epoch - best_epoch >= config.train.patience:
            reporter.say(f"no better validation for {config.train.patience} epochs: stopping")
            break

    torch.distributed.barrier()  # the best weights are on disk before another rank reads them
    load_model(model, str(weights))
    results = objective.finish(run)
    if rank.is_main:
        model.save(run.folder / "model")
        run.finish([*results, *_costs(run, model)])
        main_figure = next(
            row for row in reversed(results) if row.metric in ("accuracy", "recall_at_1_image_to_caption")
        )
        reporter.say(f"{main_figure.split} {main_figure.metric} {main_figure.value:.2f} %, from epoch {best_epoch + 1}")


def train_all(config: RunConfig, rank: Rank) -> None:
    """Train `config` in its run folder, after the runs that it starts from and that nobody has finished yet.

    The main rank alone writes; every rank must see the folder. Raises RunError on all ranks if one does not.
    """
    run = Run(config)
    for needed in from_main([needed.config for needed in run.needed if not needed.finished]):
        train_all(needed, rank)
    with run.writing() if rank.is_main else nullcontext():
        torch.distributed.barrier()
        if blind := int(all_reduce_sum(torch.tensor(not run.folder.is_dir(), dtype=torch.int, device=rank.device))):
            raise RunError(f"{blind} ranks do not see {run.folder}: hosts must share the folder VQA_RUNS")
        train(config, run, rank)


def load_data(config: RunConfig, rank: Rank) -> sources.Source:
    """The data set. What is missing on disk one rank builds while the others wait.

    That is the main rank, then one rank of each host that does not see what the main rank built.
    """
    source = None
    for builds in (rank.is_main, rank.local_rank == 0, True):
        if builds and source is None:
            source = sources.load(config.data)
        torch.distributed.barrier()
    return source


class Trainer:
    """The objective's model with all that changes it: optimizer, schedule, gradients of every rank."""

    def __init__(self, config: RunConfig, objective: Answers | Alignment, rank: Rank):
        self.config, self.objective, self.rank = config, objective, rank
        self.split, model = objective.train_split, objective.network
        self.steps_per_epoch = len(self.split) // config.train.global_batch_size
        if not self.steps_per_epoch:
            size = config.train.global_batch_size
            raise ConfigError(f"train.global_batch_size {size} is more than the {len(self.split)} training images")
        self.optimizer = optimizer(model, config.train)
        total = self.steps_per_epoch * config.train.epochs
        self.schedule = transformers.get_cosine_schedule_with_warmup(
            self.optimizer, round(config.train.warmup_fraction * total), total
        )
        if config.train.gradient_checkpointing:
            objective.model.checkpoint_gradients()
        if config.train.compile:
            model.compile(dynamic=True)
        self.model: nn.Module = model
        if rank.world_size > 1:
            devices = None
            if rank.device.type == "cuda":  # batch statistics of all ranks; on a CPU they stay each rank's own
                devices, model = [rank.device], nn.SyncBatchNorm.convert_sync_batchnorm(model)
            self.model = DistributedDataParallel(model, device_ids=devices)

    def epoch(self, epoch: int, reporter: "Reporter") -> None:
        self.model.train()
        train, rank = self.config.train, self.rank
        plan = EpochPlan.make(len(self.split), train.global_batch_size, self.config.seed, epoch, self.config.data.flips)
        for step, images in enumerate(plan.steps):
            batches = plan.micro_batches(
                step, self.split, rank.rank, rank.world_size, train.gradient_accumulation_steps
            )
            loss, norm = self.update([batch.to(rank.device) for batch in batches], images)
            if not torch.isfinite(norm):
                raise TrainingError(f"epoch {epoch + 1}, step {step + 1}: the gradient is not finite; lower train.lr")
            reporter.step(epoch, step, len(self.split.pairs_of(images)), loss, norm)

    def update(self, batches: list[Batch], images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Gives this rank's loss (their mean is the step's) and the gradient's norm."""
        total = torch.zeros((), device=self.rank.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last or self.rank.world_size == 1 else self.model.no_sync():
                with autocast(self.rank.device, self.config.train.amp):
                    loss = self.objective.loss(self.model, batch, images)
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return total, norm


def optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101), fused; only matrices and filters are decayed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")


@dataclass
class _Window:
    """What happened since the last line of the log."""

    loss: torch.Tensor | float = 0.0
    steps: int = 0
    pairs: int = 0
    started: float = 0.0


class Reporter:
    """Progress as plain lines, one every quarter of an epoch, on screen, in log.txt and metrics.jsonl."""

    def __init__(self, run: Run, rank: Rank, trainer: Trainer):
        self.run, self.rank, self.trainer = run, rank, trainer
        self.every = max(trainer.steps_per_epoch // LOGS_PER_EPOCH, 1)
        self.started = time.perf_counter()
        self.window = _Window(started=self.started)
        if rank.is_main:  # a run that is written again starts its records again
            for name in ("metrics.jsonl", "log.txt"):
                (run.folder / name).unlink(missing_ok=True)

    def say(self, text: str) -> None:
        if self.rank.is_main:
            print(text, flush=True)
            with (self.run.folder / "log.txt").open("a") as file:
                file.write(text + "\n")

    def step(self, epoch: int, step: int, pairs: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Count a step; write the window's mean loss over all ranks when it is full."""
        window = self.window
        window.loss, window.steps, window.pairs = window.loss + loss, window.steps + 1, window.pairs + pairs
        if (step + 1) % self.every:
            return
        mean = (all_reduce_sum(window.loss) / window.steps / self.rank.world_size).item()
        now = time.perf_counter()
        rate = window.pairs / (now - window.started)
        seconds = (now - window.started) / window.steps
        lr = self.trainer.schedule.get_last_lr()[0]
        done = epoch * self.trainer.steps_per_epoch + step + 1
        epochs, steps = self.trainer.config.train.epochs, self.trainer.steps_per_epoch
        self.say(
            f"epoch {epoch + 1:>2}/{epochs}  step {step + 1:>4}/{steps}"
            f"  loss {mean:.4f}  lr {lr:.1e}  {rate:,.0f} questions/s"
        )
        if self.rank.is_main:
            self.run.log_metrics(
                step=done,
                epoch=epoch + 1,
                loss=mean,
                lr=lr,
                grad_norm=norm.item(),
                questions_per_second=rate,
                step_seconds=seconds,
            )
        self.window = _Window(started=time.perf_counter())

    def epoch(self, epoch: int, score: float, better: bool) -> None:
        elapsed = time.perf_counter() - self.started
        left = elapsed / (epoch + 1) * (self.trainer.config.train.epochs - epoch - 1)
        self.say(
            f"epoch {epoch + 1:>2}  validation {100 * score:.2f} %{' (best)' if better else ''}"
            f"  {elapsed:.0f} s, {left:.0f} s to go"
        )
        if self.rank.is_main:
            done = (epoch + 1) * self.trainer.steps_per_epoch
            self.run.log_metrics(step=done, epoch=epoch + 1, validation=100 * score, seconds=elapsed)
        self.window = _Window(started=time.perf_counter())


def _costs(run: Run, model: nn.Module) -> list[Result]:
    metrics = run.metrics()
    size = (run.folder / "model" / "model.safetensors").stat().st_size
    return [
        Result("parameters", parameter_count(model), "count"),
        Result("bytes_on_disk", size, "bytes"),
        Result("step_seconds", float(metrics["step_seconds"].median()), "s"),
        Result("training_seconds", float(metrics["seconds"].max()), "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one model; start with torchrun.")
    parser.add_argument("--config", type=Path, help="a run's config.yaml; instead of the next four")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--role", default="teacher")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    try:
        if arguments.config:
            config = load_section(RunConfig, arguments.config)
        else:
            overrides = parse_overrides(arguments.overrides)
            config = load_profile(arguments.profile, overrides).run(arguments.role, arguments.seed)
        check_devices(config.launch)
        with process_group(config.launch) as rank:
            train_all(config, rank)
    except (ConfigError, RunError, TrainingError, sources.SourceError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
