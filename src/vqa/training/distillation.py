"""Distillation: a student learns from a teacher's answers and features, which are computed once and cached.

    runs/targets/<key>.safetensors

The key is made of the teacher's weights, the data, and the kind of arithmetic. Mirrored images are
all the views there are, so the cache is exact: a student's step needs no teacher.

Of a question its tokens are cached as well: teacher and student share a tokenizer, so tokens match one
to one. Tokens of images do not: a ViT's patches and a ResNet's cells are grids of different sizes.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

from vqa import run_folder
from vqa.config import ConfigError, RunConfig
from vqa.data.batches import VIEWS, Batch, Split
from vqa.data.source import Source
from vqa.distributed import Rank
from vqa.evaluation.evaluate import outputs
from vqa.models.build import load_vqa_model
from vqa.models.vqa_model import VQAModel, VQAOutput
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training.losses import feature_loss, soft_target_loss, token_loss
from vqa.training.objectives import Answers


class Distillation(Answers):
    """Answer questions as the teacher does: its soft answers, its summaries, its tokens, and the labels.

    alpha T² KL(teacher ‖ student) + (1 - alpha) cross-entropy + feature_weight (image + text difference)
    + token_weight (difference of the question's tokens). Image tokens lie on the towers' own grids and do not match.
    """

    def __init__(self, config: RunConfig, source: Source, rank: Rank):
        super().__init__(config, source, rank)
        self.weights = config.distillation
        self.cache = TeacherCache(config, self.train_split, source.fingerprint, rank.device)
        if self.weights.inherit_text:
            teacher = load_vqa_model(Run(config.teacher).folder / "model")
            self.model.text_encoder.init_from_teacher(teacher.text_encoder)
        self.network = StudentWithProjections(self.model, *self.cache.widths)

    def loss(self, network: Callable, batch: Batch, images: np.ndarray) -> torch.Tensor:
        """The share of `batch` in the loss of the step that `images` make up over all ranks."""
        pairs = len(self.train_split.pairs_of(images))
        ours = network(**batch.inputs(), labels=batch.labels, num_items_in_batch=pairs)
        theirs, weights = self.cache.of(batch), self.weights
        soft = soft_target_loss(ours.logits, theirs.logits, weights.temperature, pairs)
        image = feature_loss(ours.image, theirs.image, batch.image_index, pairs)
        text = feature_loss(ours.text, theirs.text, batch.question_index, pairs)
        tokens = token_loss(ours.tokens, theirs.tokens, batch.attention_mask, batch.question_index, pairs)
        total = weights.alpha * soft + (1 - weights.alpha) * ours.loss
        total = total + weights.feature_weight * (image + text) + weights.token_weight * tokens
        return total * self.rank.world_size  # the step's loss is the sum over ranks, and DDP takes the mean

    def test(self, run: Run) -> list[Result]:
        """As Answers; env.json then says which weights were the teacher."""
        if self.rank.is_main:
            run.write_json("env.json", run.environment() | {"teacher": self.cache.teacher})
        return super().test(run)


class StudentWithProjections(nn.Module):
    """A student as it is trained: linear layers give its features the teacher's widths, and are dropped afterwards."""

    def __init__(self, student: VQAModel, image_width: int, text_width: int):
        super().__init__()
        self.student = student
        self.image_projection = nn.Linear(student.image_encoder.width, image_width)
        self.text_projection = nn.Linear(student.text_encoder.width, text_width)
        self.token_projection = nn.Linear(student.text_encoder.width, text_width)

    def forward(self, **inputs: torch.Tensor | int) -> VQAOutput:
        output = self.student(**inputs)
        image, text = self.image_projection(output.image), self.text_projection(output.text)
        return VQAOutput(output.loss, output.logits, image, text, self.token_projection(output.tokens))


class TeacherCache:
    """What a finished teacher gives for a split: pairs' logits, summaries of images and questions, questions' tokens.

    `outputs` holds them on the CPU: logits (views, pairs, A), image (views, images, D), text (questions, D),
    tokens (questions, T, D).
    """

    def __init__(self, config: RunConfig, split: Split, fingerprint: str, device: torch.device):
        """`config` is the student's run, `split` its training split of the data with `fingerprint`.

        Raises RunError for an unfinished teacher; ConfigError for one with another tokenizer or other answers.
        """
        run = Run(config.teacher)
        run.results()  # refuses an unfinished run
        weights = (run.folder / "model" / "model.safetensors").read_bytes()
        self.teacher = {"run": run.folder.name, "sha256": hashlib.sha256(weights).hexdigest()}
        model = load_vqa_model(run.folder / "model").to(device)
        _check_words(run, model, split)
        key = [self.teacher["sha256"], fingerprint, config.data.model_dump()]
        key += [config.launch.device, config.launch.threads_per_rank]  # they round differently
        key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        views = VIEWS if config.data.flips else VIEWS[:1]
        path = run_folder.RUNS / "targets" / f"{key}.safetensors"
        self.outputs = VQAOutput(None, **cached(path, lambda: read_all(model, split, views)))
        # Features are compared in units of their own spread, so that a weight means the same for every teacher.
        tokens = self.outputs.tokens[split.attention_mask.bool()]
        rows = [self.outputs.image.flatten(0, -2), self.outputs.text, tokens]
        self.centre = [part.mean(0) for part in rows]
        self.spread = [part.std(0).clamp(min=1e-6) for part in rows]

    @property
    def widths(self) -> tuple[int, int]:
        """Those of the teacher's image and text summaries."""
        return self.outputs.image.shape[-1], self.outputs.text.shape[-1]

    def of(self, batch: Batch) -> VQAOutput:
        """The teacher's outputs for `batch`, on its device; summaries and tokens standardised over the split."""
        view, images, questions = batch.view.cpu(), batch.image_number.cpu(), batch.question_number.cpu()
        output = VQAOutput(
            None,
            self.outputs.logits[view[batch.image_index.cpu()], batch.pair_number.cpu()],
            self.outputs.image[view, images],
            self.outputs.text[questions],
            self.outputs.tokens[questions, : batch.input_ids.shape[1]],
        )
        _, *parts = self.standardised(output)
        return VQAOutput(None, *(part.to(batch.labels.device, non_blocking=True) for part in parts))

    def standardised(self, output: VQAOutput) -> VQAOutput:
        features = zip((output.image, output.text, output.tokens), self.centre, self.spread, strict=True)
        return VQAOutput(None, output.logits, *((part - centre) / spread for part, centre, spread in features))


def read_all(teacher: VQAModel, split: Split, views: np.ndarray) -> dict[str, torch.Tensor]:
    """The outputs of `teacher` for every pair, image and question, by field of VQAOutput, shaped as in TeacherCache.

    `views` (V, 2) of bool says which ways images are mirrored. Tokens that pad a question are zero.
    """
    device = next(teacher.parameters()).device
    logits = torch.empty(len(views), len(split.frame), len(teacher.processor.answers))
    image = torch.empty(len(views), len(split), teacher.image_encoder.width)
    text = torch.empty(len(split.input_ids), teacher.text_encoder.width)
    tokens = torch.zeros(*split.input_ids.shape, teacher.text_encoder.width)
    for view, flip in enumerate(views):
        for batch, output in outputs(teacher, split, device, flip=flip):
            questions, mask = batch.question_number.cpu(), batch.attention_mask[..., None]
            logits[view, batch.pair_number.cpu()] = output.logits.cpu()
            image[view, batch.image_number.cpu()] = output.image.cpu()
            text[questions] = output.text.cpu()
            tokens[questions, : mask.shape[1]] = (output.tokens * mask).cpu()
    return {"logits": logits, "image": image, "text": text, "tokens": tokens}


def cached(path: Path, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors in file `path`, made by `compute` if it is missing; other processes that want them wait meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # the kernel gives it back, however this process ends
        if not path.is_file():
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_file(compute(), temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    return load_file(path)


def _check_words(run: Run, teacher: VQAModel, split: Split) -> None:
    theirs, ours = teacher.processor, split.processor
    if theirs.answers != ours.answers:
        raise ConfigError(
            f"the teacher {run.folder.name} chooses among {len(theirs.answers)} answers that are not the "
            f"student's {len(ours.answers)}: train both on the same answers"
        )
    if theirs.tokenizer.get_vocab() != ours.tokenizer.get_vocab():
        raise ConfigError(f"the teacher {run.folder.name} reads with another tokenizer than the student")
