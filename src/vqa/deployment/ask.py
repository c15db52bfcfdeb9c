"""Questions about images, answered by a saved model.

    python -m vqa.deployment.ask IMAGE "QUESTION" [--model FOLDER]
    python -m vqa.deployment.ask --pairs FILE.csv [--model FOLDER]

FOLDER is what `vqa.deployment.deploy` wrote, served by ONNX Runtime with neither torch nor transformers
(requirements-edge.txt is all it needs), or the run folder of a training, served by PyTorch.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vqa.data.images import ImageError, read_image

DEPLOYMENTS = Path(os.environ.get("VQA_RUNS", "runs")) / "deployments"
PAIRS_AT_ONCE = 256
SHOWN = 3
Pair = tuple[Path, str]  # an image's file and a question about it


class AskError(ValueError):
    """A question or a folder that cannot be used; its message is one sentence for the user."""


class Answerer:
    """A model with all that it takes to ask it.

    `logits` takes what VQAModel.forward takes, as NumPy arrays, and gives (N, A).
    """

    def __init__(
        self,
        answers: list[str],
        image_size: int,
        max_question_tokens: int,
        tokenizer: Path,
        logits: Callable[..., np.ndarray],
    ):
        self.answers, self.image_size, self.max_question_tokens = answers, image_size, max_question_tokens
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_truncation()
        self.tokenizer.enable_padding(pad_id=self.tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
        self.logits = logits

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Probabilities (N, A) of every answer to each of N pairs; equal images and questions are encoded once.

        Raises ImageError or AskError for an image or a question that cannot be used.
        """
        images, image_index = _distinct([path for path, _ in pairs])
        questions, question_index = _distinct([question for _, question in pairs])
        input_ids, attention_mask = self.encode(questions)
        logits = self.logits(
            pixel_values=np.stack([read_image(path, self.image_size) for path in images]),
            image_index=image_index,
            input_ids=input_ids,
            attention_mask=attention_mask,
            question_index=question_index,
        )
        return _softmax(logits)

    def encode(self, questions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and attention_mask (U, T). Raises AskError for an empty or too long question."""
        if not all(question.strip() for question in questions):
            raise AskError("the question is empty")
        encoded = self.tokenizer.encode_batch(questions)
        longest = max(sum(row.attention_mask) for row in encoded)
        if longest > self.max_question_tokens:
            raise AskError(
                f"the question has {longest} tokens and the model reads {self.max_question_tokens}: make it shorter"
            )
        return np.array([row.ids for row in encoded]), np.array([row.attention_mask for row in encoded])

    def top(self, probabilities: np.ndarray) -> list[tuple[str, float]]:
        """The likeliest answers of a row of probabilities (A,), best first."""
        best = np.argsort(-probabilities, kind="stable")[:SHOWN]
        return [(self.answers[index], float(probabilities[index])) for index in best]


def load(folder: Path) -> Answerer:
    """The model in a deployment folder (its int8 file) or in a training's run folder.

    Raises AskError if it is neither, or if a file is missing or not the one that was deployed.
    """
    if (folder / "model" / "config.json").is_file():
        return from_run(folder)
    return from_deployment(folder)


def from_deployment(folder: Path, precision: str = "int8", threads: int = 0) -> Answerer:
    """The `precision` (int8 or fp32) model of a deployment folder; `threads` 0: one a core."""
    config, model = read_config(folder), f"model-{precision}.onnx"
    for name in (model, "tokenizer.json"):
        _check(folder / name, config["sha256"][name])
    return Answerer(
        config["answers"],
        config["image_size"],
        config["max_question_tokens"],
        folder / "tokenizer.json",
        onnx_logits(folder / model, threads),
    )


def from_run(folder: Path) -> Answerer:
    """The model of a finished training, served by PyTorch."""
    import torch

    from vqa.models import load_vqa_model

    model = load_vqa_model(folder / "model")

    @torch.inference_mode()
    def logits(**inputs: np.ndarray) -> np.ndarray:
        return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()

    tokens, tokenizer = model.config.max_question_tokens, folder / "model" / "tokenizer.json"
    return Answerer(model.answers, model.image_size, tokens, tokenizer, logits)


def onnx_logits(model: Path, threads: int = 0) -> Callable[..., np.ndarray]:
    """What runs the ONNX file `model`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Between questions the threads sleep: by default they spin for milliseconds, in the way of whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda **inputs: session.run(None, inputs)[0]


def read_config(folder: Path) -> dict:
    """config.json of a deployment folder. Raises AskError if it is missing or was altered."""
    path = folder / "config.json"
    if not path.is_file():
        raise AskError(f"{folder} is neither a deployment folder nor a run folder: it has no config.json")
    try:
        config = json.loads(path.read_text())
        seal = config.pop("seal")
    except (ValueError, KeyError, AttributeError):
        raise AskError(f"{path} is damaged: deploy the model again") from None
    if seal != seal_of(config):
        raise AskError(f"{path} was altered after deployment: deploy the model again")
    return config


def seal_of(config: dict) -> str:
    """A checksum of all that config.json says."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str) -> None:
    if not path.is_file():
        raise AskError(f"{path} is missing: deploy the model again")
    if sha256(path) != expected:
        raise AskError(f"{path} was altered after deployment: deploy the model again")


def read_pairs(path: Path) -> list[Pair]:
    """The pairs in a CSV file with the columns image and question; images are relative to the file.

    Raises AskError if it has not got them.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        raise AskError(f"{path} is not a text file that can be read") from None
    if not rows or not {"image", "question"} <= rows[0].keys():
        raise AskError(f"{path} needs the columns image and question, and a row below them")
    return [(path.parent / (row["image"] or ""), row["question"] or "") for row in rows]


def _distinct(items: list) -> tuple[list, np.ndarray]:
    """Each of `items` once, and where each stands among them (N,)."""
    place = {item: index for index, item in enumerate(dict.fromkeys(items))}
    return list(place), np.array([place[item] for item in items])


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def answer_one(answerer: Answerer, pair: Pair) -> None:
    """Print the likeliest answers to `pair`."""
    started = time.perf_counter()
    (row,) = answerer([pair])
    spent = 1e3 * (time.perf_counter() - started)
    for answer, probability in answerer.top(row):
        print(f"{answer:20} {100 * probability:5.1f} %")
    print(f"answered in {spent:.1f} ms", file=sys.stderr)


def answer_file(answerer: Answerer, pairs: list[Pair]) -> None:
    """Print a CSV row for each of `pairs`: image, question, answer, probability."""
    out = csv.writer(sys.stdout)
    out.writerow(["image", "question", "answer", "probability"])
    started = time.perf_counter()
    for first in range(0, len(pairs), PAIRS_AT_ONCE):
        some = pairs[first : first + PAIRS_AT_ONCE]
        for (image, question), row in zip(some, answerer(some), strict=True):
            answer, probability = answerer.top(row)[0]
            out.writerow([image, question, answer, f"{probability:.4f}"])
    spent = time.perf_counter() - started
    print(f"{len(pairs)} answers, {len(pairs) / spent:.0f} a second", file=sys.stderr)


def newest_deployment() -> Path:
    found = [path.parent for path in DEPLOYMENTS.glob("*/config.json")]
    if not found:
        raise AskError(f"no model in {DEPLOYMENTS}: name a folder with --model, or make one with vqa.deployment.deploy")
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer questions about images.")
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--pairs", type=Path, help="a CSV file with the columns image and question")
    parser.add_argument("--model", type=Path, help=f"default: the newest in {DEPLOYMENTS}")
    arguments = parser.parse_args()
    if (arguments.pairs is None) == (arguments.question is None):
        parser.error("give an image and a question, or --pairs FILE")
    try:
        pairs = read_pairs(arguments.pairs) if arguments.pairs else [(arguments.image, arguments.question)]
        answerer = load(arguments.model or newest_deployment())
        if arguments.pairs:
            answer_file(answerer, pairs)
        else:
            answer_one(answerer, pairs[0])
    except (AskError, ImageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
