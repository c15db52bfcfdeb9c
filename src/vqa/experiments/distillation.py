"""05_distillation: what a cached teacher saves, and how a student differs from the teacher it learned from."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torchvision.transforms.v2 import functional as vision

from vqa.config import RunConfig
from vqa.data.batches import VIEWS, Batch, Split
from vqa.data.source import Source
from vqa.evaluation.evaluate import outputs
from vqa.evaluation.metrics import calibration_error, cluster_interval, linear_cka, percent, score, swap_test
from vqa.evaluation.timing import ratio
from vqa.experiments.measurement import Measurement, TrainingArm, interleave_training, measures
from vqa.models.build import load_vqa_model
from vqa.models.vqa_model import VQAModel
from vqa.results import DISTORTIONS, Result
from vqa.run_folder import Run
from vqa.training.distillation import read_all


@measures
def caching(m: Measurement) -> list[Result]:
    """Seconds of a student's step: plain, distilled from cached targets, plain with its teacher's forward pass.

    Of the two runs the second is the distilled one.
    """
    plain_run, distilled = m.config.runs
    teacher = load_vqa_model(Run(distilled.teacher).folder / "model").to(m.rank.device)

    @torch.inference_mode()
    def ask_teacher(batch: Batch) -> Batch:
        teacher(**batch.to(m.rank.device).inputs())
        return batch

    plain = TrainingArm(plain_run, m.source, m.rank, arm="plain")
    cached = TrainingArm(distilled, m.source, m.rank, arm="cached")
    online = TrainingArm(plain_run, m.source, m.rank, ask_teacher, arm="online")
    interleave_training([plain, cached, online], m)
    return [
        *(arm.result("step_seconds") for arm in (plain, cached, online)),
        cached.result("cached_over_plain_step_ratio", ratio(cached, plain)),
        online.result("online_over_plain_step_ratio", ratio(online, plain)),
    ]


SWAPS = {"image_swap": ["question"], "question_swap": ["image_id", "question_type"]}  # what stays the same


def noise(pixels: torch.Tensor, level: int) -> torch.Tensor:
    """uint8 `pixels` with Gaussian noise of standard deviation `level`, of 255; the same at every call."""
    drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels.device)
    return (pixels + level * drawn).round().clamp(0, 255).to(torch.uint8)


def blur(pixels: torch.Tensor, level: int) -> torch.Tensor:
    """uint8 `pixels` after a Gaussian blur of standard deviation `level`, in pixels."""
    return vision.gaussian_blur(pixels, [6 * level + 1] * 2, [float(level)] * 2)


DISTORT = {"noise": noise, "blur": blur}


@dataclass
class EvaluatedModel:
    """A trained model, its answers to the test split, and its features of it."""

    name: str
    model: VQAModel
    split: Split
    predictions: pd.DataFrame
    features: dict[str, torch.Tensor]  # as read_all gives them, of undistorted images

    @classmethod
    def of(cls, config: RunConfig, source: Source, device: torch.device) -> "EvaluatedModel":
        run = Run(config)
        model = load_vqa_model(run.folder / "model").to(device)
        split = Split(source.splits["test"], model.processor)
        predictions = run.predictions().query("split == 'test'").reset_index(drop=True)
        return cls(config.model_name, model, split, predictions, read_all(model, split, VIEWS[:1]))

    def correct(self, distort: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        """How right each answer (N,) is, 0 to 1, when images are seen through `distort`."""

        def answers(pixel_values: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            return self.model(distort(pixel_values), **inputs).logits.argmax(-1).cpu()

        device = next(self.model.parameters()).device
        chosen = torch.cat([made for _, made in outputs(answers, self.split, device)]).numpy()
        return score(pd.Series(np.array(self.model.processor.answers)[chosen]), self.split.frame).to_numpy()


@measures
def understanding(m: Measurement) -> list[Result]:
    """Calibration, swaps, robustness, agreement and CKA of finished runs; the first is the teacher of the others."""
    teacher, *students = (EvaluatedModel.of(run, m.source, m.rank.device) for run in m.config.runs)
    return [row for model in (teacher, *students) for row in (*_alone(model), *_beside(model, teacher))]


def _alone(model: EvaluatedModel) -> list[Result]:
    """Calibration, answers to swapped inputs, accuracy on distorted images."""
    predictions = model.predictions
    error = calibration_error(predictions["confidence"].to_numpy(), predictions["correct"].to_numpy())
    rows = [Result("calibration_error", 100 * error, split="test", model=model.name)]
    for name, same in SWAPS.items():
        swaps = swap_test(predictions, same)
        for ending, must in (("changed", True), ("kept", False)):
            asked = swaps[swaps["must_change"] == must]
            right = (asked["changed"] == must).to_numpy()
            rows.append(_share(f"{name}_{ending}", right, asked["image_id"].to_numpy(), model.name))
    image = model.split.frame["image_id"].to_numpy()
    for arm, (kind, level) in DISTORTIONS.items():
        correct = model.correct(lambda pixels, kind=kind, level=level: DISTORT[kind](pixels, level))
        rows.append(_share("accuracy", correct, image, model.name, arm))
    return rows


def _beside(model: EvaluatedModel, teacher: EvaluatedModel) -> list[Result]:
    """Answers and features of `model` beside the teacher's."""
    ours, theirs = model.predictions, teacher.predictions
    same = (ours["prediction"] == theirs["prediction"]).to_numpy()
    retained = 100 * ours["correct"].mean() / theirs["correct"].mean()
    rows = [
        _share("agreement", same, ours["image_id"].to_numpy(), model.name),
        Result("retained_accuracy", retained, split="test", model=model.name),
    ]
    for part in ("image", "text"):
        first, second = (evaluated.features[part].flatten(0, -2) for evaluated in (model, teacher))
        rows.append(Result(f"cka_{part}", linear_cka(first, second), split="test", model=model.name))
    return rows


def _share(metric: str, right: np.ndarray, image: np.ndarray, model: str, arm: str = "") -> Result:
    """The mean of `right` (N,) in percent, with an interval over images; NaN where there is none."""
    share = percent(cluster_interval(right, image)) if len(right) else [math.nan] * 3
    return Result(metric, *share, "test", arm, model)
