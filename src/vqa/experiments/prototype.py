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

from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vqa.data import source as sources
from vqa.data.batches import Batch
from vqa.distributed import Rank
from vqa.evaluation.metrics import median_result
from vqa.evaluation.timing import peak_memory
from vqa.experiments.measurement import WARMUP_STEPS, Arm, BenchmarkConfig, interleave
from vqa.results import Result


def overfit(config: BenchmarkConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Loss and accuracy on the training batch itself after 10 × `steps` steps on nothing else, at one rate."""
    arm = Arm({"engine": "eager"}, config.run, source, rank)
    images = np.arange(config.run.train.global_batch_size)
    batch = arm.objective.train_split.batch(images).to(rank.device)
    arm.trainer.schedule = torch.optim.lr_scheduler.ConstantLR(arm.trainer.optimizer, factor=1.0)
    for group in arm.trainer.optimizer.param_groups:
        group["lr"] = config.run.train.lr / 2
    losses = [arm.trainer.update([batch], images)[0].item() for _ in range(10 * config.steps)]
    with torch.inference_mode():
        right = arm.objective.model.eval()(**batch.inputs()).argmax(-1) == batch.labels
    return [
        Result("overfit_first_loss", losses[0], "nats"),
        Result("overfit_last_loss", losses[-1], "nats"),
        Result("overfit_accuracy", 100 * right.float().mean().item(), "%"),
    ]


def grouping(config: BenchmarkConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Questions a second of both ways to feed the same pairs, their ratio, and how far logits differ."""
    grouped = Arm({"engine": "grouped"}, config.run, source, rank)
    pairwise = Arm({"engine": "pair by pair"}, config.run, source, rank, regroup=Batch.ungrouped)
    difference = _logit_difference(grouped, np.arange(config.run.train.global_batch_size))
    interleave([grouped, pairwise], config)
    pairs = len(grouped.objective.train_split.frame) / len(grouped.objective.train_split)
    each = pairs * config.run.train.global_batch_size
    rows = [arm.result("questions_per_second", [each / s for s in arm.seconds], "1/s") for arm in (grouped, pairwise)]
    ratios = [slow / fast for slow, fast in zip(pairwise.seconds, grouped.seconds, strict=True)]
    rows.append(median_result("grouped_over_pairwise_ratio", ratios, "ratio", {"engine": "grouped"}))
    return [*rows, Result("logits_max_difference", difference, "logit", labels={"engine": "grouped"})]


@torch.inference_mode()
def _logit_difference(arm: Arm, images: np.ndarray) -> float:
    model, batch = arm.objective.model.eval(), arm.objective.train_split.batch(images).to(arm.rank.device)
    difference = (model(**batch.inputs()) - model(**batch.ungrouped().inputs())).abs().max().item()
    model.train()
    return difference


def precision(config: BenchmarkConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Step time and peak memory for fp32 / bf16, with and without gradient checkpointing."""
    arms = []
    for amp, label in (("off", "fp32"), ("bf16", "bf16")):
        for checkpointing in (False, True):
            train = config.run.train.model_copy(update={"amp": amp, "gradient_checkpointing": checkpointing})
            name = {"precision": label, "engine": "eager, checkpointing" if checkpointing else "eager"}
            arms.append(Arm(name, config.run.model_copy(update={"train": train}), source, rank))
    interleave(arms, config)
    rows = [arm.result("step_seconds", arm.seconds, "s") for arm in arms]
    images = np.arange(config.run.train.global_batch_size)
    for arm in arms:
        peak = peak_memory(lambda arm=arm: arm.step(images), rank.device)
        rows.append(Result("peak_memory_bytes", peak, "bytes", labels=arm.name))
    return rows


def breakdown(config: BenchmarkConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Seconds a step in its parts, from torch.profiler's ranges around each of them."""
    arm = Arm({"engine": "eager"}, config.run, source, rank)
    model = arm.objective.model
    for part in ("image_encoder", "text_encoder", "fusion", "answer_head"):
        module = getattr(model, part)
        module.forward = _ranged(part, module.forward)
    arm.objective.train_split.batch = _ranged("batch", arm.objective.train_split.batch)
    arm.objective.loss = _ranged("forward", arm.objective.loss)
    arm.trainer.update = _ranged("update", arm.trainer.update)
    images = np.arange(config.run.train.global_batch_size)
    for _ in range(WARMUP_STEPS):
        arm.step(images)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(config.steps):
            arm.step(images)
    spent = {event.key: event.cpu_time_total / 1e6 / config.steps for event in profiled.key_averages()}
    parts = {name: spent[name] for name in ("batch", "image_encoder", "text_encoder", "fusion", "answer_head")}
    parts["loss"] = spent["forward"] - sum(parts[name] for name in list(parts)[1:])
    parts["optimizer"] = spent["Optimizer.step#AdamW.step"]
    parts["backward_and_clipping"] = spent["update"] - spent["forward"] - parts["optimizer"]
    return [Result(f"seconds_{name}", value, "s", labels={"engine": "eager"}) for name, value in parts.items()]


def _ranged(name: str, call: Callable) -> Callable:
    def inside(*arguments, **named):
        with record_function(name):
            return call(*arguments, **named)

    return inside
