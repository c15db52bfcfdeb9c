"""The same training on 1, 2 and 4 ranks: what it learns (the same), and how fast (predicted, then measured).

    torchrun --standalone --nproc-per-node N -m vqa.scaling --config FILE

`parity`  a run's own loop, every step's loss recorded, against the same job on one rank
`speed`   steps on 1, 2, … ranks in turn within one job, DDP's options one at a time, beside a prediction
`loops`   this study's loop against transformers.Trainer and a bare loop (vqa.loops)
"""

from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from vqa.config import LaunchConfig, RunConfig, Section
from vqa.data import source as sources
from vqa.distributed import Rank, gather_objects
from vqa.evaluation.evaluate import predict
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training.objectives import OBJECTIVES, Alignment, Answers
from vqa.training.train import Trainer

PARITY_STEPS = 50  # loss curves are compared over the first so many steps
TOLERANCE = 1e-3  # relative, of the loss curves


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
