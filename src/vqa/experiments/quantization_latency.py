"""06_quantization: time, throughput, memory and cold start of models with random weights, usually of full size."""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vqa.config import RunConfig
from vqa.data.processor import Processor, train_tokenizer
from vqa.data.source import Source
from vqa.deployment import ask
from vqa.deployment.deploy import PRECISIONS, calibration_images, eager, latency_arm, latency_rows, sizes, write_model
from vqa.deployment.onnx_int8 import Logits
from vqa.deployment.pt2e import compiled, compiled_int8, quantized
from vqa.evaluation.timing import Arm, interleave, median_result, ratio, settle
from vqa.experiments.measurement import Measurement, measures
from vqa.models.parts import without_public_weights
from vqa.models.vqa_model import VQAModel
from vqa.results import COMPILED, EAGER, ONNX_RUNTIME, PT2E, Result
from vqa.run_folder import RUNS
from vqa.training.objectives import processor_for
from vqa.training.train import autocast

THREADS = 2  # for every arm alike
QUESTION_TOKENS = 16
BATCH_SIZES, THREAD_COUNTS = (1, 8), (1, 2)
STARTS = {("fp32", EAGER): 1, ("fp32", ONNX_RUNTIME): 1, ("int8", ONNX_RUNTIME): 5}  # seconds apart need no interval
RANDOM = "random weights"


@measures
def latency(m: Measurement) -> list[Result]:
    """Time, throughput, bytes, memory and cold start of the runs' models, with random weights, on THREADS threads."""
    return _latency(m, with_compiled=False)


@measures
def latency_compiled(m: Measurement) -> list[Result]:
    """As `latency`; both models compiled in fp32, and the student in PT2E's int8, are among the arms."""
    return _latency(m, with_compiled=True)


def _latency(m: Measurement, with_compiled: bool) -> list[Result]:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=RUNS) as scratch:
        places = {run.role: Path(scratch) / run.role for run in m.config.runs}
        models = {run.role: untrained(run, m.source) for run in m.config.runs}
        rows = []
        for role, place in places.items():
            models[role].save(place / "run" / "model")
            (place / "deployment").mkdir()
            write_model(models[role], calibration_images(models[role], m.source, 8), place / "deployment")
            rows += _bytes(role, place)
        size = models["student"].processor.image_size
        single = inputs(1, size)
        rows += [_operations(role, model, single) for role, model in models.items()]
        arms = _arms(models, places) + (_compiled_arms(models, single) if with_compiled else [])
        interleave(arms, [single] * m.config.steps)
        rows += [row for arm in arms for row in latency_rows(arm)]
        rows += ratios(arms, rows)
        del arms  # their weights, and for throughput each number of threads has sessions of its own
        for threads in THREAD_COUNTS:
            rows += throughput(_arms(models, places, threads), size, threads)
        torch.set_num_threads(THREADS)
        pair = _example(m.source, Path(scratch))
        for role, place in places.items():
            rows += end_to_end(role, place, pair, m.config.steps)
            rows += starts(role, place, pair)
    return rows


def untrained(run: RunConfig, source: Source) -> VQAModel:
    """A model of `run` with random weights; one with a public text tower gets words up to its vocabulary's size."""
    torch.manual_seed(run.seed)
    processor = processor_for(run, source) if not run.model.text_encoder.pretrained else _as_many_words(run, source)
    return VQAModel(without_public_weights(run.model), processor).eval()


def _as_many_words(run: RunConfig, source: Source) -> Processor:
    """Reads this study's questions, with made-up words beside theirs until they are as many as BERT's public ones."""
    texts = [*source.splits["train"].questions["question"].unique(), "0 1 2 3 4 5 6 7 8 9"]
    missing = transformers.BertConfig().vocab_size - train_tokenizer(texts).get_vocab_size()
    tokenizer = train_tokenizer([*texts, *(f"{number:05}" for number in range(missing))])
    return Processor(tokenizer, source.answers, run.data.image_size, run.model.max_question_tokens)


def _arms(models: dict[str, VQAModel], places: dict[str, Path], threads: int = THREADS) -> list[Arm]:
    """Every model in every engine that takes any shape, on `threads` threads."""
    torch.set_num_threads(threads)
    arms = []
    for role, model in models.items():
        plain = eager(model)
        labels = {"model": role, "arm": RANDOM}
        arms.append(latency_arm(plain, precision="fp32", engine=EAGER, **labels))
        arms.append(latency_arm(partial(_in_bf16, plain), precision="bf16", engine=EAGER, **labels))
        for precision in PRECISIONS:
            served = ask.onnx_logits(places[role] / "deployment" / f"model-{precision}.onnx", threads)
            arms.append(latency_arm(served, precision=precision, engine=ONNX_RUNTIME, **labels))
    return arms


def _in_bf16(logits: Logits, **arrays: np.ndarray) -> np.ndarray:
    with autocast(torch.device("cpu"), "bf16"):
        return logits(**arrays)


def _compiled_arms(models: dict[str, VQAModel], single: dict[str, np.ndarray]) -> list[Arm]:
    arms = [
        latency_arm(compiled(model, single), model=role, arm=RANDOM, precision="fp32", engine=COMPILED)
        for role, model in models.items()
    ]
    student = models["student"]
    in_int8 = compiled_int8(student, quantized(student, [single]), single)  # no speed depends on the ranges
    return [*arms, latency_arm(in_int8, model="student", arm=RANDOM, precision="int8", engine=PT2E)]


def _operations(role: str, model: VQAModel, single: dict[str, np.ndarray]) -> Result:
    with FlopCounterMode(display=False) as counter:
        eager(model)(**single)
    return Result("flops_per_question", counter.get_total_flops(), model=role, arm=RANDOM)


def _bytes(role: str, place: Path) -> list[Result]:
    weights = (place / "run" / "model" / "model.safetensors").stat().st_size
    labels = {"model": role, "arm": RANDOM}
    in_pytorch = Result("bytes_on_disk", weights, precision="fp32", engine=EAGER, **labels)
    return [in_pytorch, *sizes(place / "deployment", **labels)]


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


def ratios(arms: list[Arm], rows: list[Result]) -> list[Result]:
    """How many times faster, and smaller, the student's int8 file is, and the student than the teacher on each engine.

    Times are medians over the rounds, each arm in each; sizes are the bytes_on_disk among `rows`.
    """
    found = {(arm.labels["model"], arm.labels["precision"], arm.labels["engine"]): arm for arm in arms}
    students = [arm for arm in arms if arm.labels["model"] == "student"]
    quickest = found["student", "int8", ONNX_RUNTIME]
    slower = {
        "teacher_eager": found["teacher", "fp32", EAGER],
        "teacher_int8": found["teacher", "int8", ONNX_RUNTIME],
        "student_best_fp32": min(
            (arm for arm in students if arm.labels["precision"] == "fp32"), key=lambda arm: np.median(arm.seconds)
        ),
    }
    made = [
        quickest.result(f"{name}_over_student_int8_latency_ratio", ratio(arm, quickest)) for name, arm in slower.items()
    ]
    for arm in students:
        if beside := found.get(("teacher", arm.labels["precision"], arm.labels["engine"])):
            made.append(arm.result("teacher_over_student_latency_ratio", ratio(beside, arm)))
    size = {(row.model, row.precision, row.engine): row.value for row in rows if row.metric == "bytes_on_disk"}
    smaller = size["teacher", "fp32", EAGER] / size["student", "int8", ONNX_RUNTIME]
    return [*made, Result("teacher_over_student_int8_bytes_ratio", smaller, **quickest.labels)]


def throughput(arms: list[Arm], size: int, threads: int) -> list[Result]:
    """Questions a second of each arm by batch size, on `threads` threads, timed once."""
    rows = []
    for pairs in BATCH_SIZES:
        interleave(arms, [inputs(pairs, size)])
        for arm in arms:
            words = f"{pairs} at once, {threads} thread{'s' * (threads > 1)}"
            labels = arm.labels | {"arm": words}
            rows.append(Result("questions_per_second", pairs / arm.seconds.pop(), **labels))
    return rows


def end_to_end(role: str, place: Path, pair: ask.Pair, rounds: int) -> list[Result]:
    """Latency with the image file to decode and the words to tokenize."""
    served = {("fp32", EAGER): place / "run", ("int8", ONNX_RUNTIME): place / "deployment"}
    arms = []
    for (precision, engine), folder in served.items():
        answer = ask.load(folder)
        labels = {"model": role, "arm": "file to answer", "precision": precision, "engine": engine}
        arms.append(Arm(labels, answer, settle(answer)))
    interleave(arms, [[pair]] * rounds)
    return [row for arm in arms for row in latency_rows(arm)]


def starts(role: str, place: Path, pair: ask.Pair) -> list[Result]:
    """Seconds from process start to its end after one answer, and the most memory the process held."""
    rows = []
    for (precision, engine), tries in STARTS.items():
        labels = {"model": role, "arm": RANDOM, "precision": precision, "engine": engine}
        folder = place / ("run" if engine == EAGER else "deployment")
        spent, peaks = [], []
        for _ in range(tries):
            started = time.perf_counter()
            peaks.append(peak_of_asking(pair, folder, precision))
            spent.append(time.perf_counter() - started)
        rows.append(median_result("cold_start_seconds", spent, **labels))
        rows.append(Result("process_peak_memory_bytes", max(peaks), **labels))
    return rows


def peak_of_asking(pair: ask.Pair, folder: Path, precision: str) -> int:
    """Ask the model in `folder` in a process of its own; the most bytes it held, as Linux counts them."""
    here = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "vqa.experiments.ask_once", str(folder), precision, *map(str, pair)]
    answer = subprocess.run(command, env=here, check=True, capture_output=True, text=True).stdout
    return 1024 * int(answer.splitlines()[-1])


def _example(source: Source, folder: Path) -> ask.Pair:
    """A test image as a file, and its first question."""
    test, image = source.splits["test"], folder / "image.png"
    Image.fromarray(test.pixels(np.array([0]))[0].transpose(1, 2, 0)).save(image)
    return image, test.questions["question"].iloc[0]
