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
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch

from vqa.config import ConfigError
from vqa.data.batches import Split
from vqa.data.source import Source, SourceError, load
from vqa.deployment import ask
from vqa.deployment.onnx_int8 import Logits, LogitsOf, QuantizeError, all_logits, export, int8_kernels, quantize_layers
from vqa.evaluation.evaluate import open_answering
from vqa.evaluation.metrics import accuracy_results, cluster_interval, paired_difference, percent, score
from vqa.evaluation.timing import Arm, interleave, settle
from vqa.models.build import load_vqa_model
from vqa.models.parts import parameter_count
from vqa.models.vqa_model import VQAModel
from vqa.results import EAGER, ONNX_RUNTIME, Result, accuracy_of
from vqa.run_folder import Run, RunError, environment

PRECISIONS = ("fp32", "int8")
CALIBRATION_IMAGES = 64
TIMED_ROUNDS = 20
CLOSE_CALL = 0.05  # difference of the two best answers' probabilities that another machine's rounding may turn over


def write_model(model: VQAModel, images: np.ndarray, folder: Path) -> None:
    """All of a deployment folder but the card; `images` (I, 3, H, W) uint8 calibrate it.

    Raises QuantizeError for a model that cannot be exported or was not quantized.
    """
    export(model, folder / "model-fp32.onnx")
    quantize_layers(folder / "model-fp32.onnx", folder / "model-int8.onnx", images)
    preprocessing = "upright, RGB, transparent on white, resized to a square (bilinear), uint8 (3, H, W)"
    model.processor.save(folder, preprocessing=preprocessing, model=model.config.model_dump())
    config = json.loads((folder / "config.json").read_text())
    files = ("model-fp32.onnx", "model-int8.onnx", "tokenizer.json")
    config["sha256"] = {name: ask.sha256(folder / name) for name in files}
    config["seal"] = ask.seal_of(config)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


@dataclass(frozen=True)
class Deployment:
    """What was deployed, and how it compares with the model it came from."""

    folder: Path
    model: VQAModel
    predictions: pd.DataFrame  # of the int8 model on the test split, the fp32 model's beside them
    results: list[Result]


def deploy(run: Run, source: Source, folder: Path) -> Deployment:
    """Quantize the model of the finished `run` into `folder`, which appears whole or not at all.

    Raises RunError if the run has not finished, if its model no longer answers as it recorded, or if `folder` exists
    or cannot be made; QuantizeError as `write_model`.
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
        split = Split(source.splits["test"], model.processor)
        predictions = compare(split, temporary)
        _check_answers(run, predictions)
        results = [
            *_accuracies(predictions, source.relational_types),
            *sizes(temporary),
            *_latencies(model, split, temporary),
        ]
        (temporary / "README.md").write_text(_card(run, model, source, [accuracy, *results]))
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Deployment(folder, model, predictions, results)


def calibration_images(model: VQAModel, source: Source, count: int = CALIBRATION_IMAGES) -> np.ndarray:
    """`count` training images, evenly spread, as `model` sees them."""
    split = Split(source.splits["train"], model.processor)
    chosen = np.unique(np.linspace(0, len(split) - 1, count, dtype=int))
    return split.batch(chosen).pixel_values.numpy()


def compare(split: Split, folder: Path) -> pd.DataFrame:
    """One row a question of the test split: the int8 model's answer, and that of fp32 in columns named `fp32_…`.

    Columns: `prediction`, its `confidence`, its `margin` to the second best probability, and `correct`.
    """
    frame = split.frame.assign(split="test")
    for precision, prefix in (("int8", ""), ("fp32", "fp32_")):
        logits = all_logits(ask.onnx_logits(folder / f"model-{precision}.onnx", torch.get_num_threads()), split)
        (best, second), (index, _) = (part.T for part in torch.from_numpy(logits).softmax(-1).topk(2))
        frame[f"{prefix}prediction"] = np.array(split.processor.answers)[index]
        frame[f"{prefix}confidence"], frame[f"{prefix}margin"] = best.numpy(), (best - second).numpy()
        frame[f"{prefix}correct"] = score(frame[f"{prefix}prediction"], frame)
    return frame


def _check_answers(run: Run, predictions: pd.DataFrame) -> None:
    """Raise RunError unless the fp32 file gives the answers that `run` recorded: its answer list may be in disorder."""
    recorded = run.predictions().query("split == 'test'")["prediction"].to_numpy()
    differ = (predictions["fp32_prediction"] != recorded) & (predictions["fp32_margin"] > CLOSE_CALL)
    if count := int(differ.sum()):
        raise RunError(
            f"{run.folder.name} gives other answers to {count} of {len(differ)} test questions than it recorded: "
            "its model or its list of answers was altered, train it again"
        )


def _accuracies(predictions: pd.DataFrame, relational_types: Collection[str]) -> list[Result]:
    """Accuracy by type in both precisions, what int8 loses on the same questions, how often both agree."""
    rows = []
    for precision, column in zip(PRECISIONS, ("fp32_correct", "correct"), strict=True):
        frame = predictions.assign(correct=predictions[column])
        rows += accuracy_results(frame, "test", relational_types, precision=precision, engine=ONNX_RUNTIME)
    drop, groups = "accuracy_drop_int8", predictions.groupby("question_type")
    for metric, group in [(drop, predictions), *((accuracy_of(name, drop), group) for name, group in groups)]:
        lost = paired_difference(group["fp32_correct"], group["correct"], group["image_id"])
        rows.append(Result(metric, *percent(lost), "test", precision="int8", engine=ONNX_RUNTIME))
    same = (predictions["prediction"] == predictions["fp32_prediction"]).to_numpy()
    agreement = percent(cluster_interval(same, predictions["image_id"].to_numpy()))
    return [*rows, Result("agreement", *agreement, "test", precision="int8", engine=ONNX_RUNTIME)]


def sizes(folder: Path, **labels: str) -> list[Result]:
    """Bytes of both files of a deployment folder, and how many nodes of the int8 one compute in int8."""
    labels |= {"engine": ONNX_RUNTIME}
    files = {precision: folder / f"model-{precision}.onnx" for precision in PRECISIONS}
    rows = [Result("bytes_on_disk", file.stat().st_size, precision=name, **labels) for name, file in files.items()]
    return [*rows, Result("int8_kernels", int8_kernels(files["int8"]), precision="int8", **labels)]


def _latencies(model: VQAModel, split: Split, folder: Path) -> list[Result]:
    """Time of one question about one image: PyTorch, and both files in ONNX Runtime, on equally many threads."""
    arms = [latency_arm(eager(model), precision="fp32", engine=EAGER)]
    for precision in PRECISIONS:
        logits = ask.onnx_logits(folder / f"model-{precision}.onnx", torch.get_num_threads())
        arms.append(latency_arm(logits, precision=precision, engine=ONNX_RUNTIME))
    interleave(arms, [one_pair(split)] * TIMED_ROUNDS)
    return [row for arm in arms for row in latency_rows(arm)]


def latency_arm(logits: Logits, **labels: str) -> Arm:
    """An arm that gives its inputs, a dict of arrays, to `logits` once its threads have settled."""

    def work(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return logits(**inputs)

    return Arm(labels, work, settle(work))


def eager(model: VQAModel) -> Logits:
    """`model` in PyTorch, with NumPy arrays in and out like the ONNX files."""
    network = LogitsOf(model)

    @torch.inference_mode()
    def logits(**inputs: np.ndarray) -> np.ndarray:
        return network(**{name: torch.from_numpy(value) for name, value in inputs.items()}).float().numpy()

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


def latency_rows(arm: Arm) -> list[Result]:
    """Median and 95th percentile of the seconds of `arm`, in milliseconds."""
    spent = 1e3 * np.array(arm.seconds)
    return [arm.result("latency_p50_ms", spent), arm.result("latency_p95_ms", spent, quantile=0.95)]


def _card(run: Run, model: VQAModel, source: Source, results: list[Result]) -> str:
    """The README.md of a deployment folder, every number from `results`."""
    found = {(row.metric, row.precision, row.engine): row for row in results}
    drop, agreement = (found[name, "int8", ONNX_RUNTIME] for name in ("accuracy_drop_int8", "agreement"))
    config, cpu, processor = run.config, environment()["cpu"], model.processor
    return CARD.format(
        role=config.model_name,
        run=run.folder.name,
        image=config.model.image_encoder.kind,
        text=config.model.text_encoder.kind,
        fusion=config.model.fusion.kind,
        parameters=f"{parameter_count(model):,}",
        answers=", ".join(processor.answers),
        data=source.name,
        licence=source.licence,
        fingerprint=source.fingerprint,
        images=f"{len(source.splits['train']):,}",
        tested=f"{len(source.splits['test']):,}",
        rows=_card_rows(found),
        drop=f"{drop.value:+.2f} points [{drop.low:+.2f}, {drop.high:+.2f}]",
        agreement=f"{agreement.value:.2f} %",
        kernels=int(found["int8_kernels", "int8", ONNX_RUNTIME].value),
        size=processor.image_size,
        tokens=processor.max_question_tokens,
        cpu=cpu["model"],
        flags=", ".join(cpu["flags"]) or "none of those known to matter",
        threads=torch.get_num_threads(),
        onnxruntime=onnxruntime.__version__,
    )


def _card_rows(found: dict[tuple[str, str | None, str | None], Result]) -> str:
    """The card's table, from results by metric, precision and engine; the run's own accuracy has neither."""
    lines = []
    for precision, engine in (("fp32", EAGER), ("fp32", ONNX_RUNTIME), ("int8", ONNX_RUNTIME)):
        accuracy = found[("accuracy", None, None) if engine == EAGER else ("accuracy", precision, engine)]
        p50, p95 = (found[f"latency_{q}_ms", precision, engine].value for q in ("p50", "p95"))
        size = found.get(("bytes_on_disk", precision, engine))
        name, megabytes = "PyTorch" if engine == EAGER else engine, f"{size.value / 1e6:.2f}" if size else "–"
        interval = f"{accuracy.value:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}]"
        lines.append(f"| {precision}, {name} | {interval} | {megabytes} | {p50:.2f} | {p95:.2f} |")
    return "\n".join(lines)


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
        run = open_answering(arguments.run)
        made = deploy(run, load(run.config.data), arguments.folder)
    except (ConfigError, RunError, QuantizeError, SourceError) as error:
        sys.exit(f"error: {error}")
    for row in made.results:
        print(f"{row.metric:28} {row.value:.6g} {row.unit}  {row.precision} {row.engine}")
    print(f"{made.folder} is ready: python -m vqa.deployment.ask IMAGE QUESTION --model {made.folder}")


if __name__ == "__main__":
    main()
