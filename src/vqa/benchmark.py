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

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from vqa import sources
from vqa.batches import Batch
from vqa.config import ConfigError, FusionConfig, LaunchConfig, RunConfig, Section, load_profile, load_section
from vqa.deployment import cross_check, latency, quantization, sensitivity
from vqa.distributed import Rank, check_devices, process_group
from vqa.metrics import median_result
from vqa.models import load_vqa_model
from vqa.models.vqa_model import VQAModel, parameter_count, without_public_weights
from vqa.objectives import OBJECTIVES, split_for, tokenizer_for
from vqa.qat import qat
from vqa.runs import Result, Run, RunError
from vqa.train import Trainer, autocast, load_data
from vqa.understanding import attention, understanding

WARMUP_STEPS = 3
FULL_SIZE_FUSIONS = {
    "concat": FusionConfig(kind="concat", width=768),
    "cross_attention": FusionConfig(kind="cross_attention", width=768, layers=2, heads=12),
}


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


def sharing(config: BenchmarkConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Questions a second through the fusion alone, forward and backward, shared against per pair."""
    objective = Arm({}, config.run, source, rank).objective
    model, split = objective.model, objective.train_split
    arms = {"once per image": lambda batch: batch, "once per pair": Batch.ungrouped}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    size, pairs = config.run.train.global_batch_size, []
    for step in range(WARMUP_STEPS + config.steps):
        batch = split.batch(np.take(np.arange(len(split)), np.arange(step * size, (step + 1) * size), mode="wrap"))
        pairs.append(len(batch))
        for name, regroup in arms.items():
            given = regroup(batch).to(rank.device)
            with torch.no_grad():
                image = model.image_encoder(given.pixel_values)
                text = model.text_encoder(given.input_ids, given.attention_mask)
            for features in (*image, *text):
                features.requires_grad_()
            started = time.perf_counter()
            model.fusion(image, text, given.attention_mask, given.image_index, given.question_index).sum().backward()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, spent in seconds.items():
        rates = [n / s for n, s in zip(pairs[WARMUP_STEPS:], spent[WARMUP_STEPS:], strict=True)]
        rows.append(median_result("questions_per_second", rates, "1/s", {"engine": name}))
    ratios = np.array(seconds["once per pair"]) / np.array(seconds["once per image"])
    labels = {"engine": "once per image"}
    return [*rows, median_result("shared_over_per_pair_ratio", list(ratios[WARMUP_STEPS:]), "ratio", labels)]


def costs(config: BenchmarkConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Parameters, operations a question, memory, and questions a second in training and in answering."""
    runs = [config.run, *config.others]
    arms = [Arm({"fusion": run.model.fusion.kind, "model": run.kind}, run, source, rank) for run in runs]
    interleave(arms, config)
    images = np.arange(config.run.train.global_batch_size)
    pairs = len(arms[0].objective.train_split.pairs_of(images))
    rows = []
    for arm in arms:
        rate = [pairs / second for second in arm.seconds]
        rows.append(median_result("training_questions_per_second", rate, "1/s", arm.name))
        rows.append(Result("parameters", parameter_count(arm.objective.model), "count", labels=arm.name))
        peak = peak_memory(lambda arm=arm: arm.step(images), rank.device)
        rows.append(Result("peak_memory_bytes", peak, "bytes", labels=arm.name))
    answering: list[list[float]] = [[] for _ in arms]
    batch = arms[0].objective.train_split.batch(images).to(rank.device)
    with torch.inference_mode():
        for arm in arms:
            model = arm.objective.model.eval()
            with FlopCounterMode(display=False) as counter:
                model(**batch.inputs())
            rows.append(Result("flops_per_question", counter.get_total_flops() / pairs, "flop", labels=arm.name))
        for _ in range(config.steps):
            for arm, spent in zip(arms, answering, strict=True):
                started = time.perf_counter()
                arm.objective.model(**batch.inputs())
                spent.append(pairs / (time.perf_counter() - started))
    rows += [
        median_result("questions_per_second", spent, "1/s", arm.name)
        for arm, spent in zip(arms, answering, strict=True)
    ]
    return rows


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


def full_size(config: BenchmarkConfig, source: sources.Source, rank: Rank) -> list[Result]:
    """Peak memory of a training step on one image at 224 px, per fusion, precision and checkpointing.

    The towers have the public full size and random weights, which cost the same memory.
    """
    base = load_profile("base").run("teacher", aligned=False)
    rows = []
    for fusion in ("concat", "cross_attention"):
        shape = without_public_weights(base.model).model_copy(
            update={"fusion": FULL_SIZE_FUSIONS[fusion], "dropout": 0.0}
        )
        model = VQAModel(shape, tokenizer_for(config.run, source), source.answers, base.data.image_size)
        split = split_for(model, source.splits["train"])
        batch = split.batch(np.arange(1)).to(rank.device)
        model.to(rank.device).train()
        model.loss(model, batch, len(batch)).backward()  # gradients are allocated, and stay
        for checkpointing in (False, True):
            if checkpointing:
                model.checkpoint_gradients()
            for amp in ("off", "bf16"):

                def step(model=model, batch=batch, amp=amp) -> None:
                    with autocast(rank.device, amp):
                        loss = model.loss(model, batch, len(batch))
                    loss.backward()

                labels = {
                    "fusion": fusion,
                    "precision": "bf16" if amp == "bf16" else "fp32",
                    "engine": "eager, checkpointing" if checkpointing else "eager",
                    "model": "full-size teacher",
                }
                rows.append(Result("peak_memory_bytes", peak_memory(step, rank.device), "bytes", labels=labels))
    return rows


def peak_memory(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes that `work` held at one time, beyond what was held before it.

    On a CPU: the highest running sum of the profiler's record of every allocation and release, which
    counts tensors exactly and is not blurred by what the C library keeps.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes)]).max())


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


MEASURES = {
    measure.__name__: measure
    for measure in (
        *(overfit, grouping, precision, breakdown, sharing, costs, full_size, caching),
        *(cross_check, sensitivity, latency),
    )
}


def measure(config: BenchmarkConfig, source: sources.Source, rank: Rank, run: Run) -> list[Result]:
    if config.kind == "attention":
        return attention(Run(config.run), source, run)
    if config.kind == "understanding":
        return understanding([config.run, *config.others], source, rank.device)
    if config.kind in ("quantization", "qat"):
        return {"quantization": quantization, "qat": qat}[config.kind](config, source, rank, run)
    return MEASURES[config.kind.removesuffix("_compiled")](config, source, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training steps; start with torchrun.")
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        config = load_section(BenchmarkConfig, arguments.config)
        check_devices(config.launch)
        run = Run(config, module="vqa.benchmark")
        with process_group(config.launch) as rank, run.writing() if rank.is_main else nullcontext():
            source = load_data(config.run, rank)
            rows = measure(config, source, rank, run)
            if rank.is_main:
                run.finish(rows)
            for row in rows:
                print(f"{row.metric:28} {row.value:.4g} {row.unit}  {' '.join(row.labels.values())}", flush=True)
    except (ConfigError, RunError, sources.SourceError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
