"""What a run learns: a step's loss, the score that chooses the best epoch, the results of the end.

    Answers    the answer to each question, cross-entropy (the VQA model)
    Alignment  which caption belongs to which image, InfoNCE (the two towers)

Distillation, in a module of its own, learns answers as a teacher gives them.

An objective's loss is scaled so that the mean of gradients over ranks, which DDP takes, is the
gradient of the loss of the whole step.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import nn

from vqa.config import RunConfig
from vqa.data.batches import Batch, Split
from vqa.data.processor import Processor, train_tokenizer
from vqa.data.source import Source
from vqa.distributed import Rank, from_main, gather_rows, stop_if_asked
from vqa.evaluation.evaluate import outputs, predict_beside_blind
from vqa.evaluation.metrics import BlindBaseline, accuracy_results, recall_results
from vqa.models.build import vqa_model
from vqa.models.pretrained import pretrained_tokenizer
from vqa.models.vqa_model import AlignmentModel
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training.losses import contrastive_loss


class Answers:
    """Answer questions. Validation accuracy chooses the best epoch; the test split is met once, in `test`."""

    def __init__(self, config: RunConfig, source: Source, rank: Rank):
        self.rank = rank
        self.model = vqa_model(config.model, processor_for(config, source))
        if config.parent:
            self.model.load_towers(Run(config.parent).folder / "model")
        self.network: nn.Module = self.model  # what is trained; `model` is what is validated and saved
        self.splits = {name: Split(table, self.model.processor) for name, table in source.splits.items()}
        self.train_split = self.splits["train"]
        self.blind, self.relational_types = BlindBaseline(source.splits["train"].questions), source.relational_types

    def loss(self, network: Callable, batch: Batch, images: np.ndarray) -> torch.Tensor:
        """The share of `batch` in the loss of the step that `images` make up over all ranks."""
        pairs = len(self.train_split.pairs_of(images))
        loss = network(**batch.inputs(), labels=batch.labels, num_items_in_batch=pairs).loss
        return loss * self.rank.world_size  # the step's loss is the sum over ranks, and DDP takes the mean

    def validate(self) -> float:
        """Validation accuracy, 0 to 1, on every rank."""
        frame = predict_beside_blind(self.model, self.splits["validation"], self.blind, "validation", self.rank)
        return from_main(float(frame["correct"].mean()) if self.rank.is_main else None)

    def test(self, run: Run) -> list[Result]:
        """Write predictions.parquet; give the accuracies. Every rank must call this."""
        names = ("validation", "test")
        frames = [predict_beside_blind(self.model, self.splits[name], self.blind, name, self.rank) for name in names]
        if not self.rank.is_main:
            return []
        with run.replacing("predictions.parquet") as path:
            pd.concat(frames, ignore_index=True).to_parquet(path)
        return [
            row
            for name, frame in zip(names, frames, strict=True)
            for row in accuracy_results(frame, name, self.relational_types)
        ]


class Alignment:
    """Bring images and their captions together, before any question is asked."""

    def __init__(self, config: RunConfig, source: Source, rank: Rank):
        self.rank = rank
        self.model = AlignmentModel(config.model, processor_for(config, source))
        self.network: nn.Module = self.model
        names = ("train", "validation")
        self.splits = {name: Split(source.splits[name].captioned(), self.model.processor) for name in names}
        self.train_split = self.splits["train"]

    def loss(self, network: Callable, batch: Batch, images: np.ndarray) -> torch.Tensor:
        """The loss of the whole step, on every rank: every rank's pairs are everyone's negatives."""
        image, caption, scale = network(**batch.inputs())
        numbers = torch.stack([batch.image_number[batch.image_index], batch.question_number[batch.question_index]], 1)
        if self.rank.world_size > 1:
            image, caption, numbers = (gather_rows(rows) for rows in (image, caption, numbers))
        return contrastive_loss(image.float(), caption.float(), *numbers.T, scale.float())

    def validate(self) -> float:
        """R-precision over the whole validation gallery, the mean of both directions, 0 to 1, on every rank.

        The main rank's: where ranks have batch statistics of their own, so would their scores, and all must agree
        on whether this epoch is the best.
        """
        rows = [row for row in self._recalls() if row.metric.startswith("r_precision")]
        return from_main(sum(row.value for row in rows) / len(rows) / 100)

    def test(self, run: Run) -> list[Result]:
        """Recalls of the validation gallery: the test split is for questions."""
        return self._recalls()

    def _recalls(self) -> list[Result]:
        """Every rank computes the same: a gallery is small beside a training epoch."""
        stop_if_asked(self.rank)
        split = self.splits["validation"]
        vectors = [output[:2] for _, output in outputs(self.model, split, self.rank.device)]
        images, captions = (torch.cat(column).cpu() for column in zip(*vectors, strict=True))
        return recall_results(images, captions, split.frame["image_id"].to_numpy(), split.question_of, "validation")


def processor_for(config: RunConfig, source: Source) -> Processor:
    """With the text tower's public tokenizer, or one trained on the training questions, captions and answers."""
    text = config.model.text_encoder
    if text.pretrained:
        tokenizer = pretrained_tokenizer(text.pretrained, text.revision)
    else:
        train = source.splits["train"]
        captions = {caption for row in train.captions for caption in row}
        tokenizer = train_tokenizer(set(train.questions["question"]) | captions | set(source.answers))
    return Processor(tokenizer, source.answers, config.data.image_size, config.model.max_question_tokens)
