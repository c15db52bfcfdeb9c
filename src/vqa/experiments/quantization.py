"""What deployment gains and costs: four benchmark kinds.

`quantization`  a trained model's int8 file against its fp32 one: answers, bytes, time
`cross_check`   the same model compiled by PyTorch, in fp32 and in int8, against ONNX Runtime's int8
`sensitivity`   which of its layers int8 changes most, and how many images calibrate it
`latency`       models with random weights, usually of full size: time, throughput, memory, cold start;
                `latency_compiled` has compiled models beside them
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vqa.data import source as sources
from vqa.deployment import ask
from vqa.deployment.deploy import (
    CALIBRATION_IMAGES,
    TIMED_ROUNDS,
    calibration_images,
    deploy,
    latency_rows,
    one_pair,
)
from vqa.deployment.onnx_int8 import ENGINE, Logits, all_logits, divergence, export, layer_name, layers, quantize_layers
from vqa.deployment.pt2e import COMPILED, PT2E, compiled, compiled_int8, int8_kernels, quantized, save
from vqa.distributed import Rank
from vqa.evaluation.metrics import cluster_interval, median_result
from vqa.evaluation.timing import interleaved
from vqa.experiments.measurement import BenchmarkConfig
from vqa.experiments.quantization_latency import THREADS, engines
from vqa.models.build import load_vqa_model
from vqa.results import Result
from vqa.run_folder import Run, RunError
from vqa.training.objectives import split_for

CALIBRATIONS = (1, 8, 64)  # images
JUDGED_IMAGES = 64


def quantization(config: "BenchmarkConfig", source: sources.Source, rank: Rank, run: Run) -> list[Result]:
    """Deploy the trained model to runs/deployments; compare it with fp32; what calibration and layers matter."""
    torch.set_num_threads(THREADS)
    trained = Run(config.run)
    folder = ask.DEPLOYMENTS / trained.folder.name
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier version of the code
    made = deploy(trained, source, folder)
    with run.replacing("predictions.parquet") as path:
        made.predictions.to_parquet(path)
    return made.results


def cross_check(config: "BenchmarkConfig", source: sources.Source, rank: Rank) -> list[Result]:
    """The trained model compiled by PyTorch, in fp32 and in PT2E's int8: answers, bytes, time, time to compile.

    A compiled model takes one shape: every test question is asked alone, filled up to the longest.
    Raises RunError if the model has not been deployed, QuantizeError if a layer does not run in int8.
    """
    torch.set_num_threads(THREADS)
    trained = Run(config.run)
    model, folder = load_vqa_model(trained.folder / "model"), ask.DEPLOYMENTS / trained.folder.name
    if not folder.is_dir():
        raise RunError(f"{folder} is missing: measure quantization first")
    train, test = (split_for(model, source.splits[name]) for name in ("train", "test"))
    longest = max(split.input_ids.shape[1] for split in (train, test))
    spread = np.unique(np.linspace(0, len(train.frame) - 1, CALIBRATION_IMAGES, dtype=int))
    single = one_pair(test, 0, longest)
    graph, rows = quantized(model, [one_pair(train, pair, longest) for pair in spread]), []
    arms: dict[tuple[str, str], Logits] = {}
    for own, make in (
        (("fp32", COMPILED), lambda: compiled(model, single)),
        (("int8", PT2E), lambda: compiled_int8(model, graph, single)),
    ):
        arms[own], seconds = _timed(make)
        rows.append(Result("compile_seconds", seconds, "s", labels={"precision": own[0], "engine": own[1]}))
    labels = {"precision": "int8", "engine": PT2E}
    answers = [arms["int8", PT2E](**one_pair(test, pair, longest)).argmax() for pair in range(len(test.frame))]
    theirs = all_logits(ask.onnx_logits(folder / "model-int8.onnx", THREADS), test).argmax(-1)
    for metric, same in (("accuracy", answers == test.label_of), (f"agreement_with_{ENGINE}", answers == theirs)):
        value, low, high = (100 * part for part in cluster_interval(same, test.frame["image_id"].to_numpy()))
        rows.append(Result(metric.lower().replace(" ", "_"), value, "%", low, high, "test", labels))
    with tempfile.TemporaryDirectory() as scratch:
        save(graph, single, Path(scratch) / "int8.pt2")
        rows.append(Result("bytes_on_disk", (Path(scratch) / "int8.pt2").stat().st_size, "bytes", labels=labels))
    rows.append(Result("int8_kernels", int8_kernels(arms["int8", PT2E], single), "count", labels=labels))
    seconds = interleaved(arms | engines(model, folder), single, TIMED_ROUNDS)
    ratios = [slow / fast for slow, fast in zip(seconds["int8", PT2E], seconds["int8", ENGINE], strict=True)]
    rows.append(median_result("pt2e_over_onnx_runtime_latency_ratio", ratios, "ratio", labels))
    return [*rows, *latency_rows({own: seconds[own] for own in arms})]


def _timed(make: Callable[[], Logits]) -> tuple[Logits, float]:
    started = time.perf_counter()
    return make(), time.perf_counter() - started


def sensitivity(config: "BenchmarkConfig", source: sources.Source, rank: Rank) -> list[Result]:
    """How far int8 moves the answers from fp32: in each layer alone, and in all of them by calibration images."""
    torch.set_num_threads(THREADS)
    model = load_vqa_model(Run(config.run).folder / "model")
    held = source.splits["validation"]
    split = split_for(model, held.select(range(min(JUDGED_IMAGES, len(held)))))
    images = {count: calibration_images(model, source, count) for count in CALIBRATIONS}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        fp32, int8 = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        export(model, fp32)
        reference = all_logits(ask.onnx_logits(fp32, THREADS), split)
        one_layer = {f"int8 in {layer_name(name)}": (CALIBRATIONS[-1], [name]) for name in layers(fp32)}
        whole = {f"int8, {count} calibration images": (count, []) for count in CALIBRATIONS}
        for label, (count, only) in (one_layer | whole).items():
            quantize_layers(fp32, int8, images[count], only)
            change = divergence(all_logits(ask.onnx_logits(int8, THREADS), split), reference)
            named = {"precision": label, "engine": ENGINE}
            rows.append(Result("kl_divergence", change, "nats", split="validation", labels=named))
    return rows
