"""What measurements have in common: one registry, what each is given, and an arm that trains."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vqa.config import ConfigError, MeasurementConfig, RunConfig, near
from vqa.data.batches import Batch
from vqa.data.source import Source
from vqa.distributed import Rank
from vqa.evaluation.timing import Arm, interleave
from vqa.results import KINDS, Result
from vqa.run_folder import Run
from vqa.training.train import OBJECTIVES, Trainer

WARMUP_STEPS = 3  # of each arm, untimed


@dataclass(frozen=True)
class Measurement:
    """What a measurement is given: its config, the data set, the rank it runs on, the folder it may write to."""

    config: MeasurementConfig
    source: Source
    rank: Rank
    run: Run

    @property
    def first(self) -> RunConfig:
        """The run that a measurement of one run is about."""
        return self.config.runs[0]


MEASURES: dict[str, Callable[[Measurement], list[Result]]] = {}


def measures(measure: Callable[[Measurement], list[Result]]) -> Callable[[Measurement], list[Result]]:
    """Enter `measure` in MEASURES under its own name. Raises KeyError for a name that results.KINDS does not have."""
    if measure.__name__ not in KINDS:
        raise KeyError(f"results.KINDS has no sentence for the measurement {measure.__name__!r}")
    MEASURES[measure.__name__] = measure
    return measure


def measure_of(kind: str) -> Callable[[Measurement], list[Result]]:
    """The function that measures `kind`. Raises ConfigError if no module of this folder has one."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "__main__":
            importlib.import_module(f"vqa.experiments.{module.name}")
    if kind not in MEASURES:
        raise ConfigError(f"nothing in vqa.experiments measures {kind!r}; {near(kind, MEASURES)}")
    return MEASURES[kind]


class TrainingArm(Arm):
    """The training step of `run` as an arm: a model and an optimizer of its own, fed with image numbers.

    `regroup` changes each batch once it is made, which is part of the step. `labels` as in Arm.
    """

    def __init__(
        self,
        run: RunConfig,
        source: Source,
        rank: Rank,
        regroup: Callable[[Batch], Batch] = lambda batch: batch,
        **labels: str,
    ):
        super().__init__(labels, self.train)
        torch.manual_seed(run.seed)  # arms of one run start alike
        untrained = run.model_copy(update={"parent": None})  # no step is faster for better weights
        self.objective = OBJECTIVES[run.objective](untrained, source, rank)
        self.objective.network.to(rank.device).train()
        self.trainer = Trainer(run, self.objective, rank)
        self.model, self.split = self.objective.model, self.objective.train_split
        self.rank, self.regroup = rank, regroup

    def train(self, images: np.ndarray) -> None:
        """One step on `images`, (B,) numbers in the training split."""
        self.update(self.regroup(self.split.batch(images)), images)

    def update(self, batch: Batch, images: np.ndarray) -> torch.Tensor:
        """One step on `batch`, made of `images` before; its loss."""
        return self.trainer.update([batch.to(self.rank.device)], images)[0]


def step_images(run: RunConfig, images: int, steps: int, size: int = 0) -> list[np.ndarray]:
    """Image numbers of WARMUP_STEPS and `steps` more steps, `size` (or a global batch) each, out of `images`.

    They come in a random order, which begins again where it ends.
    """
    order, size = np.random.default_rng(run.seed).permutation(images), size or run.train.global_batch_size
    count = WARMUP_STEPS + steps
    return [np.take(order, np.arange(step * size, (step + 1) * size), mode="wrap") for step in range(count)]


def interleave_training(arms: list[TrainingArm], m: Measurement) -> None:
    """`interleave` over training steps; each arm then has as many seconds as the config has steps."""
    interleave(arms, step_images(m.first, len(arms[0].split), m.config.steps), WARMUP_STEPS)
