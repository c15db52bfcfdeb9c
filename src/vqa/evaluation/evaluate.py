"""A model's answers to a split, one record a question, exact under any number of ranks.

    python -m vqa.evaluation.evaluate runs/<run> [--split test]

prints the accuracies of a finished run's saved model, computed anew.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vqa.config import ConfigError
from vqa.data import source as sources
from vqa.data.batches import Split
from vqa.distributed import Rank, gather_objects, stop_if_asked
from vqa.evaluation.metrics import BlindBaseline, accuracy_results, score
from vqa.models.build import load_vqa_model
from vqa.models.vqa_model import VQAModel
from vqa.run_folder import Run, RunError

IMAGES_PER_BATCH = 64


@torch.inference_mode()
def predict(model: VQAModel, split: Split, rank: Rank) -> pd.DataFrame:
    """The split's pairs with `prediction`, `confidence`, `correct` (0 to 1); on the main rank, else empty.

    `written` is the answer that a decoder wrote freely, None for models that only choose from a list.

    Ranks take turns at whole batches, none padded and none repeated, so every world size gives the
    same records. An answer outside the vocabulary is never predicted, hence counted as wrong.
    Raises Stopped if a rank is asked to stop.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    images = np.arange(len(split))
    batches = [images[i : i + IMAGES_PER_BATCH] for i in range(0, len(images), IMAGES_PER_BATCH)]
    mine = []
    for turn in range(0, len(batches), rank.world_size):
        stop_if_asked(rank)
        if turn + rank.rank >= len(batches):  # nothing left in the last turn
            continue
        chosen = batches[turn + rank.rank]
        batch = split.batch(chosen).to(device)
        confidence, index = model(**batch.inputs()).float().softmax(-1).max(-1)
        written = model.generate(batch) if hasattr(model, "generate") else [None] * len(batch)
        mine.append((split.pairs_of(chosen), index.cpu().numpy(), confidence.cpu().numpy(), np.array(written)))
    model.train(training)
    shares = [part for share in gather_objects(mine, rank) for part in share]
    if not rank.is_main:
        return pd.DataFrame()
    rows, index, confidence, written = (np.concatenate(column) for column in zip(*shares, strict=True))
    answered = pd.DataFrame(
        {"prediction": np.array(model.answers)[index], "confidence": confidence, "written": written}, index=rows
    ).sort_index()
    records = split.frame.join(answered)
    return records.assign(correct=score(records["prediction"], records))


def records(model: VQAModel, split: Split, blind: BlindBaseline, name: str, rank: Rank) -> pd.DataFrame:
    """`predict`, with the image-blind baseline's answer beside each, ready for predictions.parquet."""
    frame = predict(model, split, rank)
    if frame.empty:
        return frame
    return frame.assign(split=name, blind_correct=score(blind(frame["question"]), frame))


def one_rank(device: torch.device | str = "cpu") -> Rank:
    """The Rank of a process that torchrun did not start."""
    return Rank(0, 0, 1, torch.device(device))


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a finished run's model anew.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    arguments = parser.parse_args()
    try:
        run = Run.open(arguments.run)
        run.results()  # refuses an unfinished run
        if run.config.objective == "alignment":
            raise RunError(f"{run.folder.name} aligned two towers; it answers no questions")
        source = sources.load(run.config.data)
    except (RunError, ConfigError, sources.SourceError) as error:
        sys.exit(f"error: {error}")
    model = load_vqa_model(run.folder / "model")
    split = Split(
        source.splits[arguments.split],
        model.tokenizer,
        model.answers,
        model.config.max_question_tokens,
        model.image_size,
    )
    blind = BlindBaseline(sources.pairs(source.splits["train"]))
    frame = records(model, split, blind, arguments.split, one_rank())
    for result in accuracy_results(frame, arguments.split):
        print(f"{result.metric:24} {result.value:6.2f} {result.unit:6} [{result.low:.2f}, {result.high:.2f}]")


if __name__ == "__main__":
    main()
