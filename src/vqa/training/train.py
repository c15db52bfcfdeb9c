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
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vqa.config import ConfigError, RunConfig, TrainConfig, digest, load_profile, load_section, parse_overrides
from vqa.data.batches import Batch, EpochPlan
from vqa.data.source import Source, SourceError, load
from vqa.distributed import (
    LateRank,
    Rank,
    Stopped,
    anyone,
    barrier,
    check_devices,
    exit_with,
    from_main,
    gather_objects,
    main_first,
    process_group,
    stop_if_asked,
    stoppable,
)
from vqa.models.parts import parameter_count
from vqa.results import Result
from vqa.run_folder import Run, RunError
from vqa.training import checkpoint
from vqa.training.checkpoint import CheckpointError, Checkpoints
from vqa.training.distillation import Distillation
from vqa.training.logger import Logger, Step
from vqa.training.objectives import Alignment, Answers

OBJECTIVES = {"answers": Answers, "alignment": Alignment, "distillation": Distillation}


class TrainingError(RuntimeError):
    """Training that cannot go on; its message says where it stopped. Every rank raises it alike."""


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
    trainer = Trainer(config, objective, rank)
    logger = Logger(run, rank, config.train.epochs, trainer.steps_per_epoch)
    state = TrainingState(trainer, logger)
    checkpoints = Checkpoints(run, rank, {"configuration": digest(config), "data": source.fingerprint})
    resume(state, checkpoints)
    with stoppable(), last_checkpoint_named(checkpoints):
        fit(state, checkpoints)
        load_model(objective.model, str(checkpoints.best))
        results = objective.test(run)
    if rank.is_main:
        objective.model.save(run.folder / "model")
        run.finish([*results, *costs(run, objective.model, state)])
        checkpoint.remove_all(checkpoints.folder)
        chosen = next(row for row in reversed(results) if row.metric in ("accuracy", "recall_at_1_image_to_caption"))
        logger.say(f"{chosen.split} {chosen.metric} {chosen.value:.2f} %, from epoch {state.best_epoch + 1}")


def fit(state: "TrainingState", checkpoints: Checkpoints) -> None:
    """All steps and validations that are still to come. A signal saves a checkpoint, then raises Stopped."""
    trainer, logger = state.trainer, state.logger

    def after_step(step: Step) -> None:
        logger.step(step)
        stop_if_asked(trainer.rank)
        if state.checkpoint_due and step.step + 1 < trainer.steps_per_epoch:  # else after the validation
            save(state, checkpoints)

    try:
        for epoch in range(state.epoch, trainer.config.train.epochs):
            trainer.epoch(epoch, after_step)
            score = trainer.objective.validate()
            if better := score > state.best_score:
                state.best_score, state.best_epoch = score, epoch
                checkpoints.save_best(trainer.objective.model)
            logger.epoch(epoch, score, better)
            state.epoch = epoch + 1
            if state.checkpoint_due or state.epoch == trainer.config.train.epochs:
                save(state, checkpoints)
    except Stopped:
        save(state, checkpoints)
        raise


def resume(state: "TrainingState", checkpoints: Checkpoints) -> None:
    """Put everything as it was when the newest whole checkpoint was written, if there is one."""
    trainer, logger = state.trainer, state.logger
    path, damaged = checkpoints.newest()
    if path:
        state.load_state_dict(checkpoint.load(path, trainer.objective.network))
        step = trainer.steps_taken - state.epoch * trainer.steps_per_epoch
        start = f"{path.name} found: going on after step {step} of epoch {state.epoch + 1}"
    else:
        logger.clear()
        size, images = parameter_count(trainer.objective.model), len(trainer.split)
        start = f"{logger.run.folder.name}: {size:,} parameters, {images:,} images"
    for line in (*damaged, start):
        logger.say(line)


def save(state: "TrainingState", checkpoints: Checkpoints) -> None:
    """Write a checkpoint of every rank's state. Raises CheckpointError on every rank if it cannot be written."""
    started = time.perf_counter()
    checkpoints.save(state.trainer.steps_taken, state.trainer.objective.network, state.state_dict())
    state.saving_seconds += time.perf_counter() - started


@contextmanager
def last_checkpoint_named(checkpoints: Checkpoints) -> Iterator[None]:
    """Append the last checkpoint's name to the sentence with which training ends before its time."""
    try:
        yield
    except Stopped:
        raise TrainingError(f"stopped by a signal; start again to go on from {checkpoints.last}") from None
    except TrainingError as error:
        raise TrainingError(f"{error}; the last good checkpoint is {checkpoints.last or 'none yet'}") from None


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

    @property
    def steps_taken(self) -> int:
        """Optimizer steps since the start of the run."""
        return self.schedule.last_epoch

    def epoch(self, epoch: int, on_step: Callable[[Step], None]) -> None:
        """Those steps of `epoch` that are not taken yet; `on_step` is told what each of them did."""
        self.model.train()
        train, rank = self.config.train, self.rank
        plan = EpochPlan.make(len(self.split), train.global_batch_size, self.config.seed, epoch, self.config.data.flips)
        for number in range(self.steps_taken - epoch * self.steps_per_epoch, self.steps_per_epoch):
            batches = list(
                plan.micro_batches(number, self.split, rank.rank, rank.world_size, train.gradient_accumulation_steps)
            )
            images = plan.steps[number]
            loss, norm = self.update([batch.to(rank.device) for batch in batches], images)
            taken = torch.cat([batch.image_number for batch in batches]).numpy()
            lr = self.schedule.get_last_lr()[0]
            on_step(Step(epoch, number, loss, norm, lr, len(self.split.pairs_of(images)), taken))

    def update(self, batches: list[Batch], images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on this rank's `batches` of the step that `images` make up over all ranks.

        Gives this rank's loss (their mean is the step's) and the gradient's norm before clipping.
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
        epoch, step = divmod(self.steps_taken, self.steps_per_epoch)
        asked = self.split.frame["question_id"].iloc[self.split.pairs_of(images)]
        return (
            f"epoch {epoch + 1}, step {step + 1}: the loss or the gradient is not finite; lower train.lr "
            f"or look at questions {spans(asked)}"
        )


class TrainingState:
    """How far a run has come: with the network's weights, all that it needs to go on to the same bits."""

    def __init__(self, trainer: Trainer, logger: Logger):
        self.trainer, self.logger = trainer, logger
        self.epoch = 0  # the one under way; it ends with its validation
        self.best_score, self.best_epoch = -1.0, 0
        self.saving_seconds = 0.0

    @property
    def checkpoint_due(self) -> bool:
        return self.trainer.steps_taken % self.trainer.config.train.checkpoint_every_steps == 0

    def state_dict(self) -> dict:
        """Tensors and plain values. Every rank must call this; it is whole on the main rank."""
        trainer, on_cuda = self.trainer, self.trainer.rank.device.type == "cuda"
        mine = {
            "random": torch.get_rng_state(),  # nothing else draws: orders and flips come from an epoch's number
            "random_cuda": torch.cuda.get_rng_state() if on_cuda else None,
            # BatchNorm's statistics differ between ranks without SyncBatchNorm
            "buffers": {name: value.cpu() for name, value in trainer.objective.network.named_buffers()},
            "logger": self.logger.state_dict(),
        }
        return {
            "epoch": self.epoch,
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "saving_seconds": self.saving_seconds,
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.schedule.state_dict(),
            "ranks": gather_objects(mine, trainer.rank),
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("epoch", "best_score", "best_epoch", "saving_seconds"):
            setattr(self, name, state[name])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.trainer.schedule.load_state_dict(state["schedule"])
        mine = state["ranks"][self.trainer.rank.rank]
        self.trainer.objective.network.load_state_dict(mine["buffers"], strict=False)
        self.logger.load_state_dict(mine["logger"])
        torch.set_rng_state(mine["random"])
        if mine["random_cuda"] is not None:
            torch.cuda.set_rng_state(mine["random_cuda"])


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


def costs(run: Run, model: nn.Module, state: TrainingState) -> list[Result]:
    """What the saved model weighs and its training took; `checkpoint_share` is the part spent on checkpoints."""
    metrics = run.metrics()
    return [
        Result("parameters", parameter_count(model)),
        Result("bytes_on_disk", (run.folder / "model" / "model.safetensors").stat().st_size),
        Result("step_seconds", float(metrics["step_seconds"].median())),
        Result("training_seconds", float(metrics["seconds"].max())),
        Result("checkpoint_share", state.saving_seconds / state.logger.seconds),
    ]


def load_data(config: RunConfig, rank: Rank) -> Source:
    """The data set. What is missing on disk one rank builds while the others wait.

    That is the main rank, then one rank of each host that does not see what the main rank built.
    """
    source = main_first(lambda: load(config.data), rank)
    for builds in (rank.local_rank == 0, True):
        if builds and source is None:
            source = load(config.data)
        barrier()
    return source


def train_all(config: RunConfig, rank: Rank) -> None:
    """Train `config` in its run folder, after the runs that it starts from and that nobody has finished yet.

    The main rank alone writes; every rank must see the folder. Raises RunError on all ranks if one does not.
    """
    run = Run(config)
    for needed in from_main([needed.config for needed in run.needed if not needed.finished]):
        train_all(needed, rank)
    with ExitStack() as held:
        main_first(lambda: held.enter_context(run.writing()), rank)
        if anyone(not run.folder.is_dir(), rank):
            raise RunError(f"not every host sees {run.folder}: hosts must share the folder VQA_RUNS")
        train(config, run, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one model; start with torchrun.")
    parser.add_argument("--config", type=Path, help="a run's config.yaml; instead of the next four")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--role", default="teacher")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", action="extend", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
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
    except (ConfigError, RunError, TrainingError, CheckpointError) as error:  # every rank raises these alike
        exit_with(error)
    except (SourceError, LateRank) as error:
        exit_with(error, alone=True)
    except OSError as error:
        place = error.filename or Run(config).folder
        exit_with(error, f"cannot write or read {place}: {error.strerror}", alone=True)


if __name__ == "__main__":
    main()
