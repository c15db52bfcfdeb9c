"""Faults injected into real jobs, many times each, and what became of them: `make faults` writes reports/faults.csv.

    python tests/faults.py [--trials N] [--only FAULT ...] [--csv FILE]

A job is torchrun's own agent with two ranks under gloo. To save their imports, most trials fork the agent, and the
agent its ranks, from this process, which computes nothing itself; the first kill and the first signal go to ranks
that the torchrun command started. The moments and places of faults are drawn from the number of the trial.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pandas as pd
import psutil
import torch
import torch.distributed.run
from torch.distributed.launcher.api import elastic_launch

import conftest  # sets the environment, and so comes before vqa
from vqa import die_with_parent
from vqa import run_folder as runs
from vqa.config import ROOT, RunConfig, load_profile, save_yaml
from vqa.data import easy_vqa, source
from vqa.run_folder import Run
from vqa.training import checkpoint, objectives
from vqa.training import train as training

SHARED = runs.RUNS
REPORT = ROOT / "reports" / "faults.csv"
EXACT, OTHERS = 20, 10  # trials
GONE_SECONDS = 10
PATIENCE = 300  # seconds until a trial that does not get on is given up
WALL = ["questions_per_second", "step_seconds", "seconds"]  # of metrics.jsonl: they depend on the hour
CONFIG = load_profile("default", conftest.TINY).run(
    "teacher",
    launch__world_size=2,
    model__dropout=0.1,
    train__epochs=3,
    train__lr=5e-3,
    train__checkpoint_every_steps=2,
)
STEPS = 12  # of CONFIG: four an epoch
FORK = multiprocessing.get_context("fork")


class Place:
    """A run folder of its own for one trial, with what its jobs said."""

    def __init__(self, config: RunConfig = CONFIG, copy: "Place | None" = None):
        self.root = Path(tempfile.mkdtemp(dir=SHARED))
        (self.root / "data").symlink_to(SHARED / "data")
        self.config = config
        self.sessions: set[int] = set()
        self.run = Run(config)
        self.run.folder = self.root / self.run.folder.name
        if copy:
            shutil.copytree(copy.run.folder, self.run.folder)
        save_yaml(config, self.root / "config.yaml")

    @property
    def checkpoints(self) -> Path:
        return self.run.folder / "checkpoints"

    def lines(self) -> int:
        """Lines of metrics.jsonl: one a step and one an epoch."""
        path = self.run.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def said(self) -> str:
        return "".join(path.read_text() for path in self.root.glob("said*"))

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def hashes(self) -> dict[str, str]:
        """Of every file of every checkpoint."""
        files = (path for path in self.checkpoints.rglob("*") if path.is_file())
        return {str(path.relative_to(self.checkpoints)): checkpoint.sha256(path) for path in files}

    def steps_lost(self, lines: int) -> int:
        """How many of the steps behind `lines` of metrics.jsonl were taken again after the last resumption."""
        found = re.findall(r"going on after step (\d) of epoch (\d)", (self.run.folder / "log.txt").read_text())
        kept = (int(found[-1][1]) - 1) * 5 + int(found[-1][0]) if found else 0  # four steps and a validation an epoch
        return max(lines - kept, 0)

    def check_end(self, undisturbed: "Place") -> None:
        """Raises AssertionError unless weights, answers and records are those of the `undisturbed` run."""
        assert self.run.finished, self.said()[-2000:]
        for name in ("model/model.safetensors", "checkpoints/best.safetensors"):
            assert checkpoint.sha256(self.run.folder / name) == checkpoint.sha256(undisturbed.run.folder / name), name
        pd.testing.assert_frame_equal(self.run.predictions(), undisturbed.run.predictions())
        ours, theirs = (place.run.metrics().drop(columns=WALL) for place in (self, undisturbed))
        pd.testing.assert_frame_equal(ours, theirs)
        assert not checkpoint.steps(self.checkpoints)

    def check_refusal(self, sentence: str) -> None:
        """Raises AssertionError unless the ranks said one sentence, which matches, and nothing else went wrong."""
        assert len(self.errors()) == 1 and re.search(sentence, self.errors()[0]), self.said()[-2000:]
        assert "Traceback" not in self.said(), self.said()[-2000:]
        assert not self.run.finished and not list(self.root.glob("*/checkpoints/.*"))

    def left(self) -> list[psutil.Process]:
        """The processes that live of all jobs started here."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with suppress(ProcessLookupError, psutil.Error):
                named = str(self.root) in " ".join(process.info["cmdline"] or [])
                if (named or os.getsid(process.pid) in self.sessions) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def remove(self) -> None:
        for process in self.left():  # of a trial that failed
            process.kill()
        shutil.rmtree(self.root, ignore_errors=True)


class Job:
    """torchrun with its ranks, training at a Place; `plant` is called in every rank before it starts."""

    def __init__(
        self,
        place: Place,
        restarts: int = 0,
        plant: Callable[[], None] = lambda: None,
        command: bool = False,
        arguments: tuple[str, ...] = (),
    ):
        self.place, self.command = place, command
        ranks = place.config.launch.world_size
        given = [
            *(
                "--standalone",
                "--nproc-per-node",
                str(ranks),
                "--max-restarts",
                str(restarts),
                "-m",
                "vqa.training.train",
            ),
            *(arguments or ("--config", str(place.root / "config.yaml"))),
        ]
        if command:
            with (place.root / "said-command.txt").open("a") as file:
                self.process = psutil.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *given],
                    env=os.environ | {"VQA_RUNS": str(place.root), "PYTHONUNBUFFERED": "1"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        else:
            self.process = FORK.Process(target=_agent, args=(given, place.root, plant))
            self.process.start()
        place.sessions.add(self.pid)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ranks(self) -> list[int]:
        """The pids of the ranks, in order, once all have started to import or run."""
        if self.command:
            found = {}
            for child in psutil.Process(self.pid).children():
                with suppress(psutil.Error):
                    found[child.environ().get("RANK")] = child.pid
            return [found[str(rank)] for rank in range(self.place.config.launch.world_size)]
        return [
            int((self.place.root / f"pid-{rank}").read_text()) for rank in range(self.place.config.launch.world_size)
        ]

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status."""
        if self.command:
            return self.process.wait(seconds)
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s\n{self.place.said()[-2000:]}"
        return self.process.exitcode

    def reaches(self, condition: Callable[[], object], seconds: float = PATIENCE, every: float = 0.002) -> None:
        """Return once `condition` holds. Raises AssertionError if this job ends, or time does, without it."""
        wait_for(lambda: condition() or not psutil.pid_exists(self.pid) or self._ended(), seconds, every)
        assert condition(), self.place.said()[-2000:]

    def _ended(self) -> bool:
        return self.process.poll() is not None if self.command else not self.process.is_alive()

    def check_gone(self) -> None:
        """Raises AssertionError if a process of this job lives GONE_SECONDS from now."""
        wait_for(lambda: not self.place.left(), GONE_SECONDS, every=0.1)
        assert not self.place.left(), self.place.left()


def _agent(given: list[str], root: Path, plant: Callable[[], None]) -> None:
    """torchrun's main, in a process that has its imports, with ranks forked from it."""
    os.setsid()
    die_with_parent()
    _speak(root / "agent.txt")
    runs.RUNS = root

    def forking(config, entrypoint):
        def rank(*arguments: str) -> None:
            _rank(root, plant, *arguments)

        config.start_method = "fork"
        return elastic_launch(config, rank)

    with mock.patch.object(torch.distributed.run, "elastic_launch", forking):
        torch.distributed.run.main(given)


def _rank(root: Path, plant: Callable[[], None], *given: str) -> None:
    """`python -m vqa.training.train`, in a forked process."""
    rank = os.environ["RANK"]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a new process: the agent's handler came with the fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (root / f"pid-{rank}").write_text(str(os.getpid()))
    _speak(root / f"said-{rank}.txt")
    sys.argv = list(given[given.index("vqa.training.train") :])
    plant()
    training.main()


def _speak(path: Path) -> None:
    """Send this process's output to the end of `path`."""
    file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)


def wait_for(condition: Callable[[], object], seconds: float, every: float = 0.002) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(every)
    return bool(condition())


@contextmanager
def place_of(*arguments, **named):
    place = Place(*arguments, **named)
    try:
        yield place
    finally:
        place.remove()


def finished(place: Place, **named) -> None:
    job = Job(place, **named)
    assert job.wait() == 0, place.said()[-2000:]


@functools.cache
def undisturbed() -> Place:
    """A run that nothing happened to."""
    place = Place()
    finished(place)
    return place


def at_step(number: int, act: Callable[[], None], rank: int) -> Callable[[], None]:
    """What, planted, does `act` at `rank` in the middle of the step `number` of the run, counted from 1."""

    def plant() -> None:
        update = training.Trainer.update

        def counted(trainer, batches, images):
            if trainer.schedule.last_epoch + 1 == number and os.environ["RANK"] == str(rank):
                act()
            return update(trainer, batches, images)

        training.Trainer.update = counted

    return plant


def signal_self(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@functools.cache
def halfway() -> Place:
    """A run that was stopped in step 7 of 12 and has two checkpoints, of steps 6 and 7."""
    place = Place()
    assert Job(place, plant=at_step(7, signal_self, rank=1)).wait() != 0
    assert [path.name for path in checkpoint.steps(place.checkpoints)] == ["step-6", "step-7"], place.said()[-2000:]
    return place


def regained(place: Place, lines: int) -> bool:
    return place.lines() > lines or place.run.finished


# Each fault is a function of the trial's random numbers and its count. It gives how many steps were lost, and
# the seconds from the fault until the run was again where it had been, or had ended with its sentence.
Outcome = tuple[int, float]


def kill_in_epoch(random: np.random.Generator, trial: int) -> Outcome:
    return _killed(random, command=trial == 1)


def kill_in_checkpoint(random: np.random.Generator, trial: int) -> Outcome:
    return _killed(random, in_checkpoint=True)


def _killed(random: np.random.Generator, command: bool = False, in_checkpoint: bool = False) -> Outcome:
    """torchrun --max-restarts brings the gang back by itself."""
    with place_of() as place:
        job = Job(place, restarts=3, command=command)
        moment = int(random.integers(1, STEPS - 2))
        job.reaches(lambda: place.lines() >= moment)
        if in_checkpoint:  # the main rank writes it
            job.reaches(lambda: any(place.checkpoints.glob(".step-*")), every=0.0002)
            victim = 0
        else:
            time.sleep(random.uniform(0, 0.03))
            victim = int(random.integers(2))
        os.kill(job.ranks()[victim], signal.SIGKILL)
        started, lines = time.monotonic(), place.lines()
        job.reaches(lambda: regained(place, lines))
        seconds = time.monotonic() - started
        assert job.wait() == 0, place.said()[-2000:]
        job.check_gone()
        place.check_end(undisturbed())
        return place.steps_lost(lines), seconds


def sigterm_in_training(random: np.random.Generator, trial: int) -> Outcome:
    """To torchrun or to either rank."""
    with place_of() as place:
        outcome = _stopped(place, random, int(random.integers(1, STEPS - 2)), command=trial == 1)
        place.check_end(undisturbed())
        return outcome


def _stopped(place: Place, random: np.random.Generator, moment: int, command: bool = False) -> Outcome:
    """Stop the job at `place` once it has `moment` lines, and start it again."""
    job = Job(place, command=command)
    job.reaches(lambda: place.lines() >= moment)
    time.sleep(random.uniform(0, 0.03))
    os.kill(random.choice([job.pid, *job.ranks()]), signal.Signals(random.choice([signal.SIGTERM, signal.SIGINT])))
    started = time.monotonic()
    _check_stop(job)
    lines = place.lines()
    again = Job(place)
    again.reaches(lambda: regained(place, lines))
    seconds = time.monotonic() - started
    assert again.wait() == 0, place.said()[-2000:]
    again.check_gone()
    return place.steps_lost(lines), seconds


def _check_stop(job: Job) -> None:
    assert job.wait() != 0
    job.check_gone()
    errors = job.place.errors()
    assert len(errors) == 1 and "stopped by a signal; start again to go on from step-" in errors[0], errors


def sigterm_in_evaluation(random: np.random.Generator, trial: int) -> Outcome:
    """At either rank, in one of three validations or in the last evaluation of both splits."""
    number, rank = int(random.integers(1, 6)), int(random.integers(2))

    def plant() -> None:
        count, predict = itertools.count(1), objectives.predict_beside_blind

        def signalled(*arguments):
            if next(count) == number and os.environ["RANK"] == str(rank):
                signal_self()
            return predict(*arguments)

        objectives.predict_beside_blind = signalled

    with place_of() as place:
        job = Job(place, plant=plant)
        job.wait()
        started, lines = time.monotonic(), place.lines()
        _check_stop(job)
        finished(place)
        place.check_end(undisturbed())
        return place.steps_lost(lines), time.monotonic() - started


def resume_twice(random: np.random.Generator, trial: int) -> Outcome:
    """Once after a signal, once after kill -9, each at either rank."""
    first, second = np.sort(random.choice(np.arange(1, STEPS), 2, replace=False))
    kill = functools.partial(signal_self, signal.SIGKILL)
    with place_of() as place:
        _check_stop(Job(place, plant=at_step(first, signal_self, int(random.integers(2)))))
        killed = Job(place, plant=at_step(second, kill, int(random.integers(2))))
        assert killed.wait() != 0
        killed.check_gone()
        started, lines = time.monotonic(), place.lines()
        last = Job(place)
        last.reaches(lambda: regained(place, lines))
        seconds = time.monotonic() - started
        assert last.wait() == 0, place.said()[-2000:]
        place.check_end(undisturbed())
        return place.steps_lost(lines), seconds


@contextmanager
def little_room(place: Place, room: int):
    """Checkpoints of `place` on a disk with `room` bytes left, or what to plant in ranks for want of such a disk."""
    mounted = False
    if os.geteuid() == 0:
        held = place.root / "held"
        shutil.move(place.checkpoints, held)
        place.checkpoints.mkdir()
        options = ["-o", f"size={4096 * (2 + sum(-(-f.stat().st_size // 4096) + 1 for f in held.rglob('*')))}"]
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", place.checkpoints], check=False
        ).returncode
        if not mounted:
            place.checkpoints.rmdir()
            shutil.move(held, place.checkpoints)
    if mounted:
        for path in held.iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, place.checkpoints / path.name)
        free = shutil.disk_usage(place.checkpoints).free
        (place.checkpoints / "ballast").write_bytes(bytes(max(free - room, 0)))
    try:
        yield (lambda: None) if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    finally:
        if mounted:
            subprocess.run(["umount", place.checkpoints], check=True)


def disk_full(random: np.random.Generator, trial: int) -> Outcome:
    """At the next checkpoint, after room for any part of it."""
    size = sum(path.stat().st_size for path in (halfway().checkpoints / "step-7").iterdir())
    with place_of(copy=halfway()) as place, little_room(place, int(random.uniform(0.05, 0.6) * size)) as plant:
        before = place.hashes()
        seconds = _refused(
            Job(place, plant=plant),
            "error: cannot write .*(step-8|best.safetensors): (No space left|File too large|.*os error)",
        )
        assert {name: place.hashes()[name] for name in before if name.startswith("step")} == {
            name: value for name, value in before.items() if name.startswith("step")
        }
        return 0, seconds


def _refused(job: Job, sentence: str) -> float:
    """Seconds until `job` has ended with one sentence that matches and left no process."""
    started = time.monotonic()
    assert job.wait() != 0, job.place.said()[-2000:]
    seconds = time.monotonic() - started
    job.place.check_refusal(sentence)
    job.check_gone()
    return seconds


def _damaged(random: np.random.Generator, damage: Callable[[bytes], bytes]) -> Outcome:
    """`damage` done to any file of the newest checkpoint: the one before is gone on from."""
    with place_of(copy=halfway()) as place:
        files = sorted((place.checkpoints / "step-7").iterdir())
        path = files[random.integers(len(files))]
        whole = path.read_bytes()
        path.unlink()  # not written over: other checkpoints have links to the same best weights
        path.write_bytes(damage(whole))
        started, lines = time.monotonic(), place.lines()
        job = Job(place)
        job.reaches(lambda: regained(place, lines))
        seconds = time.monotonic() - started
        assert job.wait() == 0, place.said()[-2000:]
        log = (place.run.folder / "log.txt").read_text()
        assert "checkpoint step-7 is damaged" in log and "step-6 found" in log, log
        place.check_end(undisturbed())
        return place.steps_lost(lines), seconds


def cut_to_nothing(random: np.random.Generator, trial: int) -> Outcome:
    return _damaged(random, lambda whole: b"")


def cut_in_half(random: np.random.Generator, trial: int) -> Outcome:
    return _damaged(random, lambda whole: whole[: len(whole) // 2])


def cut_last_byte(random: np.random.Generator, trial: int) -> Outcome:
    return _damaged(random, lambda whole: whole[:-1])


def flipped_bit(random: np.random.Generator, trial: int) -> Outcome:
    def flip(whole: bytes) -> bytes:
        changed = bytearray(whole)
        changed[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        return bytes(changed)

    return _damaged(random, flip)


def infinite_loss(random: np.random.Generator, trial: int) -> Outcome:
    """An infinite loss, or an infinite gradient under a finite loss, at one rank."""
    rank, in_loss = str(random.integers(2)), bool(random.integers(2))
    step = int(random.integers(8, STEPS + 1))

    def plant() -> None:
        update = training.Trainer.update

        def spoiled(trainer, batches, images):
            if trainer.schedule.last_epoch + 1 == step and os.environ["RANK"] == rank:
                loss = trainer.objective.loss
                trainer.objective.loss = lambda *given: _spoiled(loss(*given), in_loss)
            return update(trainer, batches, images)

        training.Trainer.update = spoiled

    with place_of(copy=halfway()) as place:
        epoch, within = divmod(step - 1, 4)
        last = max(7, step - 1 - (step - 1) % 2)
        seconds = _refused(
            Job(place, plant=plant),
            f"error: epoch {epoch + 1}, step {within + 1}: the loss or the gradient is not finite; lower train.lr or "
            rf"look at questions [\d, -]+; the last good checkpoint is step-{last}$",
        )
        assert checkpoint.steps(place.checkpoints)[-1].name == f"step-{last}"
        assert not checkpoint.damage(place.checkpoints / f"step-{last}")
        return 0, seconds


def _spoiled(loss: torch.Tensor, in_loss: bool) -> torch.Tensor:
    if in_loss:
        return loss + torch.inf  # whose gradient is finite
    loss.register_hook(lambda gradient: gradient * torch.inf)
    return loss


def wrong_key(random: np.random.Generator, trial: int) -> Outcome:
    return _wrong("data.sorce=x", "unknown key data.sorce; did you mean source")


def wrong_type(random: np.random.Generator, trial: int) -> Outcome:
    return _wrong("train.teacher.epochs=many", "train.teacher.epochs is 'many': input should be a valid integer")


def _wrong(override: str, sentence: str) -> Outcome:
    with place_of() as place:
        return 0, _refused(Job(place, arguments=("--profile", "smoke", "--set", override)), f"^error: .*{sentence}")


def two_runs_in_one_folder(random: np.random.Generator, trial: int) -> Outcome:
    """The second is refused, the first is not disturbed."""
    with place_of() as place:
        first = Job(place, plant=at_step(int(random.integers(1, 6)), lambda: time.sleep(3), rank=0))
        first.reaches((place.run.folder / "env.json").is_file)
        other = Place()
        other.run.folder.symlink_to(place.run.folder)
        try:
            seconds = _refused(Job(other), "error: .* is being written by another process$")
        finally:
            other.remove()
        assert first.wait() == 0, place.said()[-2000:]
        place.check_end(undisturbed())
        return 0, seconds


def output_under_a_file(random: np.random.Generator, trial: int) -> Outcome:
    with place_of() as place:
        place.run.folder.write_text("in the way")
        return 0, _refused(Job(place), "error: cannot write .*: (File exists|Not a directory)")


def more_ranks_than_gpus(random: np.random.Generator, trial: int) -> Outcome:
    ranks = torch.cuda.device_count() + 1
    launch = CONFIG.launch.model_copy(update={"device": "cuda", "world_size": ranks})
    with place_of(CONFIG.model_copy(update={"launch": launch})) as place:
        return 0, _refused(Job(place), f"error: launch.world_size is {ranks} but this machine has {ranks - 1} GPUs")


def corrupt_image(random: np.random.Generator, trial: int) -> Outcome:
    return _bad_image(random, lambda path: path.write_bytes(path.read_bytes()[:60]))


def text_for_an_image(random: np.random.Generator, trial: int) -> Outcome:
    return _bad_image(random, lambda path: path.write_text("not an image"))


def deleted_image(random: np.random.Generator, trial: int) -> Outcome:
    return _bad_image(random, lambda path: path.unlink())


def _bad_image(random: np.random.Generator, spoil: Callable[[Path], object]) -> Outcome:
    """One image of a copy of the data, found before any rank gets its share."""
    with place_of() as place:
        (place.root / "data").unlink()
        data = place.root / "easy_vqa"
        shutil.copytree(easy_vqa.package_data(), data, copy_function=os.link)
        images = sorted(data.rglob("*.png"))
        path = images[random.integers(len(images))]
        content = path.read_bytes()
        path.unlink()  # the link, not the original
        path.write_bytes(content)
        spoil(path)

        def plant() -> None:
            source.RUNS = place.root
            easy_vqa.package_data = lambda: data
            easy_vqa.fingerprint = lambda: "spoiled"

        return 0, _refused(Job(place, plant=plant), f"error: 1 of [14]000 images are .*{path}")


def hub_offline(random: np.random.Generator, trial: int) -> Outcome:
    encoder = {
        "kind": "bert",
        "pretrained": "google-bert/bert-base-uncased",
        "revision": "86b5e0934494bd15c9632b12f734a8a67f723594",
    }
    text = CONFIG.model.text_encoder.model_validate(encoder)
    model = CONFIG.model.model_copy(update={"text_encoder": text})
    with place_of(CONFIG.model_copy(update={"model": model})) as place:
        return 0, _refused(Job(place), "error: .*google-bert/bert-base-uncased")


CELL = """
import os
from pathlib import Path
from vqa import run_folder as runs
from vqa.study.launch import launch
runs.RUNS = Path({root!r})
os.environ["VQA_RUNS"] = {root!r}  # the ranks' own
launch(runs.Run.open(Path({folder!r})))
"""


def _papermill(random: np.random.Generator, number: int) -> Outcome:
    """At any time from the start of the ranks into training; papermill's kernel and the job have to end as well."""
    config = CONFIG.model_copy(
        update={
            "launch": CONFIG.launch.model_copy(update={"world_size": 1}),
            "train": CONFIG.train.model_copy(update={"epochs": 10_000}),
        }
    )
    with place_of(config) as place:
        place.run.folder.mkdir()
        save_yaml(config, place.run.folder / "config.yaml")
        cell = CELL.format(root=str(place.root), folder=str(place.run.folder))
        notebook = place.root / "cell.ipynb"
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=metadata), notebook)
        command = [sys.executable, "-m", "papermill", notebook, place.root / "out.ipynb", "--no-progress-bar"]
        with (place.root / "papermill.txt").open("w") as file:
            process = psutil.Popen(
                [str(part) for part in command],
                env=os.environ | {"JUPYTER_RUNTIME_DIR": str(place.root)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(
                    signal.SIGINT, signal.default_int_handler
                ),  # not ignored, as under nohup
            )
        config_path = str(place.run.folder / "config.yaml")

        def ranks() -> list[psutil.Process]:
            return [p for p in psutil.process_iter(["cmdline"]) if config_path in (p.info["cmdline"] or [])]

        assert wait_for(lambda: len(ranks()) == 2, PATIENCE, every=0.1), (place.root / "papermill.txt").read_text()
        moment = int(random.integers(-20, 20))
        if moment >= 0:
            assert wait_for(lambda: place.lines() > moment, PATIENCE)
        process.send_signal(number)
        started = time.monotonic()
        assert process.wait(30) != 0
        assert wait_for(lambda: not ranks(), GONE_SECONDS, every=0.05), ranks()
        assert wait_for(lambda: not place.left(), GONE_SECONDS, every=0.05), place.left()
        assert not place.run.finished
        return 0, time.monotonic() - started


def papermill_sigint(random: np.random.Generator, trial: int) -> Outcome:
    return _papermill(random, signal.SIGINT)


def papermill_sigterm(random: np.random.Generator, trial: int) -> Outcome:
    return _papermill(random, signal.SIGTERM)


def papermill_sigkill(random: np.random.Generator, trial: int) -> Outcome:
    return _papermill(random, signal.SIGKILL)


FAULTS: dict[str, tuple[Callable[[np.random.Generator, int], Outcome], int]] = {
    "kill -9 of a rank in an epoch": (kill_in_epoch, EXACT),
    "kill -9 of a rank in a checkpoint": (kill_in_checkpoint, EXACT),
    "SIGTERM or SIGINT in training": (sigterm_in_training, EXACT),
    "SIGTERM in evaluation": (sigterm_in_evaluation, EXACT),
    "stopped, resumed, killed, resumed": (resume_twice, EXACT),
    "disk full at a checkpoint": (disk_full, OTHERS),
    "checkpoint cut to 0 bytes": (cut_to_nothing, OTHERS),
    "checkpoint cut in half": (cut_in_half, OTHERS),
    "checkpoint without its last byte": (cut_last_byte, OTHERS),
    "checkpoint with a flipped bit": (flipped_bit, OTHERS),
    "Inf in loss or gradient of one rank": (infinite_loss, OTHERS),
    "wrong key": (wrong_key, OTHERS),
    "wrong type": (wrong_type, OTHERS),
    "two runs in one folder": (two_runs_in_one_folder, OTHERS),
    "output path under a file": (output_under_a_file, OTHERS),
    "more ranks than GPUs": (more_ranks_than_gpus, OTHERS),
    "corrupt PNG": (corrupt_image, OTHERS),
    "text file named .png": (text_for_an_image, OTHERS),
    "deleted image": (deleted_image, OTHERS),
    "hub offline, empty cache": (hub_offline, OTHERS),
    "papermill interrupted": (papermill_sigint, OTHERS),
    "papermill SIGTERM": (papermill_sigterm, OTHERS),
    "papermill SIGKILL": (papermill_sigkill, OTHERS),
}


def inject(name: str, trials: int | None) -> dict:
    """A row of the table: what became of `trials` of fault `name`, as many as its bar asks for if None."""
    fault, bar = FAULTS[name]
    outcomes: list[Outcome] = []
    for trial in range(trials or bar):
        try:
            outcomes.append(fault(np.random.default_rng([trial, *name.encode()]), trial))
            print(f"{name}, trial {trial}: {outcomes[-1]}", flush=True)
        except (AssertionError, OSError, LookupError, subprocess.SubprocessError, psutil.Error) as error:
            print(f"{name}, trial {trial}: {type(error).__name__}: {error}", flush=True)
    row = {
        "fault": name,
        "trials": trials or bar,
        "survived": len(outcomes),
        "steps_lost": max((lost for lost, _ in outcomes), default=None),
        "seconds": float(np.median([seconds for _, seconds in outcomes])) if outcomes else None,
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Inject faults into real jobs and write what became of them.")
    parser.add_argument("--trials", type=int, help="of each fault; 20 or 10 if not given")
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--csv", type=Path, default=REPORT)
    arguments = parser.parse_args()
    try:
        building = FORK.Process(target=source.load, args=(CONFIG.data,))  # its threads are not for forking
        building.start()
        building.join()
        easy_vqa.fingerprint = functools.cache(easy_vqa.fingerprint)  # hashing 5,000 files is a third of a short job
        easy_vqa.fingerprint()
        rows = []
        for name in arguments.only:
            rows.append(inject(name, arguments.trials))
            pd.DataFrame(rows).to_csv(arguments.csv, index=False, float_format="%.2f")
    finally:
        shutil.rmtree(SHARED, ignore_errors=True)
    sys.exit(any(row["survived"] < row["trials"] for row in rows))


if __name__ == "__main__":
    main()
