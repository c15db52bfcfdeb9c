"""02_prototype: whether one device learns at all, and what its training steps cost."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from vqa.data.batches import Batch
from vqa.evaluation.timing import Arm, interleave, peak_memory, ratio
from vqa.experiments.measurement import WARMUP_STEPS, Measurement, TrainingArm, interleave_training, measures
from vqa.results import Result

PARTS = ("image_encoder", "text_encoder", "fusion", "answer_head")  # of a model


@measures
def overfit(m: Measurement) -> list[Result]:
    """Loss and accuracy on the training batch itself after 10 × `steps` steps on nothing else, at one rate."""
    arm = TrainingArm(m.first, m.source, m.rank)
    images = np.arange(m.first.train.global_batch_size)
    batch = arm.split.batch(images).to(m.rank.device)
    arm.trainer.schedule = torch.optim.lr_scheduler.ConstantLR(arm.trainer.optimizer, factor=1.0)
    for group in arm.trainer.optimizer.param_groups:
        group["lr"] = m.first.train.lr / 2
    losses = [arm.update(batch, images).item() for _ in range(10 * m.config.steps)]
    with torch.inference_mode():
        right = arm.model.eval()(**batch.inputs()).logits.argmax(-1) == batch.labels
    return [
        Result("overfit_first_loss", losses[0]),
        Result("overfit_last_loss", losses[-1]),
        Result("overfit_accuracy", 100 * right.float().mean().item()),
    ]


@measures
def grouping(m: Measurement) -> list[Result]:
    """Questions a second of both ways to feed the same pairs, their ratio, and how far logits differ."""
    grouped = TrainingArm(m.first, m.source, m.rank, arm="grouped")
    pairwise = TrainingArm(m.first, m.source, m.rank, Batch.ungrouped, arm="pair by pair")
    difference = _logit_difference(grouped, np.arange(m.first.train.global_batch_size))
    interleave_training([grouped, pairwise], m)
    each = len(grouped.split.frame) / len(grouped.split) * m.first.train.global_batch_size  # questions a step
    rates = [arm.result("questions_per_second", each / np.array(arm.seconds)) for arm in (grouped, pairwise)]
    return [
        *rates,
        grouped.result("grouped_over_pairwise_ratio", ratio(pairwise, grouped)),
        Result("logits_max_difference", difference, arm="grouped"),
    ]


@torch.inference_mode()
def _logit_difference(arm: TrainingArm, images: np.ndarray) -> float:
    model, batch = arm.model.eval(), arm.split.batch(images).to(arm.rank.device)
    one, other = (model(**given.inputs()).logits for given in (batch, batch.ungrouped()))
    model.train()
    return (one - other).abs().max().item()


@measures
def precision(m: Measurement) -> list[Result]:
    """Step time and peak memory for fp32 / bf16, with and without gradient checkpointing."""
    arms = []
    for amp, name in (("off", "fp32"), ("bf16", "bf16")):
        for checkpointing in (False, True):
            train = m.first.train.model_copy(update={"amp": amp, "gradient_checkpointing": checkpointing})
            labels = {"precision": name, "arm": "checkpointing" if checkpointing else ""}
            arms.append(TrainingArm(m.first.model_copy(update={"train": train}), m.source, m.rank, **labels))
    interleave_training(arms, m)
    return [arm.result("step_seconds") for arm in arms] + [step_memory(arm) for arm in arms]


def step_memory(arm: TrainingArm) -> Result:
    """The most memory of one more step of `arm`, beyond its weights and the optimizer's state."""
    images = np.arange(arm.trainer.config.train.global_batch_size)
    return Result("peak_memory_bytes", peak_memory(lambda: arm.work(images), arm.rank.device), **arm.labels)


@measures
def breakdown(m: Measurement) -> list[Result]:
    """Seconds a step in its parts, from torch.profiler's ranges around each of them."""
    learner = TrainingArm(m.first, m.source, m.rank)

    def step(images: np.ndarray) -> None:
        with record_function("batch"):
            batch = learner.split.batch(images)
        with record_function("update"):
            learner.update(batch, images)

    modules = {part: getattr(learner.model, part) for part in PARTS} | {"forward": learner.objective.network}
    images = [np.arange(m.first.train.global_batch_size)]
    interleave([Arm({}, step)], images * WARMUP_STEPS)
    with ExitStack() as hooks, profile(activities=[ProfilerActivity.CPU]) as profiled:
        for name, module in modules.items():
            hooks.enter_context(ranged(name, module))
        interleave([Arm({}, step)], images * m.config.steps)
    spent = {event.key: event.cpu_time_total / 1e6 / m.config.steps for event in profiled.key_averages()}
    parts = {name: spent[name] for name in ("batch", *PARTS)}
    parts["loss"] = spent["forward"] - sum(parts[name] for name in PARTS)
    parts["optimizer"] = spent["Optimizer.step#AdamW.step"]
    parts["backward_and_clipping"] = spent["update"] - spent["forward"] - parts["optimizer"]
    return [Result("part_seconds", seconds, arm=name) for name, seconds in parts.items()]


@contextmanager
def ranged(name: str, module: nn.Module) -> Iterator[None]:
    """Within the block, every forward pass of `module` is a range `name` in the profiler's record."""
    ranges: list[record_function] = []

    def enter(*_) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def leave(*_) -> None:
        ranges.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
