"""07_forensics: alignment with one of the earlier study's faults at a time, on 1, 2 and 4 simulated ranks.

The faults live here alone; the study's own loop cannot be made to have them. Ranks are simulated in
one process: the step's pairs go through the towers at once, each simulated rank takes its share of
the vectors, and the mean of the ranks' losses is differentiated, which is what DDP's mean of
gradients is (a test compares it with real ranks). Batch statistics are those of all ranks, as with
SyncBatchNorm.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.functional import kl_div

from vqa.config import ConfigError
from vqa.data.batches import Batch, Split
from vqa.experiments.earlier_study import spread
from vqa.experiments.jobs import SOUND_BATCH
from vqa.experiments.measurement import Measurement, measures
from vqa.results import EARLIER, EARLIER_RECIPE, SOUND, TAUGHT, UNTAUGHT, Result
from vqa.training.losses import contrastive_loss
from vqa.training.objectives import Alignment
from vqa.training.train import optimizer

PAIRS_PER_RANK = 16
WARMUP_SHARE = 0.01  # of the one-rank schedule: the earlier 1,000 steps of 7 x 16,600, whatever the ranks
CUT = 4 / 7  # epochs trained of epochs scheduled
SECOND_TEMPERATURE = 0.07
DROPOUT = 0.1  # of a teacher left in train mode


@dataclass(frozen=True)
class Recipe:
    """How one alignment is trained. As it stands here, soundly; a fault changes one field."""

    batch_grows: bool = False  # PAIRS_PER_RANK on each rank at one rate and warm-up, not SOUND_BATCH over all ranks
    local_negatives: bool = False  # each rank compares its own pairs only
    schedule_part: float = 1.0  # of the schedule that is run
    second_temperature: float = 1.0  # divides logits that were scaled already
    equal_captions_are_negatives: bool = False
    distinct_captions: bool = False  # batches in which no rank meets a caption twice, as good as always on COCO
    teacher: str = ""  # trained | untrained: distilled from one, half of the loss

    @property
    def knows_ranks(self) -> bool:
        """Whether a step depends on the number of ranks at all; if not, one training stands for every number."""
        return self.batch_grows or self.local_negatives


RECIPES = {
    SOUND: Recipe(),
    "local negatives": Recipe(local_negatives=True),
    "16 pairs a rank, same rate": Recipe(batch_grows=True),
    "schedule cut at 4/7": Recipe(schedule_part=CUT),
    "temperature applied twice": Recipe(second_temperature=SECOND_TEMPERATURE),
    "equal captions as negatives": Recipe(equal_captions_are_negatives=True),
    TAUGHT: Recipe(teacher="trained"),
    UNTAUGHT: Recipe(teacher="untrained"),
    EARLIER_RECIPE: Recipe(
        batch_grows=True,
        local_negatives=True,
        schedule_part=CUT,
        second_temperature=SECOND_TEMPERATURE,
        distinct_captions=True,
    ),
}


@dataclass(frozen=True)
class Trained:
    """A model and the losses of its steps: `losses` (S, ranks) of each rank's pairs."""

    objective: Alignment
    losses: np.ndarray
    last_epoch: int  # steps

    @property
    def reported(self) -> np.ndarray:
        """(last epoch's steps,) the mean over ranks: what a sound log shows."""
        return self.losses[-self.last_epoch :].mean(1)

    @property
    def first_rank(self) -> np.ndarray:
        """(last epoch's steps,) rank 0's own batches, of which the earlier study showed the last."""
        return self.losses[-self.last_epoch :, 0]


@measures
def forensics(m: Measurement) -> list[Result]:
    """Train by every recipe; results say what was reported and what was learned, metrics.jsonl each last-epoch step.

    A recipe whose steps do not know of ranks is trained by the one-rank job, whose rows then stand for all numbers.
    """
    rows, sound, simulated = [], None, m.config.simulated_ranks
    for fault, recipe in RECIPES.items():
        if simulated > 1 and not recipe.knows_ranks:
            continue
        trained = train(m, recipe, teacher_for(recipe, m, sound))
        sound = sound or trained
        found = [
            Result("reported_loss", float(trained.reported.mean()), arm=fault),
            Result("last_batch_spread", spread(*np.quantile(trained.first_rank, [0.025, 0.975])), arm=fault),
            Result("yardstick_loss", yardstick(trained, recipe), arm=fault),
            Result("r_precision", 100 * trained.objective.validate(), arm=fault),
        ]
        for ranks in (simulated,) if recipe.knows_ranks else EARLIER:
            rows += [replace(row, world_size=ranks) for row in found]
            for step, (mean, first) in enumerate(zip(trained.reported, trained.first_rank, strict=True)):
                m.run.log_metrics(fault=fault, ranks=ranks, step=step, loss=float(mean), first_rank=float(first))
        print(f"{fault:32}" + "".join(f"  {row.metric} {row.value:.3g}" for row in found), flush=True)
    return rows


def train(m: Measurement, recipe: Recipe, teacher: nn.Module | None = None) -> Trained:
    """Align two fresh towers by `recipe`; every recipe meets equally many images.

    Raises ConfigError where images are too few for one step.
    """
    torch.manual_seed(m.first.seed)
    objective = Alignment(m.first, m.source, m.rank)
    model, split = objective.model.to(m.rank.device), objective.train_split
    settings, ranks = m.first.train, m.config.simulated_ranks
    per_rank = PAIRS_PER_RANK if recipe.batch_grows else SOUND_BATCH // ranks
    scheduled = settings.epochs * (len(split) // (per_rank * ranks)) / recipe.schedule_part
    warmup = settings.warmup_fraction * scheduled
    if recipe.batch_grows:  # counted in steps, so that it takes a larger share where ranks make steps fewer
        warmup = WARMUP_SHARE * scheduled * ranks
    optimize = optimizer(model, settings)
    schedule = transformers.get_cosine_schedule_with_warmup(optimize, round(warmup), round(scheduled))
    losses, lengths = [], []
    for epoch in range(settings.epochs):
        generator = np.random.default_rng([m.first.seed, epoch])
        batches = list(batches_of(split, per_rank, ranks, recipe.distinct_captions, generator))
        lengths.append(len(batches))
        for images in batches:
            flips = generator.random((len(images), 2)) < 0.5 if m.first.data.flips else None
            batch = split.batch(images, flips).to(m.rank.device)
            loss = rank_losses(model.train(), batch, ranks, recipe, teacher)
            loss.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimize.step()
            schedule.step()
            optimize.zero_grad()
            losses.append(loss.detach().cpu().numpy())
    if not losses:
        raise ConfigError(f"forensics.images leaves {len(split)} captions, too few for a batch of each rank")
    return Trained(objective, np.stack(losses), lengths[-1])


def batches_of(
    split: Split, per_rank: int, ranks: int, distinct: bool, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """An epoch's batches, (ranks x per_rank,) image numbers, rank after rank; what fills no batch is left out."""
    order = generator.permutation(len(split))
    if distinct:
        order = np.concatenate(distinct_blocks(order, split.question_of, per_rank) or [order[:0]])
    count = len(order) // (ranks * per_rank)
    yield from order[: count * ranks * per_rank].reshape(count, ranks * per_rank)


def distinct_blocks(order: np.ndarray, caption: np.ndarray, size: int) -> list[np.ndarray]:
    """Blocks of `size` images with no `caption` (M,) twice in any, filled in `order`."""
    blocks: list[dict[int, int]] = []  # caption -> image; one caption an image, so pair and image numbers agree
    full = []
    for image in order:
        block = next((block for block in blocks if caption[image] not in block), None)
        if block is None:
            blocks.append(block := {})
        block[caption[image]] = image
        if len(block) == size:
            blocks = [other for other in blocks if other is not block]
            full.append(np.array(list(block.values())))
    return full


def rank_losses(model: nn.Module, batch: Batch, ranks: int, recipe: Recipe, teacher: nn.Module | None) -> torch.Tensor:
    """(ranks,) the loss that each simulated rank would see; DDP follows the gradient of their mean."""
    images, captions, scale = model(**batch.inputs())
    scale = scale / recipe.second_temperature
    image, caption = batch.image_index, batch.question_number[batch.question_index]
    if recipe.equal_captions_are_negatives:
        caption = image  # each image's own
    if not recipe.local_negatives:  # gathered: every rank has the loss of all pairs
        loss = contrastive_loss(images, captions, image, caption, scale)
        if teacher is not None:
            loss = (loss + _row_divergence(images @ captions.T * scale, teacher, batch)) / 2
        return loss.expand(ranks)
    shares = zip(*(part.chunk(ranks) for part in (images, captions, image, caption)), strict=True)
    return torch.stack([contrastive_loss(*share, scale) for share in shares])


def _row_divergence(logits: torch.Tensor, teacher: nn.Module, batch: Batch) -> torch.Tensor:
    """KL divergence of the student's similarity rows (N, N) from the teacher's, as the earlier student was taught."""
    with torch.no_grad():
        images, captions, scale = teacher(**batch.inputs())
    return kl_div(logits.log_softmax(1), (images @ captions.T * scale).softmax(1), reduction="batchmean")


def teacher_for(recipe: Recipe, m: Measurement, sound: Trained | None) -> nn.Module | None:
    """The soundly trained model in eval mode, or a fresh one with dropout on, or none."""
    if recipe.teacher == "trained":
        return sound.objective.model.eval()
    if recipe.teacher == "untrained":
        torch.manual_seed(m.first.seed + 1)
        noisy = m.first.model.model_copy(update={"dropout": DROPOUT})
        return Alignment(m.first.model_copy(update={"model": noisy}), m.source, m.rank).model.to(m.rank.device).train()
    return None


@torch.inference_mode()
def yardstick(trained: Trained, recipe: Recipe) -> float:
    """One measure for all: the loss among 16 validation images of distinct captions, at the trained temperature."""
    model, split = trained.objective.model.eval(), trained.objective.splits["validation"]
    device = trained.objective.rank.device
    order = np.random.default_rng(0).permutation(len(split))
    blocks = distinct_blocks(order, split.question_of, PAIRS_PER_RANK) or [order[:PAIRS_PER_RANK]]
    measure = Recipe(second_temperature=recipe.second_temperature)
    batches = [split.batch(block).to(device) for block in blocks]
    return float(np.mean([rank_losses(model, batch, 1, measure, None).item() for batch in batches]))
