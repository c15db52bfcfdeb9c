"""Why the earlier study's table looked as it did: alignment with one of its faults at a time, on 1, 2 and 4 ranks.

    torchrun --standalone --nproc-per-node 1 -m vqa.experiments.forensics --config FILE

The faults live here alone; the study's own loop cannot be made to have them. Ranks are simulated in
one process: the step's pairs go through the towers at once, each simulated rank takes its share of
the vectors, and the mean of the ranks' losses is differentiated, which is what DDP's mean of
gradients is (a test compares it with real ranks). Batch statistics are those of all ranks, as with
SyncBatchNorm.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from torch.nn.functional import kl_div

from vqa.config import ConfigError, LaunchConfig, Positive, Profile, RunConfig, Section, load_section
from vqa.data import source as sources
from vqa.data.batches import Batch, Split
from vqa.distributed import Rank, process_group
from vqa.results import Result
from vqa.run_folder import Run, RunError
from vqa.training.losses import contrastive_loss
from vqa.training.objectives import Alignment
from vqa.training.train import load_data, optimizer

EARLIER = {1: 0.52, 2: 1.44, 4: 0.098}  # its final losses by GPUs, as published
PAIRS_PER_RANK = 16
SOUND_BATCH = 64  # pairs a step at every world size
WARMUP_SHARE = 0.01  # of the one-rank schedule: the earlier 1,000 steps of 7 x 16,600, whatever the ranks
CUT = 4 / 7  # epochs trained of epochs scheduled
SECOND_TEMPERATURE = 0.07
DROPOUT = 0.1  # of a teacher left in train mode


@dataclass(frozen=True)
class Recipe:
    """How one alignment is trained. As it stands here, soundly; a fault changes one field."""

    batch_grows: bool = (
        False  # PAIRS_PER_RANK on each rank, the rate and the warm-up's steps unchanged; else SOUND_BATCH
    )
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


SOUND, EARLIER_RECIPE = "none", "all that bear on its table"
TAUGHT, UNTAUGHT = "none, distilled", "teacher untrained, in train mode"
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


class ForensicsConfig(Section):
    """Every recipe with the data, towers, rate, epochs and seed of alignment run `run`, on `ranks` simulated ranks."""

    run: RunConfig
    ranks: Positive

    @property
    def name(self) -> str:
        return f"forensics-{self.ranks}-ranks-seed{self.run.seed}"

    @property
    def launch(self) -> LaunchConfig:
        return self.run.launch


def forensics_configs(profile: Profile) -> list[ForensicsConfig]:
    """One job a seed and world size; the student's towers, which learn fastest."""
    study = profile.forensics
    configs = []
    for seed in study.seeds:
        run = profile.run("student", seed, data__train_images=study.images, launch__world_size=1).parent
        train = run.train.model_copy(update={"epochs": study.epochs, "global_batch_size": SOUND_BATCH})
        configs += [ForensicsConfig(run=run.model_copy(update={"train": train}), ranks=n) for n in EARLIER]
    return configs


@dataclass(frozen=True)
class Trained:
    """A model and the losses of its steps: `own` (S, ranks) of each rank's pairs."""

    objective: Alignment
    own: np.ndarray
    last_epoch: int  # steps

    @property
    def reported(self) -> np.ndarray:
        """(last epoch's steps,) the mean over ranks: what a sound log shows."""
        return self.own[-self.last_epoch :].mean(1)

    @property
    def first_rank(self) -> np.ndarray:
        """(last epoch's steps,) rank 0's own batches, of which the earlier study showed the last."""
        return self.own[-self.last_epoch :, 0]


def train(config: ForensicsConfig, recipe: Recipe, source: sources.Source, rank: Rank, teacher=None) -> Trained:
    """Align two fresh towers by `recipe`; every recipe meets equally many images."""
    torch.manual_seed(config.run.seed)
    objective = Alignment(config.run, source, rank)
    model, split, settings = objective.model.to(rank.device), objective.train_split, config.run.train
    per_rank = PAIRS_PER_RANK if recipe.batch_grows else SOUND_BATCH // config.ranks
    steps_per_epoch = len(split) // (per_rank * config.ranks)
    scheduled = settings.epochs * steps_per_epoch / recipe.schedule_part
    warmup = settings.warmup_fraction * scheduled
    if recipe.batch_grows:  # counted in steps, so that it takes a larger share where ranks make steps fewer
        warmup = WARMUP_SHARE * scheduled * config.ranks
    optimize = optimizer(model, settings)
    schedule = transformers.get_cosine_schedule_with_warmup(optimize, round(warmup), round(scheduled))
    own, lengths = [], []
    for epoch in range(settings.epochs):
        generator = np.random.default_rng([config.run.seed, epoch])
        batches = list(batches_of(split, per_rank, config.ranks, recipe.distinct_captions, generator))
        lengths.append(len(batches))
        for images in batches:
            flips = generator.random((len(images), 2)) < 0.5 if config.run.data.flips else None
            batch = split.batch(images, flips).to(rank.device)
            losses = rank_losses(model.train(), batch, config.ranks, recipe, teacher)
            losses.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimize.step()
            schedule.step()
            optimize.zero_grad()
            own.append(losses.detach().cpu().numpy())
    if not own:
        raise ConfigError(f"forensics.images leaves {len(split)} captions, too few for a batch of each rank")
    return Trained(objective, np.stack(own), lengths[-1])


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


def teacher_for(recipe: Recipe, config: ForensicsConfig, source: sources.Source, rank: Rank, sound: Trained):
    """The soundly trained model in eval mode, or a fresh one with dropout on, or none."""
    if recipe.teacher == "trained":
        return sound.objective.model.eval()
    if recipe.teacher == "untrained":
        torch.manual_seed(config.run.seed + 1)
        noisy = config.run.model.model_copy(update={"dropout": DROPOUT})
        return Alignment(config.run.model_copy(update={"model": noisy}), source, rank).model.to(rank.device).train()
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


def examine(config: ForensicsConfig, source: sources.Source, rank: Rank, run: Run) -> list[Result]:
    """Train by every recipe; results say what was reported and what was learned, metrics.jsonl each last-epoch step.

    A recipe whose steps do not know of ranks is trained by the one-rank job, for all numbers of ranks.
    """
    rows, sound = [], None
    for fault, recipe in RECIPES.items():
        if config.ranks > 1 and not recipe.knows_ranks:
            continue
        trained = train(config, recipe, source, rank, teacher_for(recipe, config, source, rank, sound))
        sound = sound or trained
        found = [
            Result("reported_loss", float(trained.reported.mean()), "nats"),
            Result("last_batch_spread", spread(*np.quantile(trained.first_rank, [0.025, 0.975])), "%"),
            Result("yardstick_loss", yardstick(trained, recipe), "nats"),
            Result("r_precision", 100 * trained.objective.judge(), "%"),
        ]
        for ranks in (config.ranks,) if recipe.knows_ranks else EARLIER:
            labels = {"engine": fault, "world_size": str(ranks)}
            rows += [replace(row, labels=labels) for row in found]
            for step, (mean, first) in enumerate(zip(trained.reported, trained.first_rank, strict=True)):
                run.log_metrics(fault=fault, ranks=ranks, step=step, loss=float(mean), first_rank=float(first))
        print(f"{fault:32}" + "".join(f"  {row.metric} {row.value:.3g}" for row in found), flush=True)
    return rows


def spread(*losses: float) -> float:
    """How far `losses` lie apart, ln(largest / smallest), in percent of how far the earlier table's do."""
    earlier = max(EARLIER.values()) / min(EARLIER.values())
    return 100 * float(np.log(max(losses) / min(losses)) / np.log(earlier))


def explained(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a fault: its reported loss by ranks, and how far ranks lie apart, in percent of the earlier spread.

    Beside it the same by the yardstick, and for single batches of rank 0 (95 % of those of the last
    epoch, the mean over ranks). Means over seeds, in brackets the lowest and the highest.
    """
    rows = rows.astype({"world_size": int})
    table = []
    for fault, group in rows.groupby("engine", sort=False):
        found = group.pivot_table(index=["metric", "seed"], columns="world_size", values="value")
        reported, yardsticks = found.loc["reported_loss"], found.loc["yardstick_loss"]
        shares = {
            "spread over ranks, %": reported.apply(lambda losses: spread(*losses), axis=1),
            "by the yardstick, %": yardsticks.apply(lambda losses: spread(*losses), axis=1),
            "by which batch was last, %": found.loc["last_batch_spread"].mean(axis=1),
        }
        losses = {f"reported, {ranks} rank{'s' * (ranks > 1)}": reported[ranks] for ranks in reported}
        table.append({"fault": fault} | {name: _mean_and_range(values) for name, values in (losses | shares).items()})
    return pd.DataFrame(table).set_index("fault")


def _mean_and_range(values: pd.Series) -> str:
    return f"{values.mean():.3g}" + (f" [{values.min():.3g}, {values.max():.3g}]" if len(values) > 1 else "")


def reconstructed(losses: dict[int, np.ndarray]) -> dict[str, float]:
    """How often single batches, one drawn at each number of ranks, repeat the earlier table.

    `losses` are rank 0's of a last epoch. `order`: the share of draws with four ranks below one below
    two (a sixth by chance alone); `apart`: with two ranks at least as many times above four as
    published; `reach`: the largest ratio of two to four ranks; `span`: how far the most favourable
    draws of any ranks lie apart, in percent of how far the published losses do.
    """
    one, two, four = (losses[ranks] for ranks in EARLIER)
    ratios = two[:, None] / four
    return {
        "order": float(np.mean([(four < loss).mean() * (two > loss).mean() for loss in one])),
        "apart": float((ratios >= EARLIER[2] / EARLIER[4]).mean()),
        "reach": float(ratios.max()),
        "span": spread(*(end(batch) for batch in losses.values() for end in (min, max))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Align two towers with the earlier study's faults; start with torchrun."
    )
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        config = load_section(ForensicsConfig, arguments.config)
        run = Run(config, module="vqa.experiments.forensics")
        with process_group(config.launch) as rank, run.writing():
            (run.folder / "metrics.jsonl").unlink(missing_ok=True)
            run.finish(examine(config, load_data(config.run, rank), rank, run))
    except (ConfigError, RunError, sources.SourceError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
