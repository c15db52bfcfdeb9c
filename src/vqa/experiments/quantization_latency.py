"""What deployment gains and costs: four benchmark kinds.

`quantization`  a trained model's int8 file against its fp32 one: answers, bytes, time
`cross_check`   the same model compiled by PyTorch, in fp32 and in int8, against ONNX Runtime's int8
`sensitivity`   which of its layers int8 changes most, and how many images calibrate it
`latency`       models with random weights, usually of full size: time, throughput, memory, cold start;
                `latency_compiled` has compiled models beside them
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vqa.config import RunConfig
from vqa.data import source as sources
from vqa.data.processor import train_tokenizer
from vqa.deployment import ask
from vqa.deployment.deploy import (
    PRECISIONS,
    calibration_images,
    eager,
    latency_rows,
    sizes,
    write_model,
)
from vqa.deployment.onnx_int8 import ENGINE, Logits
from vqa.deployment.pt2e import COMPILED, PT2E, compiled, compiled_int8, quantized
from vqa.distributed import Rank
from vqa.evaluation.metrics import median_result
from vqa.evaluation.timing import interleaved
from vqa.experiments.measurement import BenchmarkConfig
from vqa.models.vqa_model import VQAModel, without_public_weights
from vqa.results import Result
from vqa.run_folder import RUNS
from vqa.training.objectives import tokenizer_for
from vqa.training.train import autocast

THREADS = 2  # for every arm alike
QUESTION_TOKENS = 16
BATCH_SIZES, THREAD_COUNTS = (1, 8), (1, 2)
STARTS = {("fp32", "eager"): 1, ("fp32", ENGINE): 1, ("int8", ENGINE): 5}  # seconds need no interval to be told apart
ASK = "from vqa import ask; {}ask.main(); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
IN_FP32 = "ask.load = lambda folder: ask.from_deployment(folder, 'fp32'); "
Arm = tuple[str, str, str]  # model, precision, engine


def latency(config: "BenchmarkConfig", source: sources.Source, rank: Rank) -> list[Result]:
    """Time, throughput, bytes, memory and cold start of `config.others`, with random weights, on THREADS threads.

    The kind latency_compiled has both compiled in fp32, and the student in PT2E's int8, among the arms.
    """
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=RUNS) as scratch:
        places = {shape.role: Path(scratch) / shape.role for shape in config.others}
        models = {shape.role: untrained(shape, source) for shape in config.others}
        rows = []
        for role, place in places.items():
            models[role].save(place / "run" / "model")
            (place / "deployment").mkdir()
            write_model(models[role], calibration_images(models[role], source, 8), place / "deployment")
            rows += _bytes(role, place)
        size = models["student"].image_size
        rows += [_operations(role, model, inputs(1, size)) for role, model in models.items()]
        arms = _arms(models, places, THREADS)
        if config.kind == "latency_compiled":
            arms |= _compiled_arms(models, inputs(1, size))
        seconds = interleaved(arms, inputs(1, size), config.steps)
        rows += latency_rows(seconds)
        rows += ratios(seconds, rows)
        del arms  # their weights, and for throughput each number of threads has sessions of its own
        for threads in THREAD_COUNTS:
            rows += throughput(_arms(models, places, threads), size, threads)
        torch.set_num_threads(THREADS)
        image, question = _example(source, Path(scratch))
        for role, place in places.items():
            rows += end_to_end(role, place, (image, question), config.steps)
            rows += starts(role, place, (image, question))
    return rows


def _arms(models: dict[str, VQAModel], places: dict[str, Path], threads: int) -> dict[Arm, Logits]:
    torch.set_num_threads(threads)
    return {
        (f"{role}, random weights", *own): logits
        for role, model in models.items()
        for own, logits in engines(model, places[role] / "deployment", threads).items()
    }


def _operations(role: str, model: VQAModel, single: dict[str, np.ndarray]) -> Result:
    with FlopCounterMode(display=False) as counter:
        eager(model)(**single)
    labels = {"model": f"{role}, random weights"}
    return Result("flops_per_question", counter.get_total_flops(), "flop", labels=labels)


def _compiled_arms(models: dict[str, VQAModel], single: dict[str, np.ndarray]) -> dict[Arm, Logits]:
    arms = {(f"{role}, random weights", "fp32", COMPILED): compiled(model, single) for role, model in models.items()}
    student = models["student"]
    in_int8 = compiled_int8(student, quantized(student, [single]), single)  # no speed depends on the ranges
    return arms | {("student, random weights", "int8", PT2E): in_int8}


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


def engines(model: VQAModel, deployment: Path, threads: int = THREADS) -> dict[tuple[str, str], Logits]:
    """What runs `model` for any shape, by precision and engine; PyTorch on the threads that it has."""
    plain = eager(model)

    def halved(**arrays: np.ndarray) -> np.ndarray:
        with autocast(torch.device("cpu"), "bf16"):
            return plain(**arrays)

    served = {(p, ENGINE): ask.onnx_logits(deployment / f"model-{p}.onnx", threads) for p in PRECISIONS}
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
    """How many times faster, and smaller, the student's int8 file is, and the student than the teacher on each engine.

    Medians over the rounds, each arm in each.
    """
    teacher, student = (f"{role}, random weights" for role in ("teacher", "student"))
    fp32 = [arm for arm in seconds if arm[:2] == (student, "fp32")]
    best = min(fp32, key=lambda arm: np.median(seconds[arm]))
    slower = {
        "teacher_eager": (teacher, "fp32", "eager"),
        "teacher_int8": (teacher, "int8", ENGINE),
        "student_best_fp32": best,
    }
    quickest = (student, "int8", ENGINE)
    made = [_ratio(f"{name}_over_student_int8_latency_ratio", seconds, arm, quickest) for name, arm in slower.items()]
    for _, *own in [arm for arm in seconds if arm[0] == student and (teacher, *arm[1:]) in seconds]:
        made.append(_ratio("teacher_over_student_latency_ratio", seconds, (teacher, *own), (student, *own)))
    size = {(r.labels["model"], r.labels["precision"], r.labels["engine"]): r.value for r in rows if r.unit == "bytes"}
    smaller = size[teacher, "fp32", "eager"] / size[student, "int8", ENGINE]
    labels = {"model": student, "precision": "int8", "engine": ENGINE}
    return [*made, Result("teacher_over_student_int8_bytes_ratio", smaller, "ratio", labels=labels)]


def _ratio(metric: str, seconds: dict[Arm, list[float]], slow: Arm, fast: Arm) -> Result:
    each = [long / short for long, short in zip(seconds[slow], seconds[fast], strict=True)]
    return median_result(metric, each, "ratio", dict(zip(("model", "precision", "engine"), fast, strict=True)))


def throughput(arms: dict[Arm, Logits], size: int, threads: int) -> list[Result]:
    """Questions a second of each arm by batch size, on `threads` threads."""
    rows = []
    for pairs in BATCH_SIZES:
        seconds = interleaved(arms, inputs(pairs, size), rounds=1)
        for (model, precision, engine), (spent,) in seconds.items():
            words = f"{engine}, {pairs} at once, {threads} thread{'s' * (threads > 1)}"
            labels = {"model": model, "precision": precision, "engine": words}
            rows.append(Result("questions_per_second", pairs / spent, "1/s", labels=labels))
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
    for (precision, engine), tries in STARTS.items():
        labels = {"model": f"{role}, random weights", "precision": precision, "engine": engine}
        folder = place / ("run" if engine == "eager" else "deployment")
        before = IN_FP32 if (precision, engine) == ("fp32", ENGINE) else ""
        spent, peaks = [], []
        for _ in range(tries):
            started = time.perf_counter()
            peaks.append(_peak_of_asking(pair, folder, before))
            spent.append(time.perf_counter() - started)
        rows.append(median_result("cold_start_seconds", spent, "s", labels))
        rows.append(Result("process_peak_memory_bytes", max(peaks), "bytes", labels=labels))
    return rows


def _peak_of_asking(pair: ask.Pair, model: Path, before: str = "") -> int:
    """Ask in a process of its own; the most bytes it held, as Linux counts them."""
    here = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", ASK.format(before), str(pair[0]), pair[1], "--model", str(model)]
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
