"""Measurements of training steps, interleaved in one process so that drift hits every arm alike.

    torchrun --standalone --nproc-per-node 1 -m vqa.benchmark --config FILE

`overfit`    one batch, again and again: a model that cannot learn it by heart has a defect
`grouping`   the study's batches against the same pairs with images and questions repeated
`precision`  fp32 and bf16 autocast, each with and without gradient checkpointing
`breakdown`  where the time of one training step goes
`sharing`    the fusion alone: an image's keys and values projected once, against once per pair
`costs`      several models side by side: operations, memory, training and answering speed
`full_size`  memory of a step with the public full-size towers, which no accuracy is claimed of
`caching`    a distillation step with cached targets, and with the teacher run beside it, against a plain step
`understanding`  agreement, swaps, calibration, robustness and CKA of trained models; the first is the teacher
`attention`  where a trained cross-attention model looks, for some right and some wrong answers
`quantization`, `cross_check`, `sensitivity`, `latency`, `latency_compiled`  what deployment gains and costs, see
               vqa.deployment
`qat`        3-bit weights before and after quantization-aware fine-tuning, see vqa.qat
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torchvision.transforms.v2 import functional as vision

from vqa.config import RunConfig
from vqa.data import source as sources
from vqa.data.batches import VIEWS, Batch, Split
from vqa.distributed import Rank
from vqa.evaluation.metrics import calibration_error, cluster_interval, linear_cka, median_result, score, swap_test
from vqa.experiments.measurement import Arm, BenchmarkConfig, interleave
from vqa.models.build import load_vqa_model
from vqa.models.vqa_model import VQAModel
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training.distillation import read_all
from vqa.training.objectives import split_for


def caching(config: BenchmarkConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Seconds of a student's step: plain, distilled from cached targets, plain with its teacher's forward pass."""
    (distilled,) = config.others
    teacher = load_vqa_model(Run(distilled.teacher).folder / "model").to(rank.device)

    @torch.inference_mode()
    def ask_teacher(batch: Batch) -> Batch:
        teacher.read(**batch.to(rank.device).inputs())
        return batch

    arms = [
        Arm({"engine": "plain"}, config.run, source, rank),
        Arm({"engine": "cached"}, distilled, source, rank),
        Arm({"engine": "online"}, config.run, source, rank, regroup=ask_teacher),
    ]
    interleave(arms, config)
    rows = [arm.result("step_seconds", arm.seconds, "s") for arm in arms]
    for arm in arms[1:]:
        ratios = [slow / fast for slow, fast in zip(arm.seconds, arms[0].seconds, strict=True)]
        rows.append(median_result(f"{arm.name['engine']}_over_plain_step_ratio", ratios, "ratio", arm.name))
    return rows


SWAPS = {"image_swap": ["question"], "question_swap": ["image_id", "question_type"]}  # what stays the same


def noisy(pixels: torch.Tensor, level: int) -> torch.Tensor:
    """uint8 `pixels` with Gaussian noise of standard deviation `level`, of 255; the same at every call."""
    drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + level * drawn).round().clamp(0, 255).to(torch.uint8)


def blurred(pixels: torch.Tensor, level: int) -> torch.Tensor:
    """uint8 `pixels` after a Gaussian blur of standard deviation `level`, in pixels."""
    return vision.gaussian_blur(pixels, [6 * level + 1] * 2, [float(level)] * 2)


DISTORTIONS = [(noisy, 16), (noisy, 32), (noisy, 64), (blurred, 1), (blurred, 2), (blurred, 4)]


@dataclass
class Judged:
    """A trained model and what it says of the test split."""

    name: str
    model: VQAModel
    split: Split
    predictions: pd.DataFrame
    said: dict[str, torch.Tensor]  # as targets.read_all gives it, for the images as they are

    @classmethod
    def of(cls, config: RunConfig, source: sources.Source, device: torch.device) -> "Judged":
        run = Run(config)
        model = load_vqa_model(run.folder / "model").to(device)
        split = split_for(model, source.splits["test"])
        predictions = run.predictions().query("split == 'test'").reset_index(drop=True)
        return cls(config.kind, model, split, predictions, read_all(model, split, VIEWS[:1]))

    def correct(self, distort: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        """How right each answer (N,) is, 0 to 1, when images are seen through `distort`."""
        split = copy.copy(self.split)
        split.images = _Distorted(self.split.images, distort)
        chosen = read_all(self.model, split, VIEWS[:1])["logits"][0].argmax(-1).numpy()
        return score(pd.Series(np.array(self.model.answers)[chosen]), split.frame).to_numpy()


class _Distorted:
    def __init__(self, images, distort: Callable[[torch.Tensor], torch.Tensor]):
        self.images, self.distort = images, distort

    def __getitem__(self, chosen: np.ndarray) -> torch.Tensor:
        return self.distort(self.images[chosen])


def understanding(runs: list[RunConfig], source: sources.Source, device: torch.device) -> list[Result]:
    """All of it for each of `runs`, finished ones; the first is the teacher the others are compared with."""
    teacher, *students = (Judged.of(run, source, device) for run in runs)
    return [row for model in (teacher, *students) for row in (*_alone(model), *_beside(model, teacher))]


def _alone(model: Judged) -> list[Result]:
    labels, predictions = {"model": model.name}, model.predictions
    error = calibration_error(predictions["confidence"].to_numpy(), predictions["correct"].to_numpy())
    rows = [Result("calibration_error", 100 * error, "points", split="test", labels=labels)]
    for name, same in SWAPS.items():
        swaps = swap_test(predictions, same)
        for ending, must in (("changed", True), ("kept", False)):
            asked = swaps[swaps["must_change"] == must]
            right = (asked["changed"] == must).to_numpy()
            rows.append(_share(f"{name}_{ending}", right, asked["image_id"].to_numpy(), labels))
    image = model.split.frame["image_id"].to_numpy()
    for distort, level in DISTORTIONS:
        correct = model.correct(lambda pixels, distort=distort, level=level: distort(pixels, level))
        rows.append(_share(f"accuracy_{distort.__name__}_{level}", correct, image, labels))
    return rows


def _beside(model: Judged, teacher: Judged) -> list[Result]:
    labels, ours, theirs = {"model": model.name}, model.predictions, teacher.predictions
    same = (ours["prediction"] == theirs["prediction"]).to_numpy()
    retained = 100 * ours["correct"].mean() / theirs["correct"].mean()
    rows = [
        _share("agreement", same, ours["image_id"].to_numpy(), labels),
        Result("retained_accuracy", retained, "%", split="test", labels=labels),
    ]
    for part in ("image", "text"):
        first, second = (judged.said[part].flatten(0, -2) for judged in (model, teacher))
        rows.append(Result(f"cka_{part}", linear_cka(first, second), "", split="test", labels=labels))
    return rows


def _share(metric: str, right: np.ndarray, image: np.ndarray, labels: dict[str, str]) -> Result:
    value, low, high = (100 * part for part in cluster_interval(right, image)) if len(right) else [math.nan] * 3
    return Result(metric, value, "%", low, high, "test", labels)
