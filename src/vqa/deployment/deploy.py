"""From a finished run to a folder that answers without PyTorch.

python -m vqa.deployment.deploy runs/<run> FOLDER

FOLDER/
    model-fp32.onnx  model-int8.onnx  tokenizer.json
    config.json      answers, preprocessing, SHA-256 of each file
    README.md        the card: what it is, how good, how large, how fast, measured where
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch

from vqa.config import ConfigError
from vqa.data import source as sources
from vqa.data.batches import Split
from vqa.deployment import ask
from vqa.deployment.onnx_int8 import ENGINE, Logits, QuantizeError, all_logits, export, int8_kernels, quantize_layers
from vqa.evaluation.metrics import accuracy_results, cluster_interval, median_result, paired_difference, score
from vqa.evaluation.timing import interleaved
from vqa.models.build import load_vqa_model
from vqa.models.vqa_model import VQAModel, parameter_count
from vqa.results import Result
from vqa.run_folder import Run, RunError, environment
from vqa.training.objectives import split_for

PRECISIONS = ("fp32", "int8")
CALIBRATION_IMAGES = 64
TIMED_ROUNDS = 20


def write_model(model: VQAModel, images: np.ndarray, folder: Path) -> None:
    """All of a deployment folder but the card; `images` (I, 3, H, W) uint8 calibrate it.

    Raises QuantizeError for a model that cannot be exported or was not quantized.
    """
    export(model, folder / "model-fp32.onnx")
    quantize_layers(folder / "model-fp32.onnx", folder / "model-int8.onnx", images)
    model.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    files = ("model-fp32.onnx", "model-int8.onnx", "tokenizer.json")
    config = {
        "answers": model.answers,
        "image_size": model.image_size,
        "preprocessing": "upright, RGB, transparent on white, resized to a square (bilinear), uint8 (3, H, W)",
        "max_question_tokens": model.config.max_question_tokens,
        "model": model.config.model_dump(),
        "sha256": {name: ask.sha256(folder / name) for name in files},
    }
    sealed = config | {"seal": ask.seal_of(config)}
    (folder / "config.json").write_text(json.dumps(sealed, indent=1) + "\n")


@dataclass(frozen=True)
class Deployment:
    """What was deployed, and how it compares with the model it came from."""

    folder: Path
    model: VQAModel
    predictions: pd.DataFrame  # of the int8 model on the test split, the fp32 model's beside them
    results: list[Result]


def deploy(run: Run, source: sources.Source, folder: Path) -> Deployment:
    """Quantize the model of the finished `run` into `folder`, which appears whole or not at all.

    Raises RunError if the run has not finished or `folder` exists or cannot be made, QuantizeError as `write_model`.
    """
    accuracy = run.result("accuracy")
    if folder.exists():
        raise RunError(f"{folder} exists: name another folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; name another folder") from None
    try:
        model = load_vqa_model(run.folder / "model")
        write_model(model, calibration_images(model, source), temporary)
        predictions = compare(model, source.splits["test"], temporary)
        results = [*_accuracies(predictions), *sizes(temporary)]
        results += _latencies(model, split_for(model, source.splits["test"]), temporary)
        card = _card(run, model, source, [accuracy, *results])
        (temporary / "README.md").write_text(card)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Deployment(folder, model, predictions, results)


def calibration_images(model: VQAModel, source: sources.Source, count: int = CALIBRATION_IMAGES) -> np.ndarray:
    """`count` training images, evenly spread, as `model` sees them."""
    split = split_for(model, source.splits["train"])
    chosen = np.unique(np.linspace(0, len(split) - 1, count, dtype=int))
    return split.batch(chosen).pixel_values.numpy()


def compare(model: VQAModel, table, folder: Path) -> pd.DataFrame:
    """One row a question: the int8 model's `prediction` and `confidence`, and those of fp32 as `fp32_…`."""
    split = split_for(model, table)
    columns = {}
    for precision in PRECISIONS:
        logits = all_logits(ask.onnx_logits(folder / f"model-{precision}.onnx", torch.get_num_threads()), split)
        shares = torch.from_numpy(logits).softmax(-1)
        prefix = "" if precision == "int8" else f"{precision}_"
        columns[f"{prefix}prediction"] = np.array(model.answers)[shares.argmax(-1)]
        columns[f"{prefix}confidence"] = shares.max(-1).values.numpy()
    frame = split.frame.assign(split="test", **columns)
    return frame.assign(correct=score(frame["prediction"], frame), fp32_correct=score(frame["fp32_prediction"], frame))


def _accuracies(predictions: pd.DataFrame) -> list[Result]:
    """Accuracy by type in both precisions, what int8 loses on the same questions, how often both agree."""
    image, rows = predictions["image_id"], []
    for precision, column in zip(PRECISIONS, ("fp32_correct", "correct"), strict=True):
        frame = predictions.assign(correct=predictions[column], blind_correct=False)
        own = [row for row in accuracy_results(frame, "test") if "blind" not in row.metric]
        rows += [replace(row, labels={"precision": precision, "engine": ENGINE}) for row in own]
    labels = {"precision": "int8", "engine": ENGINE}
    for kind, group in [
        ("", predictions),
        *((f"_{kind}", part) for kind, part in predictions.groupby("question_type")),
    ]:
        lost = paired_difference(group["fp32_correct"], group["correct"], group["image_id"])
        value, low, high = (100 * part for part in lost)
        rows.append(Result(f"accuracy_drop_int8{kind}", value, "points", low, high, "test", labels))
    same = (predictions["prediction"] == predictions["fp32_prediction"]).to_numpy()
    value, low, high = (100 * part for part in cluster_interval(same, image.to_numpy()))
    return [*rows, Result("agreement", value, "%", low, high, "test", labels)]


def sizes(folder: Path, **labels: str) -> list[Result]:
    """Bytes of both files of a deployment folder, and how many nodes of the int8 one compute in int8."""
    rows = []
    for precision in PRECISIONS:
        named = {"precision": precision, "engine": ENGINE, **labels}
        rows.append(Result("bytes_on_disk", (folder / f"model-{precision}.onnx").stat().st_size, "bytes", labels=named))
    return [*rows, Result("int8_kernels", int8_kernels(folder / "model-int8.onnx"), "count", labels=named)]


def _latencies(model: VQAModel, split: Split, folder: Path) -> list[Result]:
    """Time of one question about one image: PyTorch, and both files in ONNX Runtime, on equally many threads."""
    threads = torch.get_num_threads()
    arms = {("fp32", "eager"): eager(model)}
    for precision in PRECISIONS:
        arms[precision, ENGINE] = ask.onnx_logits(folder / f"model-{precision}.onnx", threads)
    return latency_rows(interleaved(arms, one_pair(split), TIMED_ROUNDS))


def eager(model: VQAModel) -> Logits:
    """`model` in PyTorch, with NumPy arrays in and out like the ONNX files."""

    @torch.inference_mode()
    def logits(**inputs: np.ndarray) -> np.ndarray:
        return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).float().numpy()

    return logits


def one_pair(split: Split, pair: int = 0, tokens: int = 0) -> dict[str, np.ndarray]:
    """What a model takes to answer `pair` of `split` alone, its question filled up to at least `tokens`."""
    image = np.searchsorted(split.first_pair, pair, side="right") - 1
    question, zero = split.question_of[[pair]], np.zeros(1, dtype=np.int64)
    longest = max(int(split.attention_mask[question].sum()), tokens)
    ids, mask = (part[question, :longest].numpy() for part in (split.input_ids, split.attention_mask))
    fill = ((0, 0), (0, longest - ids.shape[1]))  # where the split's longest question is shorter
    return {
        "pixel_values": split.batch(np.array([image])).pixel_values.numpy(),
        "image_index": zero,
        "input_ids": np.pad(ids, fill),
        "attention_mask": np.pad(mask, fill),
        "question_index": zero,
    }


def latency_rows(seconds: dict[tuple[str, ...], list[float]], **labels: str) -> list[Result]:
    """Median and 95th percentile of each (precision, engine), or (model, precision, engine), in milliseconds."""
    rows = []
    for name, spent in seconds.items():
        named = labels | dict(zip(("engine", "precision", "model"), reversed(name), strict=False))
        values = [1e3 * second for second in spent]
        rows.append(median_result("latency_p50_ms", values, "ms", named))
        rows.append(median_result("latency_p95_ms", values, "ms", named, quantile=0.95))
    return rows


def _card(run: Run, model: VQAModel, source: sources.Source, results: list[Result]) -> str:
    """The README.md of a deployment folder, every number from `results`."""
    found = {(row.metric, row.labels.get("precision"), row.labels.get("engine")): row for row in results}
    lines = []
    for precision, engine in (("fp32", "eager"), ("fp32", ENGINE), ("int8", ENGINE)):
        accuracy = found[("accuracy", None, None) if engine == "eager" else ("accuracy", precision, engine)]
        p50, p95 = (found[f"latency_{q}_ms", precision, engine].value for q in ("p50", "p95"))
        size = found.get(("bytes_on_disk", precision, engine))
        lines.append(
            f"| {precision}, {'PyTorch' if engine == 'eager' else engine} "
            f"| {accuracy.value:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}] "
            f"| {f'{size.value / 1e6:.2f}' if size else '–'} | {p50:.2f} | {p95:.2f} |"
        )
    drop, agreement = found["accuracy_drop_int8", "int8", ENGINE], found["agreement", "int8", ENGINE]
    config, cpu = run.config, environment()["cpu"]
    return CARD.format(
        role=config.role,
        run=run.folder.name,
        image=config.model.image_encoder.kind,
        text=config.model.text_encoder.kind,
        fusion=config.model.fusion.kind,
        parameters=f"{parameter_count(model):,}",
        answers=", ".join(model.answers),
        data=source.name,
        licence=source.licence,
        fingerprint=source.fingerprint,
        images=f"{len(source.splits['train']):,}",
        tested=f"{len(source.splits['test']):,}",
        rows="\n".join(lines),
        drop=f"{drop.value:+.2f} points [{drop.low:+.2f}, {drop.high:+.2f}]",
        agreement=f"{agreement.value:.2f} %",
        kernels=int(found["int8_kernels", "int8", ENGINE].value),
        size=model.image_size,
        tokens=model.config.max_question_tokens,
        cpu=cpu["model"],
        flags=", ".join(cpu["flags"]) or "none of those known to matter",
        threads=torch.get_num_threads(),
        onnxruntime=onnxruntime.__version__,
    )


CARD = """# {role} for visual question answering, int8

An image and a question in, one answer out. Image tower {image}, text tower {text}, fusion {fusion}, {parameters}
parameters. Made from the run `{run}`. The answers it knows: {answers}.

    pip install -r requirements-edge.txt
    python -m vqa.deployment.ask IMAGE "QUESTION" --model THIS_FOLDER

## Trained on
{data} (licence: {licence}; fingerprint {fingerprint}), {images} images of its training split.

## Measured
On the {tested} images of the test split that the study uses; latency of one question about one image.

| model | test accuracy, % [95 % interval] | MB | p50, ms | p95, ms |
|---|---|---|---|---|
{rows}

int8 loses {drop} to fp32 on the same questions and gives the same answer to {agreement} of them.
{kernels} of its nodes run as int8 kernels.

Machine: {cpu}, {threads} threads, ONNX Runtime {onnxruntime}, CPU flags {flags}.
Without AVX-512 VNNI or AMX, or their like on another make, int8 is slower and can round differently.

## Limits
It knows the images and the wording of its training data alone, and always gives an answer from its list. Images are
resized to {size} × {size} pixels; a question may have {tokens} tokens.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Quantize a finished run into a folder that vqa.deployment.ask serves."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        run = Run.open(arguments.run)
        made = deploy(run, sources.load(run.config.data), arguments.folder)
    except (ConfigError, RunError, QuantizeError, sources.SourceError) as error:
        sys.exit(f"error: {error}")
    for row in made.results:
        print(f"{row.metric:28} {row.value:.6g} {row.unit}  {' '.join(row.labels.values())}")
    print(f"{made.folder} is ready: python -m vqa.deployment.ask IMAGE QUESTION --model {made.folder}")


if __name__ == "__main__":
    main()
