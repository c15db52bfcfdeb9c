"""04_scaling: a run's own loop on several ranks, every step recorded, against the same job on one rank."""

from pathlib import Path

import numpy as np
import torch

from vqa.distributed import Rank, gather_objects
from vqa.evaluation.evaluate import predict
from vqa.experiments.measurement import Measurement, measures
from vqa.results import PARITY_STEPS, Result
from vqa.run_folder import Run
from vqa.training.logger import Step
from vqa.training.objectives import Alignment, Answers
from vqa.training.train import OBJECTIVES, Trainer


@measures
def parity(m: Measurement) -> list[Result]:
    """Train each of the runs and write what world sizes are compared by: metrics.jsonl and <number of the run>.npz.

    The loop is Trainer.epoch, the one that trains every model of the study.
    """
    rows = []
    for number, trained in enumerate(m.config.runs):
        torch.manual_seed(trained.seed)
        objective = OBJECTIVES[trained.objective](trained, m.source, m.rank)
        objective.model.to(m.rank.device)
        trainer = Trainer(trained, objective, m.rank)
        record = StepRecord(trainer)
        for epoch in range(trained.train.epochs):
            trainer.epoch(epoch, record.add)
        shares = gather_objects((torch.stack(record.losses).numpy(), np.stack(record.images)), m.rank)
        right, answered = _answered(objective, m.rank)
        if not m.rank.is_main:
            continue
        losses = np.mean([loss for loss, _ in shares], axis=0)  # (S,)
        images = np.sort(np.concatenate([seen for _, seen in shares], axis=1), axis=1)  # (S, B)
        arm = arm_name(trained.objective, objective.model)
        for step, loss in enumerate(losses):
            m.run.log_metrics(arm=arm, step=step + 1, loss=float(loss))
        with m.run.replacing(f"{number}.npz") as path, path.open("wb") as file:
            np.savez(file, losses=losses, images=images, gradient=record.gradient, right=right, answered=answered)
        rows.append(Result("final_loss", float(losses[-trainer.steps_per_epoch :].mean()), arm=arm))
        if answered:
            rows.append(Result("questions_answered", answered, split="test", arm=arm))
            rows.append(Result("questions_right", right, split="test", arm=arm))
        if m.config.reference:
            reference = Run(m.config.reference).folder
            rows += compared(reference / f"{number}.npz", m.run.folder / f"{number}.npz", arm)
    return rows


class StepRecord:
    """What every step of `trainer` did on this rank: its loss and its images; and the very first gradient."""

    def __init__(self, trainer: Trainer):
        self.model = trainer.objective.model
        self.losses: list[torch.Tensor] = []  # this rank's share; the mean over ranks is the step's
        self.images: list[np.ndarray] = []
        self.gradient: np.ndarray | None = None  # (parameters,) after DDP's mean, as the optimizer meets it
        trainer.optimizer.register_step_pre_hook(self._keep_gradient)

    def _keep_gradient(self, *_) -> None:
        if self.gradient is None:
            found = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            self.gradient = torch.cat(found).cpu().numpy()

    def add(self, step: Step) -> None:
        self.losses.append(step.loss.cpu())
        self.images.append(step.images)


def arm_name(objective: str, model: torch.nn.Module) -> str:
    """answers | alignment, and that the model has batch statistics, where it has them."""
    normalised = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    return f"{objective}, BatchNorm" if normalised else objective


def _answered(objective: Answers | Alignment, rank: Rank) -> tuple[float, int]:
    """Right answers and all answers of the test split, on the main rank; none where no questions are learned."""
    if not isinstance(objective, Answers):
        return 0, 0
    frame = predict(objective.model, objective.splits["test"], rank)
    return (float(frame["correct"].sum()), len(frame)) if rank.is_main else (0, 0)


def compared(reference: Path, other: Path, arm: str) -> list[Result]:
    """How far two parity files lie apart: loss curves, first gradients, images of each step, counts."""
    with np.load(reference) as one, np.load(other) as many:
        loss = np.abs(many["losses"] / one["losses"] - 1)[:PARITY_STEPS].max()
        gradient = np.linalg.norm(many["gradient"] - one["gradient"]) / np.linalg.norm(one["gradient"])
        found = {
            "loss_max_relative_difference": float(loss),
            "gradient_relative_difference": float(gradient),
            "steps_with_other_images": int((many["images"] != one["images"]).any(1).sum()),
        }
        if one["answered"]:
            for name in ("answered", "right"):
                found[f"questions_{name}_difference"] = int(many[name] - one[name])
    return [Result(metric, value, arm=arm) for metric, value in found.items()]
