"""What deployment gains and costs: three benchmark kinds.

`quantization`  a trained model's int8 file against its fp32 one: answers, bytes, time
`sensitivity`   which of its layers int8 changes most, and how many images calibrate it
`latency`       models with random weights, usually of full size: time, throughput, memory, cold start
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from PIL import Image

from vqa import ask, sources
from vqa.batches import train_tokenizer
from vqa.config import RunConfig
from vqa.distributed import Rank
from vqa.int8 import ENGINE, Logits, all_logits, divergence, export, layer_name, layers, quantize_layers
from vqa.metrics import median_result
from vqa.models import load_vqa_model
from vqa.models.vqa_model import VQAModel, without_public_weights
from vqa.objectives import split_for, tokenizer_for
from vqa.quantize import PRECISIONS, calibration_images, deploy, eager, interleaved, latency_rows, sizes, write_model
from vqa.runs import RUNS, Result, Run
from vqa.train import autocast

if TYPE_CHECKING:
    from vqa.benchmark import BenchmarkConfig

THREADS = 2  # for every arm alike
QUESTION_TOKENS = 16
BATCH_SIZES = (1, 8)
STARTS = {"run": 1, "deployment": 5}  # PyTorch takes seconds, which need no interval to be told apart
CALIBRATIONS = (1, 8, 64)  # images
JUDGED_IMAGES = 64
ASK = "from vqa import ask; ask.main(); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"

Arm = tuple[str, str, str]  # model, precision, engine


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


def latency(config: "BenchmarkConfig", source: sources.Source, rank: Rank) -> list[Result]:
    """Time, throughput, bytes, memory and cold start of `config.others`, with random weights, on THREADS threads."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=RUNS) as scratch:
        places = {shape.role: Path(scratch) / shape.role for shape in config.others}
        models = {shape.role: untrained(shape, source) for shape in config.others}
        arms: dict[Arm, Logits] = {}
        rows = []
        for role, place in places.items():
            models[role].save(place / "run" / "model")
            (place / "deployment").mkdir()
            write_model(models[role], calibration_images(models[role], source, 8), place / "deployment")
            for own, logits in engines(models[role], place / "deployment").items():
                arms[f"{role}, random weights", *own] = logits
            rows += _bytes(role, place)
        size = models["student"].image_size
        seconds = interleaved(arms, inputs(1, size), config.steps)
        rows += latency_rows(seconds)
        rows += ratios(seconds, rows)
        rows += throughput(arms, size)
        image, question = _example(source, Path(scratch))
        for role, place in places.items():
            rows += end_to_end(role, place, (image, question), config.steps)
            rows += starts(role, place, (image, question))
    return rows


def untrained(shape: RunConfig, source: sources.Source) -> VQAModel:
    """A model of `shape` with random weights; one with a public text tower gets words up to its vocabulary's size."""
    torch.manual_seed(shape.seed)
    questions = sources.pairs(source.splits["train"])["question"].unique().tolist()
    if shape.model.text_encoder.pretrained:
        digits = "0 1 2 3 4 5 6 7 8 9"
        missing = transformers.BertConfig().vocab_size - len(train_tokenizer([*questions, digits]))
        tokenizer = train_tokenizer([*questions, digits, *(f"{number:05}" for number in range(missing))])
    else:
        tokenizer = tokenizer_for(shape, source)
    return VQAModel(without_public_weights(shape.model), tokenizer, source.answers, shape.data.image_size).eval()


def engines(model: VQAModel, deployment: Path) -> dict[tuple[str, str], Logits]:
    """What runs `model`, by precision and engine."""
    plain = eager(model)

    def halved(**arrays: np.ndarray) -> np.ndarray:
        with autocast(torch.device("cpu"), "bf16"):
            return plain(**arrays)

    served = {(p, ENGINE): ask.onnx_logits(deployment / f"model-{p}.onnx", THREADS) for p in PRECISIONS}
    return {("fp32", "eager"): plain, ("bf16", "eager"): halved, **served}


def inputs(pairs: int, size: int) -> dict[str, np.ndarray]:
    """`pairs` different images of `size` pixels, each with a question of its own."""
    each = np.arange(pairs)
    generator = np.random.default_rng(0)
    return {
        "pixel_values": generator.integers(0, 256, (pairs, 3, size, size), dtype=np.uint8),
        "image_index": each,
        "input_ids": generator.integers(5, 40, (pairs, QUESTION_TOKENS)),
        "attention_mask": np.ones((pairs, QUESTION_TOKENS), dtype=np.int64),
        "question_index": each,
    }


def ratios(seconds: dict[Arm, list[float]], rows: list[Result]) -> list[Result]:
    """How many times faster, and smaller, the student's int8 file is; medians over the rounds, each arm in each."""
    teacher, student = (f"{role}, random weights" for role in ("teacher", "student"))
    fp32 = [arm for arm in seconds if arm[:2] == (student, "fp32")]
    best = min(fp32, key=lambda arm: np.median(seconds[arm]))
    slower = {
        "teacher_eager": (teacher, "fp32", "eager"),
        "teacher_int8": (teacher, "int8", ENGINE),
        "student_best_fp32": best,
    }
    fast, labels = seconds[student, "int8", ENGINE], {"model": student, "precision": "int8", "engine": ENGINE}
    made = []
    for name, arm in slower.items():
        each = [slow / quick for slow, quick in zip(seconds[arm], fast, strict=True)]
        made.append(median_result(f"{name}_over_student_int8_latency_ratio", each, "ratio", labels))
    size = {(r.labels["model"], r.labels["precision"], r.labels["engine"]): r.value for r in rows if r.unit == "bytes"}
    smaller = size[teacher, "fp32", "eager"] / size[student, "int8", ENGINE]
    return [*made, Result("teacher_over_student_int8_bytes_ratio", smaller, "ratio", labels=labels)]


def throughput(arms: dict[Arm, Logits], size: int) -> list[Result]:
    """Questions a second of each arm by batch size, the better of two tries, taken in turn."""
    rows = []
    for pairs in BATCH_SIZES:
        given = inputs(pairs, size)
        seconds = interleaved(arms, given, rounds=2, warmup=1)
        for (model, precision, engine), spent in seconds.items():
            labels = {"model": model, "precision": precision, "engine": f"{engine}, {pairs} at once"}
            rows.append(Result("questions_per_second", pairs / min(spent), "1/s", labels=labels))
    return rows


def end_to_end(role: str, place: Path, pair: ask.Pair, rounds: int) -> list[Result]:
    """Latency with the image file to decode and the words to tokenize."""
    served = {("fp32", "eager"): place / "run", ("int8", ENGINE): place / "deployment"}
    arms = {own: _asked(ask.load(folder), pair) for own, folder in served.items()}
    seconds = {(p, f"{e}, file to answer"): spent for (p, e), spent in interleaved(arms, {}, rounds).items()}
    return latency_rows(seconds, model=f"{role}, random weights")


def _asked(answerer: ask.Answerer, pair: ask.Pair) -> Callable[[], np.ndarray]:
    return lambda: answerer([pair])


def starts(role: str, place: Path, pair: ask.Pair) -> list[Result]:
    """Seconds from process start to its end after one answer, and the most memory the process held."""
    rows = []
    for (precision, engine), folder in {("fp32", "eager"): "run", ("int8", ENGINE): "deployment"}.items():
        labels = {"model": f"{role}, random weights", "precision": precision, "engine": engine}
        spent, peaks = [], []
        for _ in range(STARTS[folder]):
            started = time.perf_counter()
            peaks.append(_peak_of_asking(pair, place / folder))
            spent.append(time.perf_counter() - started)
        rows.append(median_result("cold_start_seconds", spent, "s", labels))
        rows.append(Result("process_peak_memory_bytes", max(peaks), "bytes", labels=labels))
    return rows


def _peak_of_asking(pair: ask.Pair, model: Path) -> int:
    """Ask in a process of its own; the most bytes it held, as Linux counts them."""
    here = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", ASK, str(pair[0]), pair[1], "--model", str(model)]
    said = subprocess.run(command, env=here, check=True, capture_output=True, text=True).stdout
    return 1024 * int(said.splitlines()[-1])


def _example(source: sources.Source, folder: Path) -> ask.Pair:
    """A test image as a file, and its first question."""
    item = source.splits["test"][0]
    image = folder / "image.png"
    Image.fromarray(np.asarray(item["image"], dtype=np.uint8).transpose(1, 2, 0)).save(image)
    return image, item["question"][0]


def _bytes(role: str, place: Path) -> list[Result]:
    model = f"{role}, random weights"
    weights = (place / "run" / "model" / "model.safetensors").stat().st_size
    labels = {"model": model, "precision": "fp32", "engine": "eager"}
    return [Result("bytes_on_disk", weights, "bytes", labels=labels), *sizes(place / "deployment", model=model)]
