"""Jobs: started once, stopped whole, and their failures told in a sentence."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest
import torch

from vqa.config import ConfigError, MeasurementConfig, RunConfig
from vqa.run_folder import Run, RunError
from vqa.study.launch import COMMANDS, Job, LaunchError, launch

LAUNCHER = """
import signal, sys
from pathlib import Path
from vqa.run_folder import Run
from vqa.study.launch import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
launch(Run.open(Path(sys.argv[1])))
"""


def test_a_finished_run_is_reused_without_a_process(trained, capsys):
    run = trained["alone"]
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    started = time.perf_counter()
    assert launch(run) == [run]
    assert time.perf_counter() - started < 1  # a process takes several seconds to import torch
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before
    assert capsys.readouterr().out == f"{run.folder.name}: finished before, reused\n"


def test_a_missing_teacher_comes_before_its_student(tiny_profile, monkeypatch):
    """Without processes: which run is started after which."""
    started = []

    class Done:
        def __init__(self, run, tag):
            started.append(run.folder.name)

        ended = stop = check = lambda self, **_: True

    monkeypatch.setattr("vqa.study.launch.Job", Done)
    student = Run(tiny_profile.run("student", distilled=True, seed=5))
    launch([student], at_once=2)
    assert started == [run.folder.name for run in (*student.needed, student)] and len(started) == 2


def test_a_failing_job_is_reported_in_its_own_sentence(tiny_profile, capsys):
    run = Run(tiny_profile.run("teacher", train__global_batch_size=128))
    with pytest.raises(LaunchError, match=r"^train.global_batch_size 128 is more than the 64 training images$"):
        launch(run)
    assert not run.finished
    assert "Traceback" not in capsys.readouterr().out
    assert "error: train.global_batch_size 128" in (run.folder / "launch.log").read_text()


def test_a_run_that_another_process_writes_is_refused_before_anything_starts(tiny):
    run = Run(tiny.model_copy(update={"seed": 98}))
    with run.writing():
        before = {path: path.read_bytes() for path in run.folder.iterdir()}
        with pytest.raises(RunError, match=f"^{run.folder.name} is being written by another process$"):
            launch(run)
        assert {path: path.read_bytes() for path in run.folder.iterdir()} == before


def test_a_job_without_a_sentence_is_reported_by_its_log_and_can_be_stopped_after_its_end(tiny, monkeypatch):
    monkeypatch.setitem(COMMANDS, RunConfig, "no.such.module")
    run = Run(tiny.model_copy(update={"seed": 99}))
    job = Job(run, tag=False)
    while not job.ended(seconds=0.5):
        pass
    with pytest.raises(LaunchError, match=f"^exit status 1; the log is {run.folder / 'launch.log'}$"):
        job.check()
    assert "No module named" in (run.folder / "launch.log").read_text()
    job.stop()


def test_a_measurement_is_computed_by_the_experiments_and_a_run_by_training(tiny, monkeypatch):
    commands = []
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **_: commands.append(command) or SimpleNamespace(stdout=[])
    )
    for config in (tiny, MeasurementConfig(kind="overfit", runs=[tiny])):
        Job(Run(config), tag=False)
        assert f"{Run(config).folder}/torchrun" in commands[-1]  # torchrun's folder, not one in the temporary folder
    assert [command[command.index("-m", 8) + 1] for command in commands] == ["vqa.training.train", "vqa.experiments"]


@pytest.fixture
def job_that_prints(tiny, monkeypatch):
    """Gives a function that makes a Job of a process which prints the given lines and ends with a status."""

    def start(*lines: str, status: int = 1) -> Job:
        text = "".join(f"{line}\n" for line in lines)
        code = f"import os, sys; print({text!r}, end='', flush=True); os._exit({status})"
        monkeypatch.setattr("vqa.study.launch._command", lambda run: [sys.executable, "-c", code])
        job = Job(Run(tiny.model_copy(update={"seed": 97})), tag=False)
        assert job.ended(seconds=20)
        return job

    return start


def test_progress_goes_on_after_a_warning_and_ends_with_a_failure(job_that_prints, capsys):
    job = job_that_prints(
        "epoch 1",
        "W1125 12:00:00.123 torch/distributed/run.py:852] a warning",
        "[rank0]:[W1125 12:00:00.123 ProcessGroup.cpp:1] another",
        "epoch 2",
        "[rank1]: Traceback (most recent call last):",
        "error: the disk is full",
        "E1125 12:00:01.123 torch/distributed/elastic] failed (exitcode: 1) local_rank: 0 (pid: 1) of binary: python",
    )
    assert capsys.readouterr().out == "epoch 1\nepoch 2\n"
    with pytest.raises(LaunchError, match=r"^the disk is full$"):
        job.check()
    assert "another" in (job.run.folder / "launch.log").read_text()


def test_a_killed_rank_is_named_with_its_signal_and_what_it_usually_means(job_that_prints):
    line = "failed (exitcode: -9) local_rank: 1 (pid: 12) of binary: python"
    job = job_that_prints("epoch 1", f"E1125 12:00:01.123 torch/distributed/elastic] {line}")
    with pytest.raises(LaunchError, match=r"^rank 1 was ended by SIGKILL \(most likely the machine ran out of memory"):
        job.check()


def test_missing_gpus_are_reported_before_anything_starts(tiny_profile):
    ranks = torch.cuda.device_count() + 1
    batch = 16 * ranks
    run = Run(
        tiny_profile.run("teacher", launch__world_size=ranks, launch__device="cuda", train__global_batch_size=batch)
    )
    with pytest.raises(ConfigError, match=f"world_size is {ranks} but this machine has {ranks - 1} GPUs"):
        launch(run)
    assert not run.folder.exists()


def processes(run: Run) -> list[psutil.Process]:
    """torchrun and its ranks: all that have the run's config on their command line."""
    config = str(run.folder / "config.yaml")
    return [process for process in psutil.process_iter(["cmdline"]) if config in (process.info["cmdline"] or [])]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def test_however_the_launcher_ends_no_process_is_left_behind(tiny_profile):
    """A rank needs seconds to import torch and only then can ask to die with torchrun; it must not miss its death."""
    cases = {"killed while ranks start": signal.SIGKILL, "killed": signal.SIGKILL, "interrupted": signal.SIGINT}
    runs, launchers = {}, {}
    for seed, case in enumerate(cases):
        run = runs[case] = Run(tiny_profile.run("teacher", seed, train__epochs=100_000))
        with run.writing():
            pass
        launchers[case] = subprocess.Popen([sys.executable, "-c", LAUNCHER, run.folder], stdout=subprocess.DEVNULL)
    left = {}
    try:
        for case, run in runs.items():
            assert wait_for(lambda run=run: len(processes(run)) == 2, 60)
            if case != "killed while ranks start":
                assert wait_for((run.folder / "metrics.jsonl").exists, 60)
            launchers[case].send_signal(cases[case])
            assert launchers[case].wait(20) != 0
        for case, run in runs.items():
            wait_for(lambda run=run: not processes(run), 10)
            left[case] = processes(run)
    finally:
        for process in [*launchers.values(), *(p for run in runs.values() for p in processes(run))]:
            process.kill()
    assert left == {case: [] for case in cases}
    assert not any(run.finished for run in runs.values())
