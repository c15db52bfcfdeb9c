"""06_quantization: what int8 costs a trained model in answers, and saves in bytes and time; where and why."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vqa.data.batches import Split
from vqa.deployment import ask
from vqa.deployment.deploy import (
    CALIBRATION_IMAGES,
    TIMED_ROUNDS,
    calibration_images,
    deploy,
    latency_arm,
    latency_rows,
    one_pair,
)
from vqa.deployment.onnx_int8 import Logits, all_logits, divergence, export, layer_name, layers, quantize_layers
from vqa.deployment.pt2e import compiled, compiled_int8, int8_kernels, quantized, save
from vqa.evaluation.metrics import cluster_interval, percent
from vqa.evaluation.timing import interleave, ratio
from vqa.experiments.measurement import Measurement, measures
from vqa.experiments.quantization_latency import THREADS
from vqa.models.build import load_vqa_model
from vqa.results import COMPILED, ONNX_RUNTIME, PT2E, Result
from vqa.run_folder import Run, RunError

CALIBRATIONS = (1, 8, 64)  # images
VALIDATION_IMAGES = 64  # that sensitivity compares answers on


@measures
def quantization(m: Measurement) -> list[Result]:
    """Deploy the trained model to runs/deployments, and compare it with fp32."""
    torch.set_num_threads(THREADS)
    trained = Run(m.first)
    folder = ask.DEPLOYMENTS / trained.folder.name
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier version of the code
    made = deploy(trained, m.source, folder)
    with m.run.replacing("predictions.parquet") as path:
        made.predictions.to_parquet(path)
    return made.results


@measures
def cross_check(m: Measurement) -> list[Result]:
    """The trained model compiled by PyTorch, in fp32 and in PT2E's int8: answers, bytes, time, time to compile.

    A compiled model takes one shape: every test question is asked alone, filled up to the longest.
    Raises RunError if the model has not been deployed, QuantizeError if a layer does not run in int8.
    """
    torch.set_num_threads(THREADS)
    trained = Run(m.first)
    model, folder = load_vqa_model(trained.folder / "model"), ask.DEPLOYMENTS / trained.folder.name
    if not folder.is_dir():
        raise RunError(f"{folder} is missing: measure quantization first")
    train, test = (Split(m.source.splits[name], model.processor) for name in ("train", "test"))
    longest = max(split.input_ids.shape[1] for split in (train, test))
    spread = np.unique(np.linspace(0, len(train.frame) - 1, CALIBRATION_IMAGES, dtype=int))
    single = one_pair(test, 0, longest)
    graph = quantized(model, [one_pair(train, pair, longest) for pair in spread])
    in_fp32, fp32_seconds = _timed(lambda: compiled(model, single))
    in_int8, int8_seconds = _timed(lambda: compiled_int8(model, graph, single))
    served = ask.onnx_logits(folder / "model-int8.onnx", THREADS)
    labels = {"precision": "int8", "engine": PT2E}
    fp32 = latency_arm(in_fp32, precision="fp32", engine=COMPILED)
    int8, onnx = latency_arm(in_int8, **labels), latency_arm(served, precision="int8", engine=ONNX_RUNTIME)
    interleave([fp32, int8, onnx], [single] * TIMED_ROUNDS)
    answers = np.array([in_int8(**one_pair(test, pair, longest)).argmax() for pair in range(len(test.frame))])
    rows = [
        fp32.result("compile_seconds", [fp32_seconds]),
        int8.result("compile_seconds", [int8_seconds]),
        _share("accuracy", answers == test.label_of, test, labels),
        _share("agreement_with_onnx_runtime", answers == all_logits(served, test).argmax(-1), test, labels),
        Result("bytes_on_disk", _bytes(lambda path: save(graph, single, path)), **labels),
        Result("int8_kernels", int8_kernels(in_int8, single), **labels),
        int8.result("pt2e_over_onnx_runtime_latency_ratio", ratio(int8, onnx)),
    ]
    return [*rows, *latency_rows(fp32), *latency_rows(int8)]


def _timed(make: Callable[[], Logits]) -> tuple[Logits, float]:
    """What `make` gives, and how many seconds it took."""
    started = time.perf_counter()
    return make(), time.perf_counter() - started


def _bytes(write: Callable[[Path], None]) -> int:
    """The size of the file that `write` leaves at the path it is given."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "int8.pt2"
        write(path)
        return path.stat().st_size


def _share(metric: str, same: np.ndarray, split: Split, labels: dict[str, str]) -> Result:
    share = percent(cluster_interval(same, split.frame["image_id"].to_numpy()))
    return Result(metric, *share, "test", **labels)


@measures
def sensitivity(m: Measurement) -> list[Result]:
    """How far int8 moves the answers from fp32: in each layer alone, and in all of them by calibration images."""
    torch.set_num_threads(THREADS)
    model = load_vqa_model(Run(m.first).folder / "model")
    held = m.source.splits["validation"]
    split = Split(held.select(np.arange(min(VALIDATION_IMAGES, len(held)))), model.processor)
    images = {count: calibration_images(model, m.source, count) for count in CALIBRATIONS}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        fp32, int8 = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        export(model, fp32)
        reference = all_logits(ask.onnx_logits(fp32, THREADS), split)
        one_layer = {f"int8 in {layer_name(name)}": (CALIBRATIONS[-1], [name]) for name in layers(fp32)}
        whole = {f"{count} calibration images": (count, []) for count in CALIBRATIONS}
        for arm, (count, only) in (one_layer | whole).items():
            quantize_layers(fp32, int8, images[count], only)
            change = divergence(all_logits(ask.onnx_logits(int8, THREADS), split), reference)
            labels = {"precision": "int8", "engine": ONNX_RUNTIME, "arm": arm}
            rows.append(Result("kl_divergence", change, split="validation", **labels))
    return rows
