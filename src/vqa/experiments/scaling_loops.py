"""04_scaling: this study's loop beside transformers.Trainer, a bare loop, data ready in memory, and itself changed.

All train the same model with the same optimizer on the same pairs, one step each in turn, in one process.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from vqa.config import RunConfig
from vqa.data.batches import Batch
from vqa.data.source import Source
from vqa.distributed import Rank
from vqa.evaluation.timing import Arm, ratio
from vqa.experiments.measurement import WARMUP_STEPS, Measurement, TrainingArm, measures, step_images
from vqa.results import Result

OURS, PAIRWISE, BARE, MEMORY = "this study's loop", "this study's loop, pair by pair", "bare loop", "ready in memory"
TRAINER = "transformers.Trainer, pair by pair"
RATIOS = {  # questions a second of this study's loop over those of the loop named here
    "loop_over_trainer_ratio": TRAINER,
    "loop_over_pairwise_ratio": PAIRWISE,
    "loop_over_bare_loop_ratio": BARE,
    "real_over_synthetic_ratio": MEMORY,
}
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # variables by which Trainer would find the other ranks


@measures
def loops(m: Measurement) -> list[Result]:
    """Questions a second of each loop, of ours over each other, and our step's time with each lever, on equal pairs."""
    ours = TrainingArm(m.first, m.source, m.rank, arm=OURS)
    steps = step_images(m.first, len(ours.split), m.config.steps)
    others = [
        bare_arm(TrainingArm(m.first, m.source, m.rank)),
        memory_arm(TrainingArm(m.first, m.source, m.rank), steps),
        TrainingArm(m.first, m.source, m.rank, Batch.ungrouped, arm=PAIRWISE),
    ]
    changed = levers(m.first, m.source, m.rank)
    trainer = train_beside(TrainingArm(m.first, m.source, m.rank), steps, [ours, *others, *changed])
    for arm in (ours, *others, *changed, trainer):
        del arm.seconds[:WARMUP_STEPS]
    pairs = np.array([len(ours.split.pairs_of(images)) for images in steps[WARMUP_STEPS:]])
    by_name = {arm.labels["arm"]: arm for arm in (trainer, ours, *others)}
    return [
        *(arm.result("questions_per_second", pairs / np.array(arm.seconds)) for arm in by_name.values()),
        *(arm.result("step_time_ratio", ratio(arm, ours)) for arm in changed),
        *(by_name[other].result(metric, ratio(by_name[other], ours)) for metric, other in RATIOS.items()),
    ]


def levers(run: RunConfig, source: Source, rank: Rank) -> list[TrainingArm]:
    """Our loop with one change each: what might speed it up, and what it does already left out."""
    half = run.model_copy(update={"train": run.train.model_copy(update={"amp": "bf16"})})
    autocast = TrainingArm(half, source, rank, arm="bf16 autocast", precision="bf16")
    channels_last = TrainingArm(run, source, rank, arm="channels_last")
    channels_last.model.to(memory_format=torch.channels_last)
    not_fused = TrainingArm(run, source, rank, arm="optimizer not fused")
    for group in not_fused.trainer.optimizer.param_groups:
        group["fused"] = False
    longest = run.model.max_question_tokens
    all_padded = TrainingArm(run, source, rank, lambda batch: padded(batch, longest), arm="padded to the limit")
    return [autocast, channels_last, not_fused, all_padded]


def padded(batch: Batch, tokens: int) -> Batch:
    """`batch` with every question as long as `tokens`, not as its longest."""
    more = (0, tokens - batch.input_ids.shape[1])
    return replace(batch, input_ids=pad(batch.input_ids, more), attention_mask=pad(batch.attention_mask, more))


def bare_arm(learner: TrainingArm) -> Arm:
    """The fewest lines that train the model of `learner`."""
    model, trainer = learner.model, learner.trainer

    def step(images: np.ndarray) -> None:
        batch = learner.split.batch(images).to(learner.rank.device)
        model(**batch.inputs(), labels=batch.labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), trainer.config.train.max_grad_norm)
        trainer.optimizer.step()
        trainer.schedule.step()
        trainer.optimizer.zero_grad()

    return Arm({"arm": BARE}, step)


def memory_arm(learner: TrainingArm, steps: list[np.ndarray]) -> Arm:
    """Our loop on batches of `steps` that are made before, with noise for images."""
    made = {images.tobytes(): learner.split.batch(images) for images in steps}
    ready = {key: replace(b, pixel_values=torch.randint_like(b.pixel_values, 256)) for key, b in made.items()}
    return Arm({"arm": MEMORY}, lambda images: learner.update(ready[images.tobytes()], images))


class TakeTurns(transformers.TrainerCallback):
    """Times Trainer's steps and lets every arm take the same step between two of them."""

    def __init__(self, steps: list[np.ndarray], arms: list[Arm]):
        self.steps, self.arms, self.seconds = iter(steps), arms, []
        self.order = np.random.default_rng(0)  # who comes right after Trainer finds cold caches: not always the same

    def on_train_begin(self, *_, **__) -> None:
        self.resumed = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.resumed)
        images = next(self.steps)
        for place in self.order.permutation(len(self.arms)):
            self.arms[place].step(images)
        self.resumed = time.perf_counter()


class InOrder(transformers.Trainer):
    """Trainer on images in the order given, so that every loop meets the same pairs."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, self.args.per_device_train_batch_size, collate_fn=self.data_collator)


class WithoutConfig(nn.Module):
    """`model` in the form that Trainer needs: it writes to a model's `config`, and ours is frozen."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> tuple:
        return self.model(**inputs)


def train_beside(learner: TrainingArm, steps: list[np.ndarray], others: list[Arm]) -> Arm:
    """Trainer's `steps` on the model of `learner`, images and questions repeated for each pair; `others` between them.

    Gives an arm with the seconds of Trainer's steps.
    """
    split, train = learner.split, learner.trainer.config.train

    def collate(images: list[int]) -> dict[str, torch.Tensor]:
        batch = split.batch(np.array(images)).ungrouped()
        return batch.inputs() | {"labels": batch.labels}

    callback = TakeTurns(steps, others)
    with tempfile.TemporaryDirectory() as folder, without_variables(*TORCHRUN):
        settings = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=train.global_batch_size,
            max_steps=len(steps),
            max_grad_norm=train.max_grad_norm,
            use_cpu=learner.rank.device.type == "cpu",
            bf16=train.amp == "bf16",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = InOrder(
            WithoutConfig(learner.model),
            settings,
            collate,
            np.concatenate(steps).tolist(),
            optimizers=(learner.trainer.optimizer, learner.trainer.schedule),
            callbacks=[callback],
        )
        trainer.train()
    return Arm({"arm": TRAINER}, trainer.train, seconds=callback.seconds)


@contextmanager
def without_variables(*names: str) -> Iterator[None]:
    """The block runs without these environment variables."""
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)
