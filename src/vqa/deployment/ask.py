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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from vqa.data.images import ImageError, read_image
from vqa.data.processor import Processor

DEPLOYMENTS = Path(os.environ.get("VQA_RUNS") or "runs").expanduser() / "deployments"
PAIRS_AT_ONCE = 256
SHOWN = 3
Pair = tuple[Path, str]  # an image's file and a question about it


class AskError(ValueError):
    """A question or a folder that cannot be used; its message is one sentence for the user."""


class Answerer:
    """A model with all that it takes to ask it.

    `logits` takes what VQAModel.forward takes, as NumPy arrays, and gives (N, A).
    """

    def __init__(self, processor: Processor, logits: Callable[..., np.ndarray]):
        self.processor, self.logits = processor, logits

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Probabilities (N, A) of every answer to each of N pairs; equal images and questions are encoded once.

        Raises ImageError or AskError for an image or a question that cannot be used.
        """
        images, image_index = _distinct([path for path, _ in pairs])
        questions, question_index = _distinct([question for _, question in pairs])
        for question in questions:
            self._check(question)
        input_ids, attention_mask = self.processor.encode(questions)
        logits = self.logits(
            pixel_values=np.stack([read_image(path, self.processor.image_size) for path in images]),
            image_index=image_index,
            input_ids=input_ids,
            attention_mask=attention_mask,
            question_index=question_index,
        )
        return _softmax(logits)

    def _check(self, question: str) -> None:
        """Raises AskError for a question that is empty, too long, or no text."""
        if not question.strip():
            raise AskError("the question is empty")
        try:
            question.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
            raise AskError("the question is not UTF-8 text") from None
        length, limit = self.processor.length(question), self.processor.max_question_tokens
        if length > limit:
            raise AskError(f"the question has {length} tokens and the model reads {limit}: make it shorter")

    def unknown_words(self, questions: Iterable[str]) -> list[str]:
        """Words that are not in the model's vocabulary: it reads them letter by letter, or not at all."""
        tokenizer, words = self.processor.tokenizer, {}
        for question in questions:
            split = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(question))
            words |= dict.fromkeys(word for word, _ in split if tokenizer.token_to_id(word) is None)
        return list(words)

    def top(self, probabilities: np.ndarray) -> list[tuple[str, float]]:
        """The likeliest answers of a row of probabilities (A,), best first."""
        best = np.argsort(-probabilities, kind="stable")[:SHOWN]
        return [(self.processor.answers[index], float(probabilities[index])) for index in best]


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
    return Answerer(Processor.load(folder), onnx_logits(folder / model, threads))


def from_run(folder: Path) -> Answerer:
    """The model of a finished training, served by PyTorch. Raises AskError if it was trained to align two towers."""
    import torch

    from vqa.models.build import load_vqa_model

    if not Processor.load(folder / "model").answers:
        raise AskError(f"{folder} aligned two towers; it answers no questions: name a run that was trained to")
    model = load_vqa_model(folder / "model")

    @torch.inference_mode()
    def logits(**inputs: np.ndarray) -> np.ndarray:
        return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()

    return Answerer(model.processor, logits)


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


def read_pairs(path: Path) -> dict[str, Pair | AskError]:
    """The pairs in a CSV file with the columns image and question, by "row 1 (line 2)"; images are relative to it.

    In the place of a row that has fewer or more fields than there are columns stands what is wrong with it.
    Raises AskError if the file cannot be read or has not got the columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # sig: Excel begins a UTF-8 file with a mark
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            rows = {f"row {number} (line {reader.line_num})": row for number, row in enumerate(reader, 1)}
    except OSError as error:
        raise AskError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AskError(f"{path} is not UTF-8 text: save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise AskError(f"{path} is not a CSV file: {error}") from None
    if not {"image", "question"} <= set(found):
        names = ", ".join(map(repr, found)) or "no column"
        raise AskError(f"{path} needs the columns image and question, with a comma between; it has {names}")
    if not rows:
        raise AskError(f"{path} has no row below its columns' names")
    return {place: _pair(row, path.parent) for place, row in rows.items()}


def _pair(row: dict[str | None, str | None], folder: Path) -> Pair | AskError:
    if None in row:  # where DictReader puts what is beyond the last column
        return AskError("it has more fields than there are columns: put quotes around a question with a comma")
    for name in ("image", "question"):
        if not (row[name] or "").strip():
            return AskError(f"it has no {name}")
    return folder / row["image"], row["question"]


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
    name_unknown_words(answerer, [pair[1]])
    print(f"answered in {spent:.1f} ms", file=sys.stderr)


def answer_file(answerer: Answerer, rows: dict[str, Pair | AskError]) -> int:
    """Print a CSV row for each pair of `rows`: image, question, answer, probability. Give how many are refused.

    What is wrong with a row that cannot be answered goes to stderr.
    """
    out = csv.writer(sys.stdout)
    out.writerow(["image", "question", "answer", "probability"])
    started, refused, places = time.perf_counter(), 0, list(rows)
    for first in range(0, len(places), PAIRS_AT_ONCE):
        some = {place: rows[place] for place in places[first : first + PAIRS_AT_ONCE]}
        pairs = {place: pair for place, pair in some.items() if not isinstance(pair, AskError)}
        answered = some | dict(zip(pairs, answer_each(answerer, list(pairs.values())), strict=True))
        for place, given in answered.items():
            if isinstance(given, Exception):
                refused += 1
                print(f"error: {place}: {given}", file=sys.stderr)
            else:
                answer, probability = answerer.top(given)[0]
                out.writerow([*rows[place], answer, f"{probability:.4f}"])
    spent = time.perf_counter() - started
    name_unknown_words(answerer, [pair[1] for pair in rows.values() if not isinstance(pair, AskError)])
    count, rest = len(rows) - refused, f"; {refused} rows refused" if refused else ""
    print(f"{count} answers, {count / spent:.0f} a second{rest}", file=sys.stderr)
    return refused


def answer_each(answerer: Answerer, pairs: list[Pair]) -> list[np.ndarray | Exception]:
    """Probabilities (A,) for each of `pairs`, or why it cannot be answered: together, in halves where one fails."""
    if not pairs:
        return []
    try:
        return list(answerer(pairs))
    except (AskError, ImageError) as error:
        if len(pairs) == 1:
            return [error]
        half = len(pairs) // 2
        return answer_each(answerer, pairs[:half]) + answer_each(answerer, pairs[half:])


def name_unknown_words(answerer: Answerer, questions: Iterable[str]) -> None:
    """Say on stderr which words of `questions` the model never met, if there are any."""
    if unknown := answerer.unknown_words(questions):
        words = ", ".join(f'"{word}"' for word in unknown)
        print(f"note: the model never met {words}", file=sys.stderr)


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
        rows = read_pairs(arguments.pairs) if arguments.pairs else {}
        answerer = load(arguments.model or newest_deployment())
        if rows:
            sys.exit(1 if answer_file(answerer, rows) else 0)
        answer_one(answerer, (arguments.image, arguments.question))
    except (AskError, ImageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
