"""VQA v2: open questions about photographs, each answered by ten people, in its official files.

    python -m vqa.data.vqa_v2 FOLDER

unpacks the official archives that lie in FOLDER and builds the table from what came out. Questions
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
import stat
import sys
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import datasets
import numpy as np

from vqa.data.images import read_image
from vqa.data.source import SourceError, read_images, stored, table_features, write_table

LICENCE = "CC BY 4.0 (annotations); images under their owners' terms on Flickr"
SIDE = 224  # as the public weights of all towers of `base` read it, so that a batch is not resampled once more
RAREST_ANSWER = (
    9  # Teney et al. 2018, https://arxiv.org/abs/1708.02711, section 3; 3,129 answers if our test split counts
)
MAX_UNPACKED = 64 * 2**30  # bytes of an archive; train2014.zip, the largest, has 13 GB
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


def fingerprint(root: Path) -> str:
    """Sixteen hex digits over every byte of questions, answers and captions, and every image's name and size.

    (All bytes of 19 GB of images would take longer than they are worth at every start.)
    Raises SourceError naming what is missing.
    """
    _check(root)
    digest = hashlib.sha256(f"{SIDE}".encode())
    for name in EXPECTED:
        if (root / name).is_dir():
            sizes = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(root / name))
            digest.update(json.dumps([name, sizes]).encode())
        else:
            with (root / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def build(root: Path, scratch: Path) -> datasets.DatasetDict:
    """The train and test tables, written row by row by way of `scratch`.

    Raises SourceError naming missing or damaged files.
    """
    features = table_features(SIDE, SIDE)
    features["answers"] = datasets.List(datasets.List(datasets.Value("string")))
    return datasets.DatasetDict(
        {split: write_table(_rows(root, split), features, scratch / f"{split}.arrow") for split in OFFICIAL}
    )


def _check(root: Path) -> None:
    missing = [name for name in EXPECTED if not (root / name).exists()]
    if missing:
        raise SourceError(f"{root} lacks {', '.join(missing)}: {REMEDY}{root}")


def _rows(root: Path, split: str) -> Iterator[dict]:
    """A row of the table for each image that has questions, in the order of their numbers."""
    official = OFFICIAL[split]
    asked = _asked(root, official)
    captions = _captions(root / CAPTIONS) if split == "train" else {}
    paths = [root / official / f"COCO_{official}_{image_id:012d}.jpg" for image_id in asked]
    images = read_images(paths, _read, f"{REMEDY}{root}")
    for (image_id, pairs), image in zip(asked.items(), images, strict=True):
        question_id, question, question_type, answer, answers = map(list, zip(*pairs, strict=True))
        yield {
            "image_id": image_id,
            "image": image,
            "question_id": question_id,
            "question": question,
            "question_type": question_type,
            "answer": answer,
            "caption": captions.get(image_id, []),
            "answers": answers,
        }


def _read(path: Path) -> np.ndarray:
    return read_image(path, SIDE)


def _asked(root: Path, official: str) -> dict[int, list[tuple]]:
    """For each image id, in order, its (question_id, question, question_type, answer, answers)."""
    paths = [root / name.format(official) for name in (ANNOTATIONS, QUESTIONS)]
    annotations, questions = map(_load, paths)
    found = defaultdict(list)
    try:
        annotated = {each["question_id"]: each for each in annotations["annotations"]}
        for each in questions["questions"]:
            said = annotated[each["question_id"]]
            kind = said["answer_type"].replace("/", "_")  # yes_no | number | other
            found[each["image_id"]].append(
                (each["question_id"], each["question"], kind, said["multiple_choice_answer"], said["answers"])
            )
    except (KeyError, TypeError) as error:
        raise SourceError(f"{paths[0]} and {paths[1]} are not in the official form: {error!r}") from None
    return dict(sorted(found.items()))


def _captions(path: Path) -> dict[int, list[str]]:
    """Every caption by image id, in the order of the file. (Alignment takes the first.)"""
    captions, found = _load(path), defaultdict(list)
    try:
        for each in sorted(captions["annotations"], key=lambda each: each["id"]):
            found[each["image_id"]].append(" ".join(each["caption"].split()))
    except (KeyError, TypeError) as error:
        raise SourceError(f"{path} is not in the official form: {error!r}") from None
    return found


def _load(path: Path) -> dict:
    """The JSON in `path`; of each of the ten answers only its words, as four million dicts fill a memory."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file, object_hook=lambda read: read["answer"] if "answer_id" in read else read)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{path} cannot be read, unpack it again: {error}") from None


def unpack(root: Path) -> None:
    """Unpack every zip archive in `root` beside it, each whole or not at all; those unpacked before are passed over.

    Raises SourceError for a damaged archive, and for one that holds anything but plain files below `root`.
    """
    for path in sorted(root.glob("*.zip")):
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                _check_members(path, members)
                if all(_unpacked(root, member) for member in members):
                    print(f"{path.name}: unpacked before", flush=True)
                else:
                    _unpack(archive, members, root)
                    print(f"{path.name}: {len(members):,} files", flush=True)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise SourceError(f"{path} cannot be unpacked: {error}") from None


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        place, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
        outside = (
            not place.parts
            or place.is_absolute()
            or ".." in place.parts
            or "\\" in member.filename
            or ":" in place.parts[0]
        )
        if outside or kind not in (0, stat.S_IFREG):
            raise SourceError(
                f"{path} holds {member.filename!r}, which is no plain file below its folder: not unpacked"
            )
    if (size := sum(member.file_size for member in members)) > MAX_UNPACKED:
        raise SourceError(f"{path} would take {size / 2**30:.0f} GiB unpacked: not unpacked")


def _unpacked(root: Path, member: zipfile.ZipInfo) -> bool:
    target = root / member.filename
    return target.is_file() and target.stat().st_size == member.file_size


def _unpack(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], root: Path) -> None:
    """Into a folder of its own first; what stands at the top of the archive is then renamed into place."""
    with tempfile.TemporaryDirectory(prefix=".unpacking.", dir=root) as scratch:
        archive.extractall(scratch, members)
        for entry in Path(scratch).iterdir():
            if (root / entry.name).is_dir():  # left by somebody else, and not what the archive holds
                raise FileExistsError(f"{root / entry.name} is there and differs; move it away")
            os.replace(entry, root / entry.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack the official archives of VQA v2 and build its table.")
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder.resolve()
    try:
        unpack(root)
        fingerprint, tables = stored("vqa_v2", str(root))
    except SourceError as error:
        sys.exit(f"error: {error}")
    sizes = ", ".join(f"{len(table):,} images to {split}" for split, table in tables.items())
    print(f"vqa_v2-{fingerprint}: {sizes}")


if __name__ == "__main__":
    main()
