"""The only place that runs a model over a split; its answers, one row a question, exact on any number of ranks.

    python -m vqa.evaluation.evaluate runs/<run> [--split test]

prints the accuracies of a finished run's saved model, computed anew.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from vqa.config import ConfigError
from vqa.data.batches import Batch, Split
from vqa.data.source import SourceError, load
from vqa.distributed import Rank, gather_objects, stop_if_asked
from vqa.evaluation.metrics import BlindBaseline, accuracy_results, score
from vqa.models.build import load_vqa_model
from vqa.models.vqa_model import VQAModel
from vqa.run_folder import Run, RunError

IMAGES_PER_BATCH = 64


@torch.inference_mode()
def outputs(
    model: Callable, split: Split, device: torch.device, rank: Rank | None = None, flip: np.ndarray | None = None
) -> Iterator[tuple[Batch, Any]]:
    """Every batch of `split`, IMAGES_PER_BATCH images each, in order, with what `model` makes of it in eval mode.

    `model` is called with Batch.inputs(), and both are on `device`. Without a `rank` this process takes all batches;
    with one, ranks take turns at whole batches, none padded and none repeated, so every world size computes the same.
    `flip` (2,) of bool mirrors all images left-right and top-bottom. Raises Stopped if a rank is asked to stop.
    """
    world_size, number = (rank.world_size, rank.rank) if rank else (1, 0)
    images = np.arange(len(split))
    batches = np.split(images, images[IMAGES_PER_BATCH::IMAGES_PER_BATCH])
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()
    try:
        for turn in range(0, len(batches), world_size):
            if rank:
                stop_if_asked(rank)
            if turn + number < len(batches):  # in the last turn there may be nothing left for this rank
                chosen = batches[turn + number]
                flips = None if flip is None else np.tile(flip, (len(chosen), 1))
                batch = split.batch(chosen, flips).to(device)
                yield batch, model(**batch.inputs())
    finally:
        if training:
            model.train()


@torch.inference_mode()
def predict(model: VQAModel, split: Split, rank: Rank) -> pd.DataFrame:
    """The split's pairs with `prediction`, `confidence`, `correct` (0 to 1); on the main rank, else empty.

    `written` is the answer that a decoder wrote freely, None for models that only choose from a list. An answer
    outside the vocabulary is never predicted, hence counted as wrong. Raises Stopped if a rank is asked to stop.
    """
    parts = []
    for batch, output in outputs(model, split, next(model.parameters()).device, rank):
        confidence, index = output.logits.float().softmax(-1).max(-1)
        written = model.generate(batch) if hasattr(model, "generate") else [None] * len(batch)
        parts.append((batch.pair_number.cpu().numpy(), index.cpu().numpy(), confidence.cpu().numpy(), written))
    parts = [part for share in gather_objects(parts, rank) for part in share]
    if not rank.is_main:
        return pd.DataFrame()
    rows, index, confidence, written = (np.concatenate(column) for column in zip(*parts, strict=True))
    prediction = np.array(model.processor.answers)[index]
    answered = pd.DataFrame({"prediction": prediction, "confidence": confidence, "written": written}, rows)
    frame = split.frame.join(answered.sort_index())
    return frame.assign(correct=score(frame["prediction"], frame))


def predict_beside_blind(model: VQAModel, split: Split, blind: BlindBaseline, name: str, rank: Rank) -> pd.DataFrame:
    """`predict` of the split `name`, with how right the image-blind baseline is, as predictions.parquet keeps it."""
    frame = predict(model, split, rank)
    if frame.empty:
        return frame
    return frame.assign(split=name, blind_correct=score(blind(frame["question"]), frame))


def open_answering(folder: Path) -> Run:
    """The run in `folder`. Raises RunError if it is not a training that has finished and answers questions."""
    run = Run.open(folder)
    run.results()  # refuses an unfinished run
    if run.config.objective == "alignment":
        raise RunError(f"{folder.name} aligned two towers; it answers no questions: choose a run that was trained to")
    return run


def one_rank() -> Rank:
    """The Rank of a process that torchrun did not start."""
    return Rank(0, 0, 1, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a finished run's model anew.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    arguments = parser.parse_args()
    try:
        run = open_answering(arguments.run)
        source = load(run.config.data)
    except (RunError, ConfigError, SourceError) as error:
        sys.exit(f"error: {error}")
    model = load_vqa_model(run.folder / "model")
    split = Split(source.splits[arguments.split], model.processor)
    blind = BlindBaseline(source.splits["train"].questions)
    frame = predict_beside_blind(model, split, blind, arguments.split, one_rank())
    for result in accuracy_results(frame, arguments.split, source.relational_types):
        interval = "" if result.low is None else f"[{result.low:.2f}, {result.high:.2f}]"
        print(f"{result.metric:24} {result.value:6.2f} {result.unit:6} {interval}")


if __name__ == "__main__":
    main()
