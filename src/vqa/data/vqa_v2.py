"""VQA v2: open questions about photographs, each answered by ten people, in its official files.

    python -m vqa.data.vqa_v2 FOLDER

unpacks the official archives that lie in FOLDER and builds the tables from what came out. Questions
and answers are of Goyal et al. 2017 (https://arxiv.org/abs/1612.00837), images and captions of COCO
(https://arxiv.org/abs/1405.0312). Answers to the official test questions are not public, so the
official validation split is the test split here, as in much of the literature; the study's own
validation images are held out of the official training split.

The answer to be learned is the commonest of the ten, `multiple_choice_answer`; answers are judged by
all ten (vqa.evaluation.vqa_accuracy).
"""

import argparse
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from vqa.data.images import read_image
from vqa.data.source import QUESTION_COLUMNS, SourceError, Table, image_features, read_images, stored, write_table

FACTS = {
    "licence": "CC BY 4.0 (annotations); images under their owners' terms on Flickr",
    "question_types": ("yes_no", "number", "other"),
    # Teney et al. 2018, https://arxiv.org/abs/1708.02711, section 3; 3,129 answers if our test split counts
    "rarest_answer": 9,
}
OFFICIAL = {"train": "train2014", "test": "val2014"}
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
CAPTIONS = "annotations/captions_train2014.json"  # only training looks at captions
EXPECTED = [
    *(name.format(split) for split in OFFICIAL.values() for name in (QUESTIONS, ANNOTATIONS, "{}")),
    CAPTIONS,
]
REMEDY = (
    "get the training and validation archives of https://visualqa.org/download.html and of 2014 from "
    "https://cocodataset.org/#download, and unpack them there with python -m vqa.data.vqa_v2 "
)


def fingerprint(root: Path, image_size: int) -> str:
    """Sixteen hex digits over every byte of questions, answers and captions, and every image's name and size.

    (All bytes of 19 GB of images would take longer than they are worth at every start.)
    Raises SourceError naming what is missing.
    """
    missing = [name for name in EXPECTED if not (root / name).exists()]
    if missing:
        raise SourceError(f"{root} lacks {', '.join(missing)}: {REMEDY}{root}")
    digest = hashlib.sha256(f"{image_size}".encode())
    for name in EXPECTED:
        if (root / name).is_dir():  # of images; other files in it, like macOS's .DS_Store, do not count
            sizes = sorted((path.name, path.stat().st_size) for path in (root / name).glob("COCO_*.jpg"))
            digest.update(json.dumps([name, sizes]).encode())
        else:
            with (root / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def build(scratch: Path, root: Path, image_size: int) -> dict[str, Table]:
    """The train and test tables, their images written one by one into `scratch`, stretched to squares of `image_size`.

    Raises SourceError naming missing or damaged files.
    """
    return {split: _table(root, split, image_size, scratch) for split in OFFICIAL}


def _table(root: Path, split: str, image_size: int, scratch: Path) -> Table:
    """The images that have questions, in the order of their numbers."""
    official = OFFICIAL[split]
    questions = _questions(root / QUESTIONS.format(official), root / ANNOTATIONS.format(official))
    captions = _read(root / CAPTIONS, _captions) if split == "train" else {}
    ids = questions["image_id"].unique().tolist()
    paths = [root / official / f"COCO_{official}_{image_id:012d}.jpg" for image_id in ids]
    images = read_images(paths, lambda path: read_image(path, image_size), f"{REMEDY}{root}")
    rows = (
        {"image_id": image_id, "image": image, "caption": captions.get(image_id, [])}
        for image_id, image in zip(ids, images, strict=True)
    )
    return Table.of(write_table(rows, image_features(image_size), scratch / f"{split}.arrow"), questions)


def _questions(asked: Path, annotated: Path) -> pd.DataFrame:
    """A split's table of questions from its two official files, by image number, then in the order of the file."""
    questions, annotations = _read(asked, _asked), _read(annotated, _annotated)
    for path, frame in ((asked, questions), (annotated, annotations)):
        if (twice := frame["question_id"].duplicated()).any():
            raise SourceError(f"{path} has question_id {frame['question_id'][twice].iloc[0]} twice: unpack it again")
    alone = ~questions["question_id"].isin(annotations["question_id"])
    if alone.any():
        first = questions["question_id"][alone].iloc[0]
        raise SourceError(
            f"{annotated} has no answers to {alone.sum():,} of the {len(alone):,} questions in {asked} (the first is "
            f"question_id {first}): unpack both again"
        )
    joined = questions.merge(annotations, on="question_id")
    return joined.sort_values("image_id", kind="stable", ignore_index=True)[[*QUESTION_COLUMNS, "answers"]]


def _asked(content: dict) -> pd.DataFrame:
    rows = [(int(each["image_id"]), int(each["question_id"]), _text(each["question"])) for each in content["questions"]]
    return pd.DataFrame(rows, columns=["image_id", "question_id", "question"])


def _annotated(content: dict) -> pd.DataFrame:
    rows = [
        (
            int(each["question_id"]),
            each["answer_type"].replace("/", "_"),  # yes_no | number | other
            _text(each["multiple_choice_answer"]),
            [_text(answer) for answer in each["answers"]],
        )
        for each in content["annotations"]
    ]
    return pd.DataFrame(rows, columns=["question_id", "question_type", "answer", "answers"])


def _text(value: object) -> str:
    """A question or an answer. Some tools write the answer 2 as a number. Raises TypeError for what has no text."""
    if not isinstance(value, str | int | float):
        raise TypeError(f"{value!r} is no text")
    return str(value)


def _captions(content: dict) -> dict[int, list[str]]:
    """Every caption by image id, in the order of their ids. (Alignment takes the first.)"""
    found = defaultdict(list)
    for each in sorted(content["annotations"], key=lambda each: each["id"]):
        found[each["image_id"]].append(" ".join(each["caption"].split()))
    return found


def _read(path: Path, form: Callable[[dict], Any]) -> Any:
    """What `form` makes of the JSON in `path`. Raises SourceError for damage and for another form.

    Of each of the ten answers only its words are kept, as four million dicts would fill the memory.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=lambda read: read["answer"] if "answer_id" in read else read)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{path} cannot be read, unpack it again: {error}") from None
    try:
        return form(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{path} is not in the official form: {error!r}") from None


def unpack(root: Path) -> None:
    """Unpack every zip archive in `root` beside it, where archives may share folders; those unpacked before stay as is.

    An archive is checked whole before any of its files comes into place. Raises SourceError for a damaged archive, for
    one that reaches outside `root`, and for one whose file is there already and differs.
    """
    for path in sorted(path for path in root.glob("*.zip") if not path.name.startswith(".")):
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                missing = _missing(members, root)
                if missing:
                    _unpack(archive, missing, root)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise SourceError(f"{path} cannot be unpacked: {error}") from None
        print(f"{path.name}: {len(members):,} files" if missing else f"{path.name}: unpacked before", flush=True)


def _missing(members: list[zipfile.ZipInfo], root: Path) -> list[zipfile.ZipInfo]:
    """Those of `members` that are not in `root` yet. Raises BadZipFile or OSError if they should not come there."""
    missing = []
    for member in members:
        place, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
        outside = place.is_absolute() or ".." in place.parts or set("\\:") & set(member.filename)
        if outside or kind not in (0, stat.S_IFREG):
            raise zipfile.BadZipFile(f"it holds {member.filename!r}, which is no plain file below its folder")
        target = root / place
        if not target.exists():
            missing.append(member)
        elif not target.is_file() or target.stat().st_size != member.file_size:
            raise FileExistsError(f"{target} is there and differs; move it away")
    size, free = sum(member.file_size for member in missing), shutil.disk_usage(root).free
    if size > free:
        raise OSError(f"it takes {size / 2**30:,.1f} GiB unpacked, and {free / 2**30:,.1f} GiB are free")
    return missing


def _unpack(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], root: Path) -> None:
    """Into a folder of its own first, which checks every byte; then file by file into place."""
    with tempfile.TemporaryDirectory(prefix=".unpacking.", dir=root) as scratch:
        archive.extractall(scratch, members)
        for member in members:
            (root / member.filename).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(scratch, member.filename), root / member.filename)


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack the official archives of VQA v2 and build its tables.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=224, help="data.image_size of the profile to be run (224)")
    arguments = parser.parse_args()
    root = arguments.folder.resolve()
    try:
        unpack(root)
        fingerprint, tables = stored("vqa_v2", str(root), arguments.image_size)
    except SourceError as error:
        sys.exit(f"error: {error}")
    sizes = ", ".join(f"{len(table):,} images to {split}" for split, table in tables.items())
    print(f"vqa_v2-{fingerprint}: {sizes}")


if __name__ == "__main__":
    main()
