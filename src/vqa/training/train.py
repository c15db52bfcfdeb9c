"""The training loop: the only one, for one rank or many, teacher or student.

    torchrun --standalone --nproc-per-node N -m vqa.training.train --profile default --role teacher

and on several hosts the same command on each, with torchrun's --nnodes and --rdzv-endpoint, and all
ranks counted in launch.world_size; params/l4x4.slurm does it under SLURM.

A step's loss is the sum over its pairs divided by their number on all ranks, and the order of
images does not depend on the number of ranks: world size changes the speed, not what is learned.

A run that was stopped or killed goes on from its last checkpoint when the same command comes again,
to the same bits. SIGTERM or SIGINT at any rank saves a checkpoint first.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vqa.config import ConfigError, RunConfig, TrainConfig, digest, load_profile, load_section, parse_overrides
from vqa.data import source as sources
from vqa.data.batches import Batch, EpochPlan
from vqa.distributed import (
    LateRank,
    Rank,
    anyone,
    check_devices,
    from_main,
    main_first,
    process_group,
    said_by_main,
    stoppable,
)
from vqa.models.vqa_model import parameter_count
from vqa.results import Result
from vqa.run_folder import Run, RunError
from vqa.training import checkpoint
from vqa.training.checkpoint import CheckpointError
from vqa.training.logger import Progress, Reporter, TrainingError
from vqa.training.objectives import OBJECTIVES, Alignment, Answers


def train(config: RunConfig, run: Run, rank: Rank) -> None:
    """Train as `config` says, keep the best model by validation, then meet the test split once.

    Everything lands in `run`'s folder; a checkpoint found there is where training starts.
    Raises TrainingError on a loss or gradient that is not finite, and after a signal; CheckpointError for a
    checkpoint that cannot be written or is of other data.
    """
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(rank.device.type == "cpu")
    source = load_data(config, rank)
    objective = OBJECTIVES[config.objective](config, source, rank)
    objective.network.to(rank.device)
    model = objective.model
    trainer = Trainer(config, objective, rank)
    reporter = Reporter(run, rank, trainer)
    progress = Progress(run, rank, trainer, reporter, {"configuration": digest(config), "data": source.fingerprint})
    if not progress.resumed():
        reporter.say(f"{run.folder.name}: {parameter_count(model):,} parameters, {len(objective.train_split):,} images")
    with stoppable(), progress.told_on_the_way_out():
        while not progress.over:
            trainer.epoch(progress.epoch, progress, first=progress.step_in_epoch)
            progress.judged(objective.judge())
        progress.training = False
        load_model(model, str(progress.best_weights))
        results = objective.finish(run)
    if rank.is_main:
        model.save(run.folder / "model")
        run.finish([*results, *_costs(run, model), progress.checkpoint_share()])
        checkpoint.forget(progress.folder)
        main_figure = next(
            row for row in reversed(results) if row.metric in ("accuracy", "recall_at_1_image_to_caption")
        )
        epoch = progress.best_epoch + 1
        reporter.say(f"{main_figure.split} {main_figure.metric} {main_figure.value:.2f} %, from epoch {epoch}")


def train_all(config: RunConfig, rank: Rank) -> None:
    """Train `config` in its run folder, after the runs that it starts from and that nobody has finished yet.

    The main rank alone writes; every rank must see the folder. Raises RunError on all ranks if one does not.
    """
    run = Run(config)
    for needed in from_main([needed.config for needed in run.needed if not needed.finished]):
        train_all(needed, rank)
    with writing(run, rank):
        if anyone(not run.folder.is_dir(), rank):
            raise RunError(f"not every host sees {run.folder}: hosts must share the folder VQA_RUNS")
        train(config, run, rank)


def load_data(config: RunConfig, rank: Rank) -> sources.Source:
    """The data set. What is missing on disk one rank builds while the others wait.

    That is the main rank, then one rank of each host that does not see what the main rank built.
    """
    source = main_first(lambda: sources.load(config.data), rank)
    for builds in (rank.local_rank == 0, True):
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

    def epoch(self, epoch: int, reporter: "Progress", first: int = 0) -> None:
        """The steps of `epoch` from its `first` on; `reporter.step` is told of each."""
        self.model.train()
        train, rank = self.config.train, self.rank
        plan = EpochPlan.make(len(self.split), train.global_batch_size, self.config.seed, epoch, self.config.data.flips)
        for step, images in list(enumerate(plan.steps))[first:]:
            batches = plan.micro_batches(
                step, self.split, rank.rank, rank.world_size, train.gradient_accumulation_steps
            )
            loss, norm = self.update([batch.to(rank.device) for batch in batches], images)
            reporter.step(epoch, step, len(self.split.pairs_of(images)), loss, norm)

    def update(self, batches: list[Batch], images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Gives this rank's loss (their mean is the step's) and the gradient's norm.

        Raises TrainingError on every rank, with all weights as they were, if either is not finite on any.
        """
        total = torch.zeros((), device=self.rank.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last or self.rank.world_size == 1 else self.model.no_sync():
                with autocast(self.rank.device, self.config.train.amp):
                    loss = self.objective.loss(self.model, batch, images)
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        # The gradient is everyone's already; a loss may be infinite on one rank and its gradient finite.
        if anyone(
            ~(torch.isfinite(total) & torch.isfinite(norm)), self.rank, getattr(self.model, "process_group", None)
        ):
            raise TrainingError(self._not_finite(images))
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return total, norm

    def _not_finite(self, images: np.ndarray) -> str:
        epoch, step = divmod(self.schedule.last_epoch, self.steps_per_epoch)
        asked = self.split.frame["question_id"].iloc[self.split.pairs_of(images)]
        return (
            f"epoch {epoch + 1}, step {step + 1}: the loss or the gradient is not finite; lower train.lr "
            f"or look at questions {spans(asked)}"
        )


def spans(numbers: Iterable[int]) -> str:
    """`[3, 4, 5, 9]` -> `"3-5, 9"`: every number, in little room."""
    ends: list[list[int]] = []
    for number in sorted(numbers):
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101), fused; only matrices and filters are decayed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")


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
    except (ConfigError, RunError, TrainingError, CheckpointError) as error:  # of every rank: one of them says it
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except (sources.SourceError, LateRank) as error:
        sys.exit(1 if said_by_main(error) else f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write or read {error.filename or Run(config).folder}: {error.strerror}")


@contextmanager
def writing(run: Run, rank: Rank) -> Iterator[None]:
    """`run.writing()` on the main rank. Raises its RunError on every rank."""
    with ExitStack() as held:
        main_first(lambda: held.enter_context(run.writing()), rank)
        yield


if __name__ == "__main__":
    main()
