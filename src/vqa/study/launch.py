"""Start torchrun jobs from a notebook: stream their logs, reuse what is finished, leave no orphan.

    python -m vqa.study.launch PROFILE

says in one sentence if this machine cannot run a profile, before any kernel or job starts.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from vqa import AGENT, die_with_parent
from vqa.config import ROOT, ConfigError, LaunchConfig, MeasurementConfig, RunConfig, load_profile, save_yaml
from vqa.distributed import check_devices
from vqa.run_folder import Run, code_digest

COMMANDS = {RunConfig: "vqa.training.train", MeasurementConfig: "vqa.experiments"}  # what computes a config
GRACE_SECONDS = 10
WARNING = re.compile(r"(\[rank\d+\]:)?\s*\[?W\d{4} ")  # of PyTorch or torchrun, a line by itself
FAILURE = re.compile(r"\[rank\d+\]:|\[?E\d{4} |Traceback|error: ")  # from here on torchrun speaks of a failure
KILLED = re.compile(r"\(exitcode: -(\d+)\) local_rank: (\d+)")
CAUSES = {
    signal.SIGKILL: "the machine ran out of memory, or somebody killed it",
    signal.SIGBUS: "the disk or /dev/shm is full",
    signal.SIGSEGV: "a library or a driver has a defect",
    signal.SIGABRT: "a library gave up; its last words are in the log",
    signal.SIGTERM: "somebody asked it to stop",
}


class LaunchError(RuntimeError):
    """A job that failed; its message is the job's own sentence, or where to read its log."""


def launch(runs: Run | Sequence[Run], at_once: int = 1) -> list[Run]:
    """Bring every one of `runs` to its end, `at_once` at a time; those already finished are reused.

    Raises LaunchError when a job fails; the others are stopped first. Interrupting (Ctrl-C, the
    notebook's stop button) stops all jobs and their ranks.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    for run in runs:
        check_devices(run.config.launch)
    if needed := {other.folder: other for run in runs if not run.finished for other in run.needed}:
        launch(list(needed.values()), at_once)
    waiting = deque(run for run in runs if not _reused(run))
    jobs: list[Job] = []
    try:
        while waiting or jobs:
            while waiting and len(jobs) < at_once:
                jobs.append(Job(waiting.popleft(), tag=len(runs) > 1))
            for job in [job for job in jobs if job.ended(seconds=0.2)]:
                jobs.remove(job)
                job.check()
    finally:
        for job in jobs:  # all are asked before one is waited for
            job.ask_to_stop()
        for job in jobs:
            job.stop()
    return runs


def _reused(run: Run) -> bool:
    if run.finished:
        older = run.environment()["code"] != code_digest()
        note = "; the code has changed since, `make clean` retrains" if older else ""
        print(f"{run.folder.name}: finished before, reused{note}", flush=True)
    return run.finished


class Job:
    """One torchrun with its ranks, in a process group of its own, its output passed on line by line."""

    def __init__(self, run: Run, tag: bool):
        self.run, self.last_error, self.killed = run, "", ""
        self.prefix = f"[{run.config.name}] " if tag else ""
        with run.locked():  # refuse before anything starts what the job itself would refuse
            command = _command(run)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(run.config.launch),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def _pass_on(self) -> None:
        """Print the job's lines; warnings, and what torchrun says of a failure, go only to launch.log."""
        failing = False
        with (self.run.folder / "launch.log").open("w") as log:
            for line in self.process.stdout:
                log.write(line)
                if line.startswith("error: "):
                    self.last_error = line.removeprefix("error: ").strip()
                if not self.killed and (found := KILLED.search(line)):
                    self.killed = f"rank {found[2]} was {_ended_by(int(found[1]))}"
                if WARNING.match(line):
                    continue
                failing = failing or bool(FAILURE.match(line))
                if not failing:
                    print(self.prefix + line, end="", flush=True)

    def ended(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self.reader.join()
        return True

    def check(self) -> None:
        """Raise LaunchError if the job failed: with its own sentence, else with what ended it."""
        status = self.process.returncode
        if status:
            ended = f"torchrun was {_ended_by(-status)}" if status < 0 else f"exit status {status}"
            log = self.run.folder / "launch.log"
            raise LaunchError(self.last_error or f"{self.killed or ended}; the log is {log}")

    def ask_to_stop(self) -> None:
        """Tell torchrun, which tells its ranks: those that train save a checkpoint first."""
        with suppress(ProcessLookupError):  # already ended
            os.killpg(self.process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """Wait for the end that was asked for; what is left after a grace period, or at a second interrupt, is killed.

        Ranks live in sessions of their own, but each asks Linux to die with torchrun.
        """
        try:
            self.process.wait(GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reader.join()
        if self.last_error:
            print(self.prefix + self.last_error, flush=True)


def _ended_by(number: int) -> str:
    """A signal by name and what it usually comes from."""
    cause = CAUSES.get(number)
    return f"ended by {signal.Signals(number).name}" + (f" (most likely {cause})" if cause else "")


def _command(run: Run) -> list[str]:
    """torchrun and what it runs.

    Without --max-restarts: torchrun cannot tell a killed rank from a refusal, and would repeat a wrong key,
    a full disk or a stop that was asked for. Running the cell again goes on from the last checkpoint.
    """
    config, logs = run.folder / "config.yaml", run.folder / "torchrun"
    with run.replacing("config.yaml") as path:
        save_yaml(run.config, path)
    shutil.rmtree(logs, ignore_errors=True)  # of an earlier start; each leaves a folder of its own
    return [
        *("sh", "-c", f'{AGENT}=$$ exec "$@"', "sh"),  # tells the ranks which process is torchrun
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),  # also gives the job an id of its own
        *("--log-dir", str(logs)),  # else it leaves a torchelastic_* folder in the temporary one
        *("--nproc-per-node", str(run.config.launch.world_size)),
        *("-m", COMMANDS[type(run.config)], "--config", str(config)),
    ]


def _environment(launch: LaunchConfig) -> dict[str, str]:
    """Threads are pinned for one rank as for many: torchrun by itself does so only for many."""
    return os.environ | {
        "OMP_NUM_THREADS": str(launch.threads_per_rank),
        "PYTHONUNBUFFERED": "1",
        "KINETO_LOG_LEVEL": "99",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Check that this machine can run a profile.")
    parser.add_argument("profile")
    try:
        check_devices(load_profile(parser.parse_args().profile).launch)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
