"""From tables to batches in which each image and each distinct question stands once.

A batch scores N pairs but encodes only I images and U questions; index maps say which go together.
On easy-VQA an image has 9.6 questions and a split only 107 distinct ones, so this is most of the
speed of the study.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torchvision.transforms.v2 import functional as vision

from vqa.data.processor import Processor
from vqa.data.source import Table

SIDES = {"left_right": 1, "top_bottom": 2}  # question types whose yes and no trade places in a mirrored image, by view
VIEWS = np.array([[False, False], [True, False], [False, True], [True, True]])  # all flips, by Batch.view
UNKNOWN_ANSWER = -1  # label of an answer outside the vocabulary: never predicted, so always wrong


@dataclass(frozen=True)
class Batch:
    """I images, U distinct questions of T tokens, N pairs of them."""

    pixel_values: torch.Tensor  # (I, 3, H, W) uint8
    image_index: torch.Tensor  # (N,) which image each pair is about
    input_ids: torch.Tensor  # (U, T)
    attention_mask: torch.Tensor  # (U, T)
    question_index: torch.Tensor  # (N,) which question each pair asks
    question_number: torch.Tensor  # (U,) the number of each question among the split's distinct ones
    labels: torch.Tensor  # (N,)
    image_number: torch.Tensor  # (I,) the number of each image in the split
    view: torch.Tensor  # (I,) which of the VIEWS is shown: 1 for left-right + 2 for top-bottom mirrored
    pair_number: torch.Tensor  # (N,) the number of each pair in the split

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return Batch(**moved)

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model's forward takes."""
        names = ("pixel_values", "image_index", "input_ids", "attention_mask", "question_index")
        return {name: getattr(self, name) for name in names}

    def ungrouped(self) -> "Batch":
        """The same pairs with every image and question repeated for each: what most VQA code trains on."""
        each = torch.arange(len(self))
        return Batch(
            self.pixel_values[self.image_index],
            each,
            self.input_ids[self.question_index],
            self.attention_mask[self.question_index],
            each,
            self.question_number[self.question_index],
            self.labels,
            self.image_number[self.image_index],
            self.view[self.image_index],
            self.pair_number,
        )


class Split:
    """A table as arrays: its questions tokenised once, its images left where they are on disk."""

    def __init__(self, table: Table, processor: Processor):
        self.table, self.processor = table, processor
        self.frame = table.questions  # one row a pair, in table order
        counts = self.frame.groupby("image_id", sort=False).size().to_numpy()
        self.first_pair = np.concatenate([[0], np.cumsum(counts)])  # (M + 1,) of M images
        distinct, self.question_of = np.unique(self.frame["question"].to_numpy(str), return_inverse=True)
        self.input_ids, self.attention_mask = map(torch.from_numpy, processor.encode(distinct.tolist()))
        label = {answer: index for index, answer in enumerate(processor.answers)}
        self.label_of = np.array([label.get(answer, UNKNOWN_ANSWER) for answer in self.frame["answer"]])
        self.side_of = self.frame["question_type"].map(SIDES).fillna(0).to_numpy(int)  # 0: mirroring changes no answer
        opposite = {"yes": "no", "no": "yes"}
        turned = [label.get(opposite.get(answer, answer), UNKNOWN_ANSWER) for answer in processor.answers]
        self.opposite_of = np.array([*turned, UNKNOWN_ANSWER])  # by label; the last is the unknown answer's own

    def __len__(self) -> int:
        """The number of images."""
        return len(self.first_pair) - 1

    def pairs_of(self, images: np.ndarray) -> np.ndarray:
        """The pair numbers (rows of `frame`) that belong to `images`, image by image."""
        return np.concatenate([np.arange(self.first_pair[i], self.first_pair[i + 1]) for i in images])

    def batch(self, images: np.ndarray, flips: np.ndarray | None = None) -> Batch:
        """The batch of `images` (numbers in table order) with all their questions.

        `flips` (I, 2) of bool mirrors an image left-right and top-bottom, and with it the answers that ask for sides.
        """
        rows = self.pairs_of(images)
        counts = self.first_pair[images + 1] - self.first_pair[images]
        questions, question_index = np.unique(self.question_of[rows], return_inverse=True)
        mask = self.attention_mask[questions]
        longest = int(mask.sum(1).max())
        pixels, labels = torch.from_numpy(self.table.pixels(images)), self.label_of[rows]
        view = np.zeros(len(images), int)
        if flips is not None:
            view = flips @ [1, 2]
            labels = np.where(self.side_of[rows] & np.repeat(view, counts), self.opposite_of[labels], labels)
            pixels[flips[:, 0]] = pixels[flips[:, 0]].flip(-1)
            pixels[flips[:, 1]] = pixels[flips[:, 1]].flip(-2)
        if pixels.shape[-1] != (size := self.processor.image_size):
            pixels = vision.resize(pixels, [size, size], antialias=True)
        return Batch(
            pixels,
            torch.from_numpy(np.repeat(np.arange(len(images)), counts)),
            self.input_ids[questions, :longest],
            mask[:, :longest],
            torch.from_numpy(question_index),
            torch.from_numpy(questions),
            torch.from_numpy(labels),
            torch.from_numpy(images),
            torch.from_numpy(view),
            torch.from_numpy(rows),
        )


@dataclass(frozen=True)
class EpochPlan:
    """The order of an epoch's images and their flips. The same on every rank, whatever their number."""

    steps: np.ndarray  # (S, B) image numbers; what does not fill the last step waits for another epoch
    flips: np.ndarray | None  # (S, B, 2)

    @classmethod
    def make(cls, images: int, global_batch_size: int, seed: int, epoch: int, flips: bool) -> "EpochPlan":
        generator = np.random.default_rng([seed, epoch])
        count = images // global_batch_size
        order = generator.permutation(images)[: count * global_batch_size]
        views = generator.random((count, global_batch_size, 2)) < 0.5 if flips else None
        return cls(order.reshape(count, global_batch_size), views)

    def micro_batches(self, step: int, split: Split, rank: int, world_size: int, accumulation: int) -> Iterator[Batch]:
        """The share of `rank` in `step`, in `accumulation` parts. All ranks' shares make up the step."""
        parts = np.split(np.arange(self.steps.shape[1]), world_size * accumulation)
        for part in parts[rank::world_size]:
            flips = None if self.flips is None else self.flips[step][part]
            yield split.batch(self.steps[step][part], flips)
