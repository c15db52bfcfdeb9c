"""Data sets. Each module here builds one table; `load` splits and serves it.

A table is a `datasets.Dataset` with one row an image, so that an image is stored once:

    image_id       int64
    image          uint8 (3, H, W)
    question_id    list of int64, unique in the split
    question       list of string
    question_type  list of string
    answer         list of string
    caption        list of string: true sentences about the image; empty where its facts are unknown

It lives on disk as memory-mapped Arrow under a name that holds the content's fingerprint.
"""

import importlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd

from vqa.config import ConfigError, DataConfig
from vqa.runs import RUNS

datasets.disable_progress_bars()

PAIR_COLUMNS = ("question_id", "question", "question_type", "answer")
SIDES = {"left_right": 1, "top_bottom": 2}  # question types whose yes and no trade places in a mirrored image, by view


class SourceError(RuntimeError):
    """Input data that cannot be used; its message names the files and the remedy."""


@dataclass(frozen=True)
class Source:
    """A data set, split and ready: `splits` has train, validation and test."""

    name: str
    licence: str
    fingerprint: str
    splits: dict[str, datasets.Dataset]

    @property
    def answers(self) -> list[str]:
        """The answers seen in training, sorted: the vocabulary of a model trained here."""
        return sorted(set(pairs(self.splits["train"])["answer"]))


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
    """One row a question: image_id and the PAIR_COLUMNS."""
    frame = table.select_columns(["image_id", *PAIR_COLUMNS]).to_pandas()
    return frame.explode(list(PAIR_COLUMNS), ignore_index=True)


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
    bare = chosen.remove_columns(list(columns))
    for name, values in columns.items():
        bare = bare.add_column(name, values)
    return bare


def load(config: DataConfig) -> Source:
    """The data set of `config`, built on first use, with a validation split held out by image.

    Which images are held out depends on `split_seed` alone; the test split is the official one.
    Raises SourceError for damaged input, ConfigError if fewer images exist than are asked for.
    """
    module = importlib.import_module(f"vqa.sources.{config.source}")
    fingerprint = module.fingerprint()
    tables = _stored(RUNS / "data" / f"{config.source}-{fingerprint}", module.build)
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
    return Source(config.source, module.LICENCE, fingerprint, splits)


def _thinned(table: datasets.Dataset, fraction: float, seed: int) -> datasets.Dataset:
    """`table` with a random `fraction` of each image's questions, at least one; smaller ones are part of larger."""
    if fraction == 1:
        return table
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(asked)) for asked in table["question_id"]]
    chosen = [np.sort(order[: max(round(fraction * len(order)), 1)]) for order in orders]
    thin = table.remove_columns(list(PAIR_COLUMNS))
    for name in PAIR_COLUMNS:
        thin = thin.add_column(name, [[row[i] for i in kept] for row, kept in zip(table[name], chosen, strict=True)])
    return thin


def _stored(folder: Path, build) -> datasets.DatasetDict:
    """The tables in `folder`, built first if it is not there. Safe against another process doing the same."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            build().save_to_disk(temporary)
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return datasets.load_from_disk(folder)
