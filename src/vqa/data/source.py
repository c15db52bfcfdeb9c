"""Data sets. Each module beside this one builds one; `load` splits and serves it.

A data set is two tables for each split. The images' table is memory-mapped Arrow, so that pixels stay on disk until a
batch asks for them. The questions' table is a pandas DataFrame, so that selecting and counting are plain pandas.
Both are kept under a name that holds the content's fingerprint.
"""

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from datasets.arrow_writer import ArrowWriter

from vqa.config import ROOT, ConfigError, DataConfig
from vqa.data.images import ImageError
from vqa.run_folder import RUNS

datasets.disable_progress_bars()

QUESTION_COLUMNS = ["image_id", "question_id", "question", "question_type", "answer"]
NAMED = 5  # bad files that an error names
SILENT_SECONDS = 5  # a scan that is shorter says nothing
READ_AT_ONCE = 256


class SourceError(RuntimeError):
    """Input data that cannot be used; its message names the files and the remedy."""


@dataclass(frozen=True, eq=False)
class Table:
    """The M images of a split and the N questions about them.

    images     one row an image, at least those of the split, with the columns
               image_id (int64), image (uint8, 3 x H x W) and
               caption (list of true sentences about the image; empty where its facts are unknown)
    rows       (M,) which rows of `images` are the split's, in its order
    questions  one row a question, image by image in the order of `rows`: QUESTION_COLUMNS (ids are unique in the
               official split), and `answers`, what ten people answered, where `answer` is only the commonest of them
    """

    images: datasets.Dataset
    rows: np.ndarray
    questions: pd.DataFrame

    @classmethod
    def of(cls, images: datasets.Dataset, questions: pd.DataFrame) -> "Table":
        """The table of all `images`."""
        return cls(images, np.arange(len(images)), questions)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    @property
    def image_ids(self) -> np.ndarray:
        return np.array(self.images["image_id"][:])[self.rows]

    @property
    def captions(self) -> list[list[str]]:
        """The captions of each image."""
        every = self.images["caption"][:]
        return [every[row] for row in self.rows]

    def pixels(self, numbers: np.ndarray) -> np.ndarray:
        """The images with these numbers in the split, (I, 3, H, W) uint8: a copy that the caller may change."""
        return np.stack([self._mapped[row] for row in self.rows[numbers]])

    @cached_property
    def _mapped(self) -> list[np.ndarray]:
        """The pixels of each row of `images`, (3, H, W): views of the mapped file, so nothing is read or copied."""
        shape = self.images.features["image"].shape
        column = self.images.with_format("arrow")[:]["image"]
        flat = [piece.storage.flatten().flatten().flatten() for piece in column.chunks]
        return [image for piece in flat for image in piece.to_numpy(zero_copy_only=True).reshape(-1, *shape)]

    def select(self, numbers: np.ndarray) -> "Table":
        """The images with these numbers, in this order, and their questions."""
        place = pd.Series(np.arange(len(numbers)), self.image_ids[numbers])
        order = self.questions["image_id"].map(place).dropna().sort_values(kind="stable").index
        return Table(self.images, self.rows[numbers], self.questions.loc[order].reset_index(drop=True))

    def thinned(self, fraction: float, seed: int) -> "Table":
        """A random `fraction` of each image's questions, at least one. A smaller fraction is a part of a larger one."""
        generator = np.random.default_rng(seed)
        rows, first = [], 0
        for count in self.questions.groupby("image_id", sort=False).size():
            order = generator.permutation(count)
            rows.extend(first + np.sort(order[: max(round(fraction * count), 1)]))
            first += count
        return replace(self, questions=self.questions.iloc[rows].reset_index(drop=True))

    def captioned(self) -> "Table":
        """The images that have captions, with captions in the place of questions.

        Every image keeps as many as the poorest has, so that all ranks of a step have equally many pairs.
        """
        captions = self.captions
        chosen = np.flatnonzero([len(found) for found in captions])
        fewest = min((len(captions[number]) for number in chosen), default=0)
        texts = [text for number in chosen for text in captions[number][:fewest]]
        ids = np.repeat(self.image_ids[chosen], fewest)
        columns = dict(zip(QUESTION_COLUMNS, (ids, ids, texts, "caption", texts), strict=True))
        return Table(self.images, self.rows[chosen], pd.DataFrame(columns))


@dataclass(frozen=True)
class Source:
    """A data set, split and ready: `splits` has train, validation and test. Its module's FACTS give the last fields."""

    name: str
    fingerprint: str
    splits: dict[str, Table]
    licence: str
    question_types: tuple[str, ...]
    relational_types: tuple[str, ...] = ()  # the question types that compare objects
    expected_blind: float | None = None  # test accuracy in % of the commonest answer to each question, without images
    rarest_answer: int = 1  # how often an answer must be seen in training to be in the vocabulary

    @cached_property
    def answers(self) -> list[str]:
        """The answers seen often enough in training, sorted: the vocabulary of a model trained here."""
        seen = self.splits["train"].questions["answer"].value_counts()
        vocabulary = sorted(seen.index[seen >= self.rarest_answer])
        if not vocabulary:
            raise ConfigError(f"no answer is given {self.rarest_answer} times: raise data.train_images")
        return vocabulary


def image_features(side: int) -> datasets.Features:
    """The columns of an images' table whose images have `side` x `side` pixels."""
    return datasets.Features(
        image_id=datasets.Value("int64"),
        image=datasets.Array3D((3, side, side), "uint8"),
        caption=datasets.List(datasets.Value("string")),
    )


def load(config: DataConfig) -> Source:
    """The data set of `config`, built on first use, with a validation split held out by image.

    Which images are held out depends on `split_seed` alone; the test split is the official one.
    Raises SourceError for damaged input, ConfigError if fewer images exist than are asked for.
    """
    fingerprint, tables = stored(config.source, config.root, config.image_size)
    train, test = tables["train"], tables["test"]
    shuffled = np.random.default_rng(config.split_seed).permutation(len(train))
    held, kept = np.split(shuffled, [config.validation_images])
    if config.train_images is not None:
        kept = kept[: config.train_images]
    if len(kept) < (config.train_images or 1) or len(test) < (config.test_images or 1):
        raise ConfigError(
            f"{config.source} has {len(train)} training and {len(test)} test images: too few for "
            f"data.validation_images {config.validation_images}, data.train_images {config.train_images}, "
            f"data.test_images {config.test_images}"
        )
    if config.test_images is not None:
        test = test.select(np.arange(config.test_images))
    splits = {"train": train.select(np.sort(kept)), "validation": train.select(np.sort(held)), "test": test}
    if config.question_fraction < 1:
        splits["train"] = splits["train"].thinned(config.question_fraction, config.split_seed)
    return Source(config.source, fingerprint, splits, **_module(config.source).FACTS)


def stored(name: str, root: str | None, image_size: int) -> tuple[str, dict[str, Table]]:
    """Fingerprint and official tables of data set `name`, built on first use.

    A data set that lies in files is read from `root`, its images brought to `image_size`. Safe against another process
    that does the same. Raises SourceError for input that cannot be used, or a disk that cannot be written.
    """
    files = (ROOT / root, image_size) if root else ()
    fingerprint = _module(name).fingerprint(*files)
    folder = RUNS / "data" / f"{name}-{fingerprint}" / "tables"
    if not folder.is_dir():
        try:
            _write(folder, lambda scratch: _module(name).build(scratch, *files))
        except OSError as error:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise SourceError(f"cannot build {folder}: {error}") from None
    tables = {}
    for split in ("train", "test"):
        images, questions = (datasets.load_from_disk(folder / split / part) for part in ("images", "questions"))
        tables[split] = Table.of(images, questions.to_pandas())
    return fingerprint, tables


def _module(name: str):
    """The module of a data set: FACTS (see Source), fingerprint(root, image_size), build(scratch, root, image_size).

    The two functions go without the last two arguments where a data set needs no files of the user's.
    """
    return importlib.import_module(f"vqa.data.{name}")


def _write(folder: Path, build: Callable[[Path], dict[str, Table]]) -> None:
    """Fill `folder` with the tables, whole or not at all. `build` gets a place for what memory cannot hold."""
    place = folder.parent.parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.parent.name}.", dir=place) as scratch:
        made = Path(scratch) / "tables"
        for split, table in build(Path(scratch)).items():
            table.images.save_to_disk(made / split / "images")
            questions = datasets.Dataset.from_pandas(table.questions, preserve_index=False)
            questions.save_to_disk(made / split / "questions")
        folder.parent.mkdir(exist_ok=True)
        os.rename(made, folder)


def read_images(paths: Sequence[Path], read: Callable[[Path], np.ndarray], remedy: str) -> Iterator[np.ndarray]:
    """What `read` makes of each of `paths`, in order, several threads at work and few images in memory.

    If `read` raises ImageError for any, all others are still looked at; then one SourceError names the
    first bad ones, their number and the `remedy`. So nobody gets a table that lacks images.
    """
    bad: list[Path] = []
    total, started = len(paths), time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for first in range(0, total, READ_AT_ONCE):
            some = paths[first : first + READ_AT_ONCE]
            for path, image in zip(some, threads.map(lambda path: _unless_bad(read, path), some), strict=True):
                if image is None:
                    bad.append(path)
                elif not bad:
                    yield image
            done, spent = first + len(some), time.monotonic() - started
            tenths = 10 * done // total
            if tenths > 10 * first // total and spent >= SILENT_SECONDS:  # plain lines, which read well in a log
                counted = f"{done:,} of {total:,}" + (f", {len(bad):,} bad" if bad else "")
                left = spent * (total - done) / done
                print(f"images read: {10 * tenths:>3} % ({counted}), {left:.0f} s to go", flush=True)
    if bad:
        names = ", ".join(str(path) for path in bad[:NAMED]) + (" …" if len(bad) > NAMED else "")
        raise SourceError(f"{len(bad)} of {total} images are missing, damaged or too large ({names}): {remedy}")


def _unless_bad(read: Callable[[Path], np.ndarray], path: Path) -> np.ndarray | None:
    try:
        return read(path)
    except ImageError:
        return None


def write_table(rows: Iterable[dict], features: datasets.Features, path: Path) -> datasets.Dataset:
    """The table of `rows`, which may be more than fit in memory, by way of the new file `path`."""
    with ArrowWriter(path=str(path), features=features, writer_batch_size=100) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    return datasets.Dataset.from_file(str(path))
