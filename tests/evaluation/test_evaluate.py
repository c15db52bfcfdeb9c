import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from vqa.data.batches import Split
from vqa.distributed import Rank
from vqa.evaluation.evaluate import outputs, predict
from vqa.run_folder import Run


def command(*arguments) -> subprocess.CompletedProcess:
    """`python -m vqa.evaluation.evaluate` with its arguments, in a shell of its own, where no process group exists."""
    return subprocess.run(
        [sys.executable, "-m", "vqa.evaluation.evaluate", *map(str, arguments)], capture_output=True, text=True
    )


def refused(*arguments) -> str:
    done = command(*arguments)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    return done.stderr.strip()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_finished_run_is_evaluated_to_the_figures_it_recorded(trained, split):
    done = command(trained["alone"].folder, "--split", split)
    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r"^(\w+) +(-?[\d.]+) ", done.stdout, re.M))
    recorded = {r.metric: f"{r.value:.2f}" for r in trained["alone"].results() if r.split == split}
    assert printed == recorded and "accuracy" in printed


def test_an_unfinished_run_is_refused_in_a_sentence(tiny):
    run = Run(tiny)
    with run.writing():
        pass
    assert refused(run.folder) == f"error: {run.folder.name} has not finished"


def test_a_folder_that_is_no_run_is_refused_in_a_sentence(tmp_path):
    assert refused(tmp_path) == f"error: {tmp_path} is not a run folder: it has no config.yaml"


def test_an_alignment_has_no_answers_to_evaluate(trained):
    assert "aligned two towers; it answers no questions" in refused(trained["aligned"].folder)


def test_predictions_are_the_most_probable_answers(model, source, one_rank):
    """The judge takes one image at a time; 96 images are more than one batch."""
    split = Split(source.splits["train"], model.processor)
    records = predict(model, split, one_rank)
    assert len(records) == len(split.frame) and (records.index == split.frame.index).all()
    with torch.inference_mode():
        logits = torch.cat([model(**split.batch(np.array([image])).inputs()).logits for image in range(len(split))])
    assert records["prediction"].tolist() == [model.processor.answers[best] for best in logits.argmax(1)]
    assert records["confidence"].to_numpy() == pytest.approx(logits.softmax(1).amax(1).numpy(), abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_the_model_as_it_was(model, source, one_rank, training):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model.train(training), Split(source.splits["test"], model.processor), one_rank)
    assert model.training == training
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_whole_batches_and_miss_none(source, processor, world_size, monkeypatch):
    """Two batches: of three ranks the last gets nothing. A mirrored image is the mirrored pixels."""
    monkeypatch.setattr("vqa.evaluation.evaluate.IMAGES_PER_BATCH", 40)
    monkeypatch.setattr("vqa.evaluation.evaluate.stop_if_asked", lambda rank: None)
    split, cpu = Split(source.splits["train"], processor), torch.device("cpu")
    ranks = [Rank(number, number, world_size, cpu) for number in range(world_size)]
    shares = [list(outputs(lambda **inputs: inputs["pixel_values"], split, cpu, rank)) for rank in ranks]
    met = [batch.image_number.tolist() for share in shares for batch, _ in share]
    assert sorted(met) == [list(range(40)), list(range(40, 64))] and len(split) == 64
    mirrored = outputs(lambda **inputs: inputs["pixel_values"], split, cpu, flip=np.array([True, False]))
    for (batch, pixels), (_, plain) in zip(mirrored, outputs(lambda **i: i["pixel_values"], split, cpu), strict=True):
        assert pixels.equal(plain.flip(-1)) and (batch.view == 1).all()
