"""easy-VQA: one coloured shape on a 64 x 64 image, questions about its shape and colour.

The official data, as shipped in the PyPI package `easy-vqa` (Victor Zhou, 2019,
https://github.com/vzhou842/easy-VQA): 4,000 training and 1,000 test images.
"""

import hashlib
import json
from pathlib import Path

import datasets
import easy_vqa
import numpy as np
import pandas as pd

from vqa.data.images import ImageError, decode
from vqa.data.source import QUESTION_COLUMNS, Table, image_features, read_images

FACTS = {
    "licence": "MIT",
    "question_types": ("shape", "color", "yes_no", "yes_no_negated"),
    "expected_blind": 67.0,
}
SIDE = 64
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}


def package_data() -> Path:
    return Path(easy_vqa.__file__).parent / "data"


def fingerprint(root: Path | None = None) -> str:
    """Sixteen hex digits over every byte of the questions and images."""
    root = root or package_data()
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.json")) + sorted(root.rglob("*.png")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(scratch: Path, root: Path | None = None) -> dict[str, Table]:
    """The official train and test tables, made in memory. Raises SourceError naming missing or damaged images."""
    root = root or package_data()
    return {split: _table(root / split) for split in ("train", "test")}


def question_type(question: str, answer: str) -> str:
    """shape | color | yes_no | yes_no_negated, the four kinds of question in the data."""
    if answer in ("yes", "no"):
        negated = {"not", "no"} & set(question.rstrip("?").split())
        return "yes_no_negated" if negated else "yes_no"
    return "color" if answer in COLOURS else "shape"


def caption(questions: list[str], answers: list[str]) -> list[str]:
    """["a blue circle"], or nothing where an image's questions do not give away both facts.

    A fact counts when an answer names it, when it is asked about as given ("what is the blue
    shape?"), or when a yes/no question confirms it.
    """
    facts = set()
    for question, answer in zip(questions, answers, strict=True):
        words = set(question.rstrip("?").split())
        denied = answer in ("yes", "no") and (answer == "yes") == bool({"not", "no"} & words)
        facts |= {answer} if denied else {answer} | words
    colour, shape = facts & COLOURS, facts & SHAPES
    return [f"a {colour.pop()} {shape.pop()}"] if colour and shape else []


def _table(folder: Path) -> Table:
    asked = pd.DataFrame(
        json.loads((folder / "questions.json").read_text()), columns=["question", "answer", "image_id"]
    )
    asked["question_id"] = np.arange(len(asked))
    asked["question_type"] = [question_type(*row) for row in zip(asked["question"], asked["answer"], strict=True)]
    questions = asked.sort_values("image_id", kind="stable", ignore_index=True)[QUESTION_COLUMNS]
    of_image = questions.groupby("image_id")[["question", "answer"]].agg(list)
    paths = [folder / "images" / f"{image_id}.png" for image_id in of_image.index]
    columns = {
        "image_id": of_image.index.tolist(),
        "image": list(read_images(paths, _read, "reinstall the package easy-vqa")),
        "caption": [caption(*row) for row in of_image.itertuples(index=False)],
    }
    return Table.of(datasets.Dataset.from_dict(columns, image_features(SIDE)), questions)


def _read(path: Path) -> np.ndarray:
    """An image as uint8 (3, 64, 64). Raises ImageError if it is not of that size, or none."""
    image = decode(path)
    if image.size != (SIDE, SIDE):
        raise ImageError(f"{path} has {image.width} x {image.height} pixels, not {SIDE} x {SIDE}")
    return np.asarray(image).transpose(2, 0, 1)
