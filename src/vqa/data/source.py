"""Data sets. Each module here builds one table; `load` splits and serves it.

A table is a `datasets.Dataset` with one row an image, so that an image is stored once:

    image_id       int64
    image          uint8 (3, H, W)
    question_id    list of int64, unique in the split
    question       list of string
    question_type  list of string
    answer         list of string
    caption        list of string: true sentences about the image; empty where its facts are unknown
    answers        list of lists of 10 strings, what people answered; only where `answer` is but the commonest of them

It lives on disk as memory-mapped Arrow under a name that holds the content's fingerprint.
"""

import importlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from vqa.config import ROOT, ConfigError, DataConfig
from vqa.data.images import ImageError
from vqa.run_folder import RUNS

datasets.disable_progress_bars()


PAIR_COLUMNS = ("question_id", "question", "question_type", "answer")
SIDES = {"left_right": 1, "top_bottom": 2}  # question types whose yes and no trade places in a mirrored image, by view
NAMED = 5  # bad files that an error names
SILENT_SECONDS = 5  # a scan that is shorter says nothing
READ_AT_ONCE = 256


class SourceError(RuntimeError):
    """Input data that cannot be used; its message names the files and the remedy."""


@dataclass(frozen=True)
class Source:
    """A data set, split and ready: `splits` has train, validation and test."""

    name: str
    licence: str
    fingerprint: str
    splits: dict[str, datasets.Dataset]
    rarest_answer: int = 1  # how often an answer must be seen in training to be in the vocabulary

    @cached_property
    def answers(self) -> list[str]:
        """The answers seen often enough in training, sorted: the vocabulary of a model trained here."""
        seen = Counter(answer for row in self.splits["train"]["answer"] for answer in row)
        kept = sorted(answer for answer, count in seen.items() if count >= self.rarest_answer)
        if not kept:
            raise ConfigError(f"no answer is given {self.rarest_answer} times: raise data.train_images")
        return kept


def table_features(height: int, width: int) -> datasets.Features:
    text = datasets.List(datasets.Value("string"))
    return datasets.Features(
        image_id=datasets.Value("int64"),
        image=datasets.Array3D((3, height, width), "uint8"),
        question_id=datasets.List(datasets.Value("int64")),
        question=text,
        question_type=text,
        answer=text,
        caption=text,
    )


def pairs(table: datasets.Dataset) -> pd.DataFrame:
    """One row a question: image_id, the PAIR_COLUMNS, and `answers` where the table has them."""
    columns = _pair_columns(table)
    frame = table.select_columns(["image_id", *columns]).to_pandas()
    return frame.explode(columns, ignore_index=True)


def _pair_columns(table: datasets.Dataset) -> list[str]:
    return [*PAIR_COLUMNS, *({"answers"} & set(table.column_names))]


def captions(table: datasets.Dataset) -> datasets.Dataset:
    """`table` with captions in the place of questions; without images that have none.

    Every image keeps as many as the poorest has, so that all ranks of a step have equally many pairs.
    """
    chosen = table.select([row for row, found in enumerate(table["caption"]) if found])
    fewest = min(map(len, chosen["caption"]), default=0)
    texts = [found[:fewest] for found in chosen["caption"]]
    columns = {
        "question_id": [[image] * len(found) for image, found in zip(chosen["image_id"], texts, strict=True)],
        "question": texts,
        "question_type": [["caption"] * len(found) for found in texts],
        "answer": texts,
    }
    return _with_columns(chosen.remove_columns(list(set(_pair_columns(table)) - set(columns))), columns)


def load(config: DataConfig) -> Source:
    """The data set of `config`, built on first use, with a validation split held out by image.

    Which images are held out depends on `split_seed` alone; the test split is the official one.
    Raises SourceError for damaged input, ConfigError if fewer images exist than are asked for.
    """
    module = importlib.import_module(f"vqa.data.{config.source}")
    fingerprint, tables = stored(config.source, config.root)
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
        test = test.select(range(config.test_images))
    kept = _thinned(train.select(np.sort(kept)), config.question_fraction, config.split_seed)
    splits = {"train": kept, "validation": train.select(np.sort(held)), "test": test}
    return Source(config.source, module.LICENCE, fingerprint, splits, getattr(module, "RAREST_ANSWER", 1))


def stored(name: str, root: str | None = None) -> tuple[str, datasets.DatasetDict]:
    """Fingerprint and tables of data set `name`, built on first use, from the files in `root` if it needs any."""
    module = importlib.import_module(f"vqa.data.{name}")
    files = ROOT / root if root else None
    fingerprint = module.fingerprint(files) if files else module.fingerprint()
    folder = RUNS / "data" / f"{name}-{fingerprint}"
    return fingerprint, _stored(folder, lambda scratch: module.build(files, scratch) if files else module.build())


def _thinned(table: datasets.Dataset, fraction: float, seed: int) -> datasets.Dataset:
    """`table` with a random `fraction` of each image's questions, at least one; smaller ones are part of larger."""
    if fraction == 1:
        return table
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(asked)) for asked in table["question_id"]]
    chosen = [np.sort(order[: max(round(fraction * len(order)), 1)]) for order in orders]
    columns = {
        name: [[row[i] for i in kept] for row, kept in zip(table[name], chosen, strict=True)]
        for name in _pair_columns(table)
    }
    return _with_columns(table, columns)


def _with_columns(table: datasets.Dataset, columns: dict[str, list]) -> datasets.Dataset:
    """`table` with other values in `columns`. Its images stay where they are on disk, whatever was selected.

    (`Dataset.add_column` would first write a copy of all that is selected.)
    """
    data, selected = table.data.table, table._indices
    rows = range(len(table)) if selected is None else selected.column(0).to_pylist()
    for name, values in columns.items():
        whole = [None] * len(data)
        for row, value in zip(rows, values, strict=True):
            whole[row] = value
        place, kind = data.schema.get_field_index(name), data.schema.field(name)
        data = data.set_column(place, kind, [pa.array(whole, type=kind.type)])
    unique = generate_random_fingerprint()
    return datasets.Dataset(InMemoryTable(data), table.info, table.split, selected, unique)


def _stored(folder: Path, build: Callable[[Path], datasets.DatasetDict]) -> datasets.DatasetDict:
    """The tables in `folder`, built first if it is not there. Safe against another process doing the same.

    `build` gets a folder for what it must not hold in memory; it is gone afterwards.
    """
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
                build(Path(scratch)).save_to_disk(Path(scratch) / "tables")
                os.rename(Path(scratch) / "tables", folder)
        except OSError as error:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise SourceError(f"cannot build {folder}: {error}") from None
    return datasets.load_from_disk(folder)


def read_images(paths: Sequence[Path], read: Callable[[Path], np.ndarray], remedy: str) -> Iterator[np.ndarray]:
    """What `read` makes of each of `paths`, in order, several threads at work and few images in memory.

    If `read` raises ImageError for any, all others are still looked at; then one SourceError names the
    first bad ones, their number and the `remedy`. So nobody gets a table that lacks images.
    """
    bad: list[Path] = []
    progress = _Progress(len(paths))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for first in range(0, len(paths), READ_AT_ONCE):
            some = paths[first : first + READ_AT_ONCE]
            for path, image in zip(some, threads.map(lambda path: _unless_bad(read, path), some), strict=True):
                if image is None:
                    bad.append(path)
                elif not bad:
                    yield image
            progress.say(first + len(some), len(bad))
    if bad:
        names = ", ".join(str(path) for path in bad[:NAMED]) + (" …" if len(bad) > NAMED else "")
        raise SourceError(f"{len(bad)} of {len(paths)} images are missing, damaged or too large ({names}): {remedy}")


def _unless_bad(read: Callable[[Path], np.ndarray], path: Path) -> np.ndarray | None:
    try:
        return read(path)
    except ImageError:
        return None


class _Progress:
    """A line for every tenth of a scan, as plain text that reads well in a log."""

    def __init__(self, total: int):
        self.total, self.tenths, self.started = total, 0, time.monotonic()

    def say(self, done: int, bad: int) -> None:
        spent, tenths = time.monotonic() - self.started, 10 * done // self.total
        if tenths == self.tenths or spent < SILENT_SECONDS:
            return
        self.tenths, left = tenths, spent * (self.total - done) / done
        found = f", {bad:,} bad" if bad else ""
        print(f"images read: {10 * tenths:>3} % ({done:,} of {self.total:,}{found}), {left:.0f} s to go", flush=True)


def write_table(rows: Iterable[dict], features: datasets.Features, path: Path) -> datasets.Dataset:
    """The table of `rows`, which may be more than fit in memory, by way of the new file `path`."""
    with ArrowWriter(path=str(path), features=features, writer_batch_size=100) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    return datasets.Dataset.from_file(str(path))
