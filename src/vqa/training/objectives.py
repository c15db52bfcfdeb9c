"""What a run learns: what a step's loss is, how it is judged, what it leaves behind.

    Answers       the answer to each question, cross-entropy (the VQA model)
    Alignment     which caption belongs to which image, InfoNCE (the two towers)
    Distillation  the answer to each question, as a frozen teacher gives it (the VQA model)

An objective's loss is scaled so that the mean of gradients over ranks, which DDP takes, is the
gradient of the loss of the whole step.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn

from vqa.config import RunConfig
from vqa.data import source as sources
from vqa.data.batches import Batch, Split
from vqa.data.processor import train_tokenizer
from vqa.distributed import Rank, from_main, gather_rows, stop_if_asked
from vqa.evaluation.evaluate import records
from vqa.evaluation.metrics import BlindBaseline, accuracy_results, recall_results
from vqa.models.build import load_vqa_model, vqa_model
from vqa.models.pretrained import pretrained_tokenizer
from vqa.models.vqa_model import AlignmentModel, Reading, TwoTowers, VQAModel
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training.distillation import Targets
from vqa.training.losses import answer_loss, contrastive_loss, feature_loss, soft_target_loss, token_loss


class Answers:
    """Answer questions. Judged by validation accuracy; the test split is met once, in `finish`."""

    def __init__(self, config: RunConfig, source: sources.Source, rank: Rank):
        self.rank = rank
        self.model = vqa_model(config.model, tokenizer_for(config, source), source.answers, config.data.image_size)
        if config.parent:
            self.model.take_towers(Run(config.parent).folder / "model")
        self.network: nn.Module = self.model  # what is trained; `model` is what is judged and kept
        self.splits = {name: split_for(self.model, table) for name, table in source.splits.items()}
        self.train_split = self.splits["train"]
        self.blind = BlindBaseline(sources.pairs(source.splits["train"]))

    def loss(self, network: Callable, batch: Batch, images: np.ndarray) -> torch.Tensor:
        """The share of `batch` in the loss of the step that `images` make up over all ranks."""
        pairs = len(self.train_split.pairs_of(images))
        loss = self.model.loss(network, batch, pairs)
        return loss * self.rank.world_size  # DDP will divide: the sum over ranks is meant

    def judge(self) -> float:
        """Validation accuracy, 0 to 1, on every rank."""
        frame = records(self.model, self.splits["validation"], self.blind, "validation", self.rank)
        return from_main(float(frame["correct"].mean()) if self.rank.is_main else None)

    def finish(self, run: Run) -> list[Result]:
        """Write predictions.parquet; give the accuracies. Every rank must call this."""
        names = ("validation", "test")
        frames = [records(self.model, self.splits[name], self.blind, name, self.rank) for name in names]
        if not self.rank.is_main:
            return []
        with run.replacing("predictions.parquet") as path:
            pd.concat(frames, ignore_index=True).to_parquet(path)
        return [row for name, frame in zip(names, frames, strict=True) for row in accuracy_results(frame, name)]


class Alignment:
    """Bring images and their captions together, before any question is asked."""

    def __init__(self, config: RunConfig, source: sources.Source, rank: Rank):
        self.rank = rank
        self.model = AlignmentModel(config.model, tokenizer_for(config, source), [], config.data.image_size)
        self.network: nn.Module = self.model
        tables = {name: sources.captions(source.splits[name]) for name in ("train", "validation")}
        self.splits = {name: split_for(self.model, table) for name, table in tables.items()}
        self.train_split = self.splits["train"]

    def loss(self, network: Callable, batch: Batch, images: np.ndarray) -> torch.Tensor:
        """The loss of the whole step, on every rank: every rank's pairs are everyone's negatives."""
        image, caption, scale = network(**batch.inputs())
        numbers = torch.stack([batch.image_number[batch.image_index], batch.question_number[batch.question_index]], 1)
        if self.rank.world_size > 1:
            image, caption, numbers = (gather_rows(rows) for rows in (image, caption, numbers))
        return contrastive_loss(image.float(), caption.float(), *numbers.T, scale.float())

    def judge(self) -> float:
        """R-precision over the whole validation gallery, the mean of both directions, 0 to 1."""
        rows = [row for row in self._recalls() if row.metric.startswith("r_precision")]
        return sum(row.value for row in rows) / len(rows) / 100

    def finish(self, run: Run) -> list[Result]:
        return self._recalls()

    @torch.inference_mode()
    def _recalls(self) -> list[Result]:
        """Every rank computes the same: a gallery is small beside a training epoch."""
        stop_if_asked(self.rank)
        split = self.splits["validation"]
        self.model.eval()
        parts = [
            [part.cpu() for part in self.model(**split.batch(images).to(self.rank.device).inputs())[:2]]
            for images in np.array_split(np.arange(len(split)), max(len(split) // 64, 1))
        ]
        images, captions = (torch.cat(column) for column in zip(*parts, strict=True))
        return recall_results(images, captions, split.frame["image_id"].to_numpy(), split.question_of, "validation")


class Distillation(Answers):
    """Answer questions as the teacher does: its soft answers, its summaries, its tokens, and the labels.

    alpha T² KL(teacher ‖ student) + (1 - alpha) cross-entropy + feature_weight (image + text difference)
    + token_weight (difference of the question's tokens). Image tokens lie on the towers' own grids and do not match.
    """

    def __init__(self, config: RunConfig, source: sources.Source, rank: Rank):
        super().__init__(config, source, rank)
        self.weights = config.distillation
        self.targets = Targets(config, self.train_split, source.fingerprint, rank.device)
        if self.weights.inherit_text:
            self.model.text_encoder.inherit(load_vqa_model(Run(config.teacher).folder / "model").text_encoder)
        self.network = Pupil(self.model, *self.targets.widths)

    def loss(self, network: Callable, batch: Batch, images: np.ndarray) -> torch.Tensor:
        """The share of `batch` in the loss of the step that `images` make up over all ranks."""
        pairs = len(self.train_split.pairs_of(images))
        ours, theirs, weights = network(**batch.inputs()), self.targets.of(batch), self.weights
        soft = soft_target_loss(ours.logits, theirs.logits, weights.temperature, pairs)
        hard = answer_loss(ours.logits, batch.labels, pairs)
        image = feature_loss(ours.image, theirs.image, batch.image_index, pairs)
        text = feature_loss(ours.text, theirs.text, batch.question_index, pairs)
        tokens = token_loss(ours.tokens, theirs.tokens, batch.attention_mask, batch.question_index, pairs)
        total = weights.alpha * soft + (1 - weights.alpha) * hard
        total = total + weights.feature_weight * (image + text) + weights.token_weight * tokens
        return total * self.rank.world_size  # DDP will divide: the sum over ranks is meant

    def finish(self, run: Run) -> list[Result]:
        """As Answers; the record of the run then says which weights taught it."""
        if self.rank.is_main:
            run.write_json("env.json", run.environment() | {"teacher": self.targets.teacher})
        return super().finish(run)


class Pupil(nn.Module):
    """A student while it is taught: projections put its features beside its teacher's, and are dropped afterwards."""

    def __init__(self, student: VQAModel, image_width: int, text_width: int):
        super().__init__()
        self.student = student
        self.image_projection = nn.Linear(student.image_encoder.width, image_width)
        self.text_projection = nn.Linear(student.text_encoder.width, text_width)
        self.token_projection = nn.Linear(student.text_encoder.width, text_width)

    def forward(self, **inputs: torch.Tensor) -> Reading:
        said = self.student.read(**inputs)
        image, text = self.image_projection(said.image), self.text_projection(said.text)
        return Reading(said.logits, image, text, self.token_projection(said.tokens))


OBJECTIVES = {"answers": Answers, "alignment": Alignment, "distillation": Distillation}


def split_for(model: TwoTowers, table) -> Split:
    """`table` as `model` reads it."""
    return Split(table, model.tokenizer, model.answers, model.config.max_question_tokens, model.image_size)


def tokenizer_for(config: RunConfig, source: sources.Source) -> transformers.PreTrainedTokenizerBase:
    """The text tower's public tokenizer, or one trained on the training questions, captions and answers."""
    text = config.model.text_encoder
    if text.pretrained:
        return pretrained_tokenizer(text.pretrained, text.revision)
    train = source.splits["train"]
    captions = {caption for row in train["caption"] for caption in row}
    return train_tokenizer(sorted(set(sources.pairs(train)["question"]) | captions | set(source.answers)))
