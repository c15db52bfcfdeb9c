"""How much of its teacher's understanding a student has, beyond accuracy, on the test split.

Agreement with the teacher; whether answers change when the image or the question does; how honest
the confidence is; what noise and blur do; how alike the towers' summaries are. And where a model
with cross attention looks.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torchvision.transforms.v2 import functional as vision

from vqa import sources
from vqa.batches import VIEWS, Split
from vqa.config import RunConfig
from vqa.metrics import calibration_error, cluster_interval, linear_cka, score, swap_test
from vqa.models import load_vqa_model
from vqa.models.vqa_model import VQAModel
from vqa.objectives import split_for
from vqa.runs import Result, Run
from vqa.targets import read_all

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


def attention(trained: Run, source: sources.Source, run: Run) -> list[Result]:
    """Write attention.npz into `run`: mean attention over heads of the last layer for test questions, wrong ones first.

    question_id (8,), maps (8, T, P), tokens (8, T); the result is the share of wrong answers shown.
    """
    model = load_vqa_model(trained.folder / "model")
    answered = trained.predictions().query("split == 'test'")
    wrong = answered[answered["correct"] == 0].drop_duplicates("image_id").head(4)
    right = answered[answered["correct"] == 1].drop_duplicates("question_type").head(8 - len(wrong))
    chosen = pd.concat([wrong, right]).drop_duplicates("question_id")
    split = split_for(model, source.splits["test"])
    numbers = {image: number for number, image in enumerate(source.splits["test"]["image_id"])}
    maps, tokens = [], []
    for item in chosen.itertuples():
        batch = split.batch(np.array([numbers[item.image_id]]))
        asked = split.frame.iloc[split.pairs_of(np.array([numbers[item.image_id]]))]["question_id"].tolist()
        pair = asked.index(item.question_id)
        seen = model.fusion.look(*model.towers(batch), batch)[pair].mean(0)  # (T, P)
        ids = batch.input_ids[batch.question_index[pair]]
        maps.append(seen.numpy())
        tokens.append(model.tokenizer.convert_ids_to_tokens(ids.tolist()))
    longest = max(len(row) for row in tokens)
    padded = np.stack([np.pad(m, ((0, longest - len(m)), (0, 0))) for m in maps])
    words = np.array([[*row, *[""] * (longest - len(row))] for row in tokens])
    with run.replacing("attention.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, question_id=chosen["question_id"].to_numpy(), maps=padded, tokens=words)
    return [Result("wrong_answers_shown", len(wrong), "count")]
