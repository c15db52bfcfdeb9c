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

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from vqa.config import FusionConfig, load_profile
from vqa.data import source as sources
from vqa.data.batches import Batch
from vqa.distributed import Rank
from vqa.evaluation.metrics import median_result
from vqa.evaluation.timing import peak_memory
from vqa.experiments.measurement import WARMUP_STEPS, Arm, BenchmarkConfig, interleave
from vqa.models.build import load_vqa_model
from vqa.models.vqa_model import VQAModel, parameter_count, without_public_weights
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training.objectives import split_for, tokenizer_for
from vqa.training.train import autocast

FULL_SIZE_FUSIONS = {
    "concat": FusionConfig(kind="concat", width=768),
    "cross_attention": FusionConfig(kind="cross_attention", width=768, layers=2, heads=12),
}


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
