"""A run that was stopped and goes on, in this process; with ranks, kills and full disks see faults.py."""

import os
import shutil
import signal
from dataclasses import replace

import pandas as pd
import pytest

from vqa.run_folder import Run
from vqa.training import checkpoint, objectives
from vqa.training import train as training
from vqa.training.checkpoint import CheckpointError
from vqa.training.train import Trainer, TrainingError

WALL = ["questions_per_second", "step_seconds", "seconds"]  # of metrics.jsonl: they depend on the hour


@pytest.fixture
def signal_at(monkeypatch):
    """Gives a function that sends this process SIGTERM in the middle of step `number`, counted from 1."""

    def plant(number: int) -> None:
        taken, update = [], Trainer.update

        def counted(trainer, batches, images):
            taken.append(len(images))
            if len(taken) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(trainer, batches, images)

        monkeypatch.setattr(Trainer, "update", counted)

    return plant


def config_of(tiny_profile, kind: str):
    """Dropout draws from the random state; the ResNet has buffers; a distilled student's network has projections."""
    role = "student" if kind == "distilled" else kind
    changes = {"model__dropout": 0.1, "train__gradient_accumulation_steps": 2, "train__checkpoint_every_steps": 3}
    return tiny_profile.run(role, distilled=kind == "distilled", **changes)


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_stopped_run_ends_with_the_bits_of_an_undisturbed_one(kind, stop, tiny_profile, train_here, signal_at):
    """Of two epochs of four steps; stop 4 falls between an epoch's last step and its validation."""
    config = config_of(tiny_profile, kind)
    undisturbed = train_here(config, "undisturbed")
    signal_at(stop)
    with pytest.raises(TrainingError, match=f"^stopped by a signal; start again to go on from step-{stop}$"):
        train_here(config, "stopped")
    stopped = train_here(config, "stopped")
    for name in ("model/model.safetensors", "checkpoints/best.safetensors"):
        assert checkpoint.sha256(stopped.folder / name) == checkpoint.sha256(undisturbed.folder / name)
    pd.testing.assert_frame_equal(stopped.predictions(), undisturbed.predictions())
    pd.testing.assert_frame_equal(stopped.metrics().drop(columns=WALL), undisturbed.metrics().drop(columns=WALL))
    assert f"step-{stop} found" in (stopped.folder / "log.txt").read_text()
    assert checkpoint.steps(stopped.folder / "checkpoints") == []  # a finished run needs them no more


def test_a_distilled_student_goes_on_with_its_projections(
    tiny_profile, untrained_teacher, one_rank, signal_at, tmp_path
):
    """`keep_untrained` has set the place of runs; a second one starts as a copy, so that the teacher is in both."""
    run = Run(config_of(tiny_profile, "distilled"))

    def train() -> str:
        with run.writing():
            training.train(run.config, run, one_rank)
        return checkpoint.sha256(run.folder / "model" / "model.safetensors")

    undisturbed = train()
    shutil.rmtree(run.folder)
    signal_at(2)
    with pytest.raises(TrainingError, match=r"^stopped by a signal"):
        train()
    assert train() == undisturbed


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tiny_profile, train_here, monkeypatch):
    """Of two epochs of four steps, at every third: none for the end of the first epoch."""
    saved, save = [], checkpoint.save

    def noted(folder, step, *state):
        saved.append(step)
        return save(folder, step, *state)

    monkeypatch.setattr(checkpoint, "save", noted)
    train_here(config_of(tiny_profile, "teacher"), "undisturbed")
    assert saved == [3, 6, 8]


def test_a_stop_in_the_last_evaluation_keeps_the_last_checkpoint(tiny_profile, train_here, monkeypatch):
    """By then the model holds the best weights, which must not be saved as those to train on."""
    config = tiny_profile.run("teacher")
    undisturbed = train_here(config, "undisturbed")
    test = objectives.Answers.test

    def signalled(objective, run):
        os.kill(os.getpid(), signal.SIGTERM)
        return test(objective, run)

    monkeypatch.setattr(objectives.Answers, "test", signalled)
    with pytest.raises(TrainingError, match=r"go on from step-8$"):
        train_here(config, "stopped")
    weights = Run(config).folder / "checkpoints" / "step-8" / "weights.safetensors"
    before = checkpoint.sha256(weights)
    monkeypatch.setattr(objectives.Answers, "test", test)
    assert checkpoint.sha256(weights) == before
    stopped = train_here(config, "stopped")
    pd.testing.assert_frame_equal(stopped.predictions(), undisturbed.predictions())


def test_other_data_is_refused(tiny_profile, train_here, signal_at, monkeypatch):
    config = config_of(tiny_profile, "teacher")
    signal_at(2)
    with pytest.raises(TrainingError):
        train_here(config, "stopped")
    load = training.load_data
    monkeypatch.setattr(training, "load_data", lambda *given: replace(load(*given), fingerprint="other"))
    with pytest.raises(CheckpointError, match=r"step-2 belongs to data .*, not other: remove .* to start anew$"):
        train_here(config, "stopped")
