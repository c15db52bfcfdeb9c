"""Run folders: one place for all that a run writes, whole or not there at all.

    runs/<name>-<config hash>/
        config.yaml  env.json  metrics.jsonl  log.txt  checkpoints/  model/  predictions.parquet
        results.json      written last: its presence means the run is finished

Every file is written under a temporary name and renamed. A lock refuses a second writer.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from vqa.config import ROOT, MeasurementConfig, RunConfig, digest, load_section, save_yaml
from vqa.results import Result

RUNS = Path(os.environ.get("VQA_RUNS") or ROOT / "runs").expanduser().absolute()


class RunError(RuntimeError):
    """A run folder that cannot be used; its message is one sentence for the user."""


class Run:
    """A run folder, named by what it computes. Making one touches no disk; `writing` does."""

    def __init__(self, config: RunConfig | MeasurementConfig):
        self.config = config
        self.folder = RUNS / f"{config.name}-{digest(config)}"

    @property
    def needed(self) -> "list[Run]":
        """The runs that must be finished before this one can start."""
        return [Run(config) for config in self.config.needed]

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """A training run that exists on disk. Raises RunError if it does not."""
        if not (folder / "config.yaml").is_file():
            raise RunError(f"{folder} is not a run folder: it has no config.yaml")
        run = cls(load_section(RunConfig, folder / "config.yaml"))
        run.folder = folder
        return run

    @property
    def finished(self) -> bool:
        return (self.folder / "results.json").is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, made if need be and held for this process alone.

        Raises RunError if the folder cannot be written or another process holds it.
        """
        lock = FileLock(self.folder / "lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.folder.name} is being written by another process") from None
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror}; set VQA_RUNS elsewhere") from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """`locked`, with config.yaml and env.json in place."""
        with self.locked():
            with self.replacing("config.yaml") as path:
                save_yaml(self.config, path)
            self.write_json("env.json", environment())
            yield

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A temporary path that takes the place of `name` once the block ends well."""
        final = self.folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{os.getpid()}")
        try:
            yield temporary
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def write_json(self, name: str, value: object) -> None:
        with self.replacing(name) as path:
            path.write_text(json.dumps(value, indent=1) + "\n")

    def log_metrics(self, **row: object) -> None:
        """Append one line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self, results: list[Result]) -> None:
        self.write_json("results.json", [result.as_row() for result in results])

    def metrics(self) -> pd.DataFrame:
        return pd.read_json(self.folder / "metrics.jsonl", lines=True)

    def predictions(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "predictions.parquet")

    def results(self) -> list[Result]:
        """Raises RunError if the run has not finished."""
        if not self.finished:
            raise RunError(f"{self.folder.name} has not finished")
        return [Result.from_row(row) for row in json.loads((self.folder / "results.json").read_text())]

    def result(self, metric: str, split: str = "test") -> Result:
        return next(r for r in self.results() if r.metric == metric and r.split == split)

    def environment(self) -> dict:
        return json.loads((self.folder / "env.json").read_text())


def environment() -> dict:
    """What a reader needs to judge or repeat a number: versions, code, machine, command."""
    packages = ("torch", "torchvision", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "command": " ".join(sys.argv).replace(f"{ROOT}/", ""),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src")),
        "code": code_digest(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def code_digest() -> str:
    """Changes when a source file that a job may import changes: a reused run can tell that it is older."""
    package = ROOT / "src" / "vqa"
    # The folder study starts jobs and reads what they left; no job imports it.
    sources = [path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[0] != "study"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # not a git checkout
    return done.stdout.strip()


def _cpu() -> dict:
    flags = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "model": fields.get("model name", platform.processor()),
        "flags": sorted(flags & set(fields.get("flags", "").split())),
    }
