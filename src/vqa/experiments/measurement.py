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

import time
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from vqa.config import LaunchConfig, RunConfig, Section
from vqa.data import source as sources
from vqa.distributed import Rank
from vqa.evaluation.metrics import median_result
from vqa.results import Result
from vqa.training.objectives import OBJECTIVES
from vqa.training.train import Trainer

WARMUP_STEPS = 3


class BenchmarkConfig(Section):
    """What is measured (`kind`), on which training run, over how many steps an arm."""

    kind: Literal[
        *("overfit", "grouping", "precision", "breakdown", "sharing", "costs", "full_size"),
        *("caching", "understanding", "attention", "quantization", "sensitivity", "cross_check"),
        *("latency", "latency_compiled", "qat"),
    ]
    run: RunConfig
    others: list[RunConfig] = Field(default_factory=list)  # measured beside it
    steps: int

    @property
    def name(self) -> str:
        return f"{self.run.role}-{self.run.model.fusion.kind}-{self.kind}"

    @property
    def launch(self) -> LaunchConfig:
        return self.run.launch


class Arm:
    """One way to train the same run: its own model and optimizer, and what its steps cost."""

    def __init__(self, name: dict[str, str], run: RunConfig, source: sources.Source, rank: Rank, regroup=None):
        torch.manual_seed(run.seed)
        self.name, self.rank, self.regroup = name, rank, regroup or (lambda batch: batch)
        untrained = run.model_copy(update={"parent": None})  # no step is faster for better weights
        self.objective = OBJECTIVES[run.objective](untrained, source, rank)
        self.objective.network.to(rank.device).train()
        self.trainer = Trainer(run, self.objective, rank)
        self.seconds: list[float] = []

    def step(self, images: np.ndarray) -> None:
        """A whole training step on `images`, making the batch included."""
        self._wait()
        started = time.perf_counter()
        batch = self.regroup(self.objective.train_split.batch(images)).to(self.rank.device)
        self.trainer.update([batch], images)
        self._wait()
        self.seconds.append(time.perf_counter() - started)

    def _wait(self) -> None:
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize()

    def result(self, metric: str, values: list[float], unit: str) -> Result:
        return median_result(metric, values, unit, self.name)


def interleave(arms: list[Arm], config: BenchmarkConfig) -> None:
    """Every arm takes step 1, then every arm step 2, …; warm-up steps are forgotten."""
    order = np.random.default_rng(config.run.seed).permutation(len(arms[0].objective.train_split))
    size = config.run.train.global_batch_size
    for step in range(WARMUP_STEPS + config.steps):
        images = np.take(order, np.arange(step * size, (step + 1) * size), mode="wrap")
        for arm in arms:
            arm.step(images)
    for arm in arms:
        del arm.seconds[:WARMUP_STEPS]
