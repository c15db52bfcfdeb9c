import re
import sys

import numpy as np
import pytest
import torch

from vqa.evaluation import evaluate
from vqa.evaluation.evaluate import predict
from vqa.run_folder import Run
from vqa.training.objectives import split_for


@pytest.fixture
def command(monkeypatch, capsys):
    """Gives a function that runs `python -m vqa.evaluation.evaluate` with its arguments; what it printed, or its last words."""

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        try:
            evaluate.main()
        except SystemExit as end:
            assert isinstance(end.code, str) and "\n" not in end.code
            return end.code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_finished_run_is_evaluated_to_the_figures_it_recorded(trained, command, split):
    printed = dict(re.findall(r"^(\w+) +(-?[\d.]+) ", command(trained["alone"].folder, "--split", split), re.M))
    recorded = {r.metric: f"{r.value:.2f}" for r in trained["alone"].results() if r.split == split}
    assert printed == recorded and "accuracy" in printed


def test_an_unfinished_run_is_refused_in_a_sentence(tiny, command):
    run = Run(tiny)
    with run.writing():
        pass
    assert command(run.folder) == f"error: {run.folder.name} has not finished"


def test_a_folder_that_is_no_run_is_refused_in_a_sentence(command, tmp_path):
    assert command(tmp_path) == f"error: {tmp_path} is not a run folder: it has no config.yaml"


def test_an_alignment_has_no_answers_to_evaluate(trained, command):
    assert command(trained["aligned"].folder).startswith("error: ")


def test_predictions_are_the_most_probable_answers(model, source, one_rank):
    """The judge takes one image at a time; 96 images are more than one batch."""
    split = split_for(model, source.splits["train"])
    records = predict(model, split, one_rank)
    assert len(records) == len(split.frame) and (records.index == split.frame.index).all()
    with torch.inference_mode():
        logits = torch.cat([model(**split.batch(np.array([image])).inputs()) for image in range(len(split))])
    assert records["prediction"].tolist() == [model.answers[best] for best in logits.argmax(1)]
    assert records["confidence"].to_numpy() == pytest.approx(logits.softmax(1).amax(1).numpy(), abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_the_model_as_it_was(model, source, one_rank, training):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model.train(training), split_for(model, source.splits["test"]), one_rank)
    assert model.training == training
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
