"""This study's loop beside transformers.Trainer, a bare loop, data that is ready in memory, and itself with one change.

All train the same model with the same optimizer on the same pairs, one step each in turn, in one process.
"""

import os
import tempfile
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader

from vqa.config import RunConfig, Section
from vqa.data import source as sources
from vqa.data.batches import Batch
from vqa.distributed import Rank
from vqa.evaluation.metrics import median_result
from vqa.experiments.measurement import WARMUP_STEPS, Arm
from vqa.results import Result

OURS, PAIRWISE, BARE, MEMORY = "this study's loop", "this study's loop, pair by pair", "bare loop", "ready in memory"
TRAINER = "transformers.Trainer, pair by pair"
RATIOS = {  # how many times the questions a second this study's loop answers for
    "loop_over_trainer_ratio": TRAINER,
    "loop_over_pairwise_ratio": PAIRWISE,
    "loop_over_bare_loop_ratio": BARE,
    "real_over_synthetic_ratio": MEMORY,
}


def loops(config: Section, source: sources.Source, rank: Rank) -> list[Result]:
    """Questions a second of each loop, of ours over each other, and our step's time with each lever, on equal pairs.

    `config` has the `run` to train and the number of timed `steps`.
    """
    arms = {name: Arm({"engine": name}, config.run, source, rank) for name in (OURS, BARE, MEMORY)}
    arms[PAIRWISE] = Arm({"engine": PAIRWISE}, config.run, source, rank, regroup=Batch.ungrouped)
    pulled = levers(config.run, source, rank)
    split, size = arms[OURS].objective.train_split, config.run.train.global_batch_size
    order = np.random.default_rng(config.run.seed).permutation(len(split))
    count = WARMUP_STEPS + config.steps
    steps = [np.take(order, np.arange(step * size, (step + 1) * size), mode="wrap") for step in range(count)]
    arms[BARE].trainer.update = _bare_update(arms[BARE])
    ready = {images.tobytes(): _synthetic(split.batch(images)) for images in steps}
    arms[MEMORY].objective.train_split.batch = lambda images: ready[images.tobytes()]
    seconds = {TRAINER: _beside_trainer(Arm({}, config.run, source, rank), steps, [*arms.values(), *pulled.values()])}
    seconds |= {name: arm.seconds for name, arm in arms.items()}
    pairs = np.array([len(split.pairs_of(images)) for images in steps])[WARMUP_STEPS:]
    rates = {name: pairs / np.array(spent[WARMUP_STEPS:]) for name, spent in seconds.items()}
    rows = [median_result("questions_per_second", list(rate), "1/s", {"engine": name}) for name, rate in rates.items()]
    ours = np.array(arms[OURS].seconds)
    for name, arm in pulled.items():
        ratio = (np.array(arm.seconds) / ours)[WARMUP_STEPS:]
        rows.append(median_result("step_time_ratio", list(ratio), "ratio", {"engine": name}))
    return rows + [
        median_result(ratio, list(rates[OURS] / rates[other]), "ratio", {"engine": other})
        for ratio, other in RATIOS.items()
    ]


def levers(run: RunConfig, source: sources.Source, rank: Rank) -> dict[str, Arm]:
    """Our loop with one change each: what might speed it up, and what it does already left out."""
    half = run.model_copy(update={"train": run.train.model_copy(update={"amp": "bf16"})})
    changed = {"bf16 autocast": half, "channels_last": run, "optimizer not fused": run}
    arms = {name: Arm({"engine": name}, changed[name], source, rank) for name in changed}
    arms["channels_last"].objective.model.to(memory_format=torch.channels_last)
    for group in arms["optimizer not fused"].trainer.optimizer.param_groups:
        group["fused"] = False
    name, longest = "padded to the limit", run.model.max_question_tokens
    arms[name] = Arm({"engine": name}, run, source, rank, regroup=lambda batch: padded(batch, longest))
    return arms


def padded(batch: Batch, tokens: int) -> Batch:
    """`batch` with every question as long as `tokens`, not as its longest."""
    more = (0, tokens - batch.input_ids.shape[1])
    return replace(batch, input_ids=pad(batch.input_ids, more), attention_mask=pad(batch.attention_mask, more))


def _bare_update(arm: Arm):
    """The fewest lines that train the arm's model on a batch, in the place of Trainer.update."""
    model, trainer = arm.objective.model, arm.trainer

    def update(batches: list[Batch], images: np.ndarray) -> None:
        (batch,) = batches
        cross_entropy(model(**batch.inputs()), batch.labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), trainer.config.train.max_grad_norm)
        trainer.optimizer.step()
        trainer.schedule.step()
        trainer.optimizer.zero_grad()

    return update


def _synthetic(batch: Batch) -> Batch:
    """`batch` with noise for images."""
    return replace(batch, pixel_values=torch.randint_like(batch.pixel_values, 256))


class _WithLoss(nn.Module):
    """The model in the form that transformers.Trainer trains: labels in, loss out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, image_index, input_ids, attention_mask, question_index, labels) -> dict:
        logits = self.model(pixel_values, image_index, input_ids, attention_mask, question_index)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class _Others(transformers.TrainerCallback):
    """Times Trainer's steps and lets every arm take the same step between two of them."""

    def __init__(self, steps: list[np.ndarray], arms: list[Arm]):
        self.steps, self.arms, self.seconds = iter(steps), arms, []
        self.orders = np.random.default_rng(0)  # who comes right after Trainer finds cold caches: not always the same

    def on_train_begin(self, *_, **__) -> None:
        self.resumed = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.resumed)
        images = next(self.steps)
        for place in self.orders.permutation(len(self.arms)):
            self.arms[place].step(images)
        self.resumed = time.perf_counter()


class _InOrder(transformers.Trainer):
    """Trainer on images in the order given, so that every loop meets the same pairs."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, self.args.per_device_train_batch_size, collate_fn=self.data_collator)


def _beside_trainer(arm: Arm, steps: list[np.ndarray], others: list[Arm]) -> list[float]:
    """Seconds of each of Trainer's `steps` on the model of `arm`, every image and question repeated for each pair."""
    split, train = arm.objective.train_split, arm.trainer.config.train

    def collate(images: list[int]) -> dict[str, torch.Tensor]:
        batch = split.batch(np.array(images)).ungrouped()
        return batch.inputs() | {"labels": batch.labels}

    callback = _Others(steps, others)
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, alone, clear=True):
        settings = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=train.global_batch_size,
            max_steps=len(steps),
            max_grad_norm=train.max_grad_norm,
            use_cpu=arm.rank.device.type == "cpu",
            bf16=train.amp == "bf16",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = _InOrder(
            _WithLoss(arm.objective.model),
            settings,
            collate,
            np.concatenate(steps).tolist(),
            optimizers=(arm.trainer.optimizer, arm.trainer.schedule),
            callbacks=[callback],
        )
        trainer.train()
    return callback.seconds
