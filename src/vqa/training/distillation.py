"""What a teacher says of a training split, in every view, computed once and kept for all its students.

    runs/targets/<key>.safetensors

The key is made of the teacher's weights, the data, and the kind of arithmetic. Mirrored images are
all the views there are, so the cache is exact: a student's step needs no teacher.

Of a question its tokens are kept as well: teacher and student share a tokenizer, so tokens match one
to one. Tokens of images do not: a ViT's patches and a ResNet's cells are grids of different sizes.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vqa import run_folder as runs
from vqa.config import ConfigError, RunConfig
from vqa.data.batches import VIEWS, Batch, Split
from vqa.evaluation.evaluate import IMAGES_PER_BATCH
from vqa.models.build import load_vqa_model
from vqa.models.vqa_model import Reading, VQAModel
from vqa.run_folder import Run


class Targets:
    """What a finished teacher says of a split: pairs' logits, summaries of images and questions, questions' tokens."""

    def __init__(self, config: RunConfig, split: Split, fingerprint: str, device: torch.device):
        """`config` is the student's run, `split` its training split of the data with `fingerprint`.

        Raises RunError for an unfinished teacher; ConfigError for one that reads or answers with other words.
        """
        run = Run(config.teacher)
        run.results()  # refuses an unfinished run
        weights = (run.folder / "model" / "model.safetensors").read_bytes()
        self.teacher = {"run": run.folder.name, "sha256": hashlib.sha256(weights).hexdigest()}
        model = load_vqa_model(run.folder / "model").to(device)
        _check_words(run, model, split)
        key = [self.teacher["sha256"], fingerprint, config.data.model_dump(), Reading._fields]
        key += [config.launch.device, config.launch.threads_per_rank]  # they round differently
        key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        views = VIEWS if config.data.flips else VIEWS[:1]
        said = kept(runs.RUNS / "targets" / f"{key}.safetensors", lambda: read_all(model, split, views))
        self.said = Reading(**said)  # (views, pairs, A), (views, images, D), (questions, D), (questions, T, D)
        # Features are compared in units of their own spread, so that a weight means the same for every teacher.
        rows = [self.said.image.flatten(0, -2), self.said.text, self.said.tokens[split.attention_mask.bool()]]
        self.centre = [part.mean(0) for part in rows]
        self.spread = [part.std(0).clamp(min=1e-6) for part in rows]

    @property
    def widths(self) -> tuple[int, int]:
        """Those of the teacher's image and text summaries."""
        return self.said.image.shape[-1], self.said.text.shape[-1]

    def of(self, batch: Batch) -> Reading:
        """What the teacher says of `batch`, each component of summaries and of tokens standardised over the split."""
        view, images, questions = batch.view.cpu(), batch.image_number.cpu(), batch.question_number.cpu()
        said = Reading(
            self.said.logits[view[batch.image_index.cpu()], batch.pair_number.cpu()],
            self.said.image[view, images],
            self.said.text[questions],
            self.said.tokens[questions, : batch.input_ids.shape[1]],
        )
        return Reading(*(part.to(batch.labels.device, non_blocking=True) for part in self.standardised(said)))

    def standardised(self, said: Reading) -> Reading:
        features = zip((said.image, said.text, said.tokens), self.centre, self.spread, strict=True)
        return Reading(said.logits, *((part - centre) / spread for part, centre, spread in features))


@torch.inference_mode()
def read_all(teacher: VQAModel, split: Split, views: np.ndarray) -> dict[str, torch.Tensor]:
    """What `teacher`, which must be in eval mode, says of every pair, image and question, by field of Reading.

    Of tokens that pad a question it says zero.
    """
    device = next(teacher.parameters()).device
    logits = torch.empty(len(views), len(split.frame), len(teacher.answers))
    image = torch.empty(len(views), len(split), teacher.image_encoder.width)
    text = torch.empty(len(split.input_ids), teacher.text_encoder.width)
    tokens = torch.zeros(*split.input_ids.shape, teacher.text_encoder.width)
    for view, flip in enumerate(views):
        for first in range(0, len(split), IMAGES_PER_BATCH):
            images = np.arange(first, min(first + IMAGES_PER_BATCH, len(split)))
            batch = split.batch(images, np.tile(flip, (len(images), 1)))
            said = teacher.read(**batch.to(device).inputs())
            logits[view, batch.pair_number] = said.logits.cpu()
            image[view, batch.image_number] = said.image.cpu()
            text[batch.question_number] = said.text.cpu()
            own = batch.attention_mask[..., None]
            tokens[batch.question_number, : own.shape[1]] = said.tokens.cpu() * own
    return {"logits": logits, "image": image, "text": text, "tokens": tokens}


def kept(path: Path, compute) -> dict[str, torch.Tensor]:
    """The tensors in file `path`, made by `compute` if it is missing; whoever else wants them waits meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, however this process ends
        if not path.is_file():
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_file(compute(), temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    return load_file(path)


def _check_words(run: Run, teacher: VQAModel, split: Split) -> None:
    if teacher.answers != split.answers:
        raise ConfigError(
            f"the teacher {run.folder.name} chooses among {len(teacher.answers)} answers that are not the "
            f"student's {len(split.answers)}: train both on the same answers"
        )
    if teacher.tokenizer.get_vocab() != split.tokenizer.get_vocab():
        raise ConfigError(f"the teacher {run.folder.name} reads with another tokenizer than the student")
