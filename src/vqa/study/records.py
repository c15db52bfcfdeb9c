"""From run records to results.csv, figures and the README's table. Trains nothing.

    python -m vqa.study.report default record     redraw every figure and table of these profiles

A record is the small part of a run folder, copied to reports/<profile>/records/<notebook>/<run>:
what a reader needs to trace a number or draw a figure again, without the weights.
"""

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from vqa.config import Profile
from vqa.data import source as sources
from vqa.run_folder import Run

RECORDED = ("config.yaml", "env.json", "metrics.jsonl", "predictions.parquet", "attention.npz", "results.json")
RUN_COLUMNS = ["profile", "run", "dataset", "split", "model", "fusion", "precision", "engine", "world_size", "seed"]
COLUMNS = [*RUN_COLUMNS, "metric", "value", "low", "high", "unit"]


@dataclass(frozen=True)
class Record:
    """What is kept of one run."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @functools.cached_property
    def config(self) -> dict:
        return YAML(typ="safe", pure=True).load(self.folder / "config.yaml")

    @functools.cached_property
    def metrics(self) -> pd.DataFrame:
        return pd.read_json(self.folder / "metrics.jsonl", lines=True)

    @functools.cached_property
    def predictions(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "predictions.parquet")

    def answers(self) -> bool:
        """Whether this is a run that learned to answer questions."""
        return self.config.get("objective") in ("answers", "distillation")

    def model_name(self, profile: Profile) -> str:
        """teacher, student or distilled, and in what the run differs from what `profile` says of it."""
        run = self.config.get("run", self.config)  # a benchmark names the run it measured
        words = ["distilled" if run["objective"] == "distillation" else run["role"]]
        if self.answers() and not run["parent"] and run["role"] in profile.alignment:
            words.append("from scratch")
        if run["data"]["question_fraction"] != profile.data.question_fraction:
            words.append(f"{100 * run['data']['question_fraction']:g} % of questions")
        taught = run["distillation"] or {}
        words += [f"{key} {value:g}" for key, value in taught.items() if value != getattr(profile.distillation, key)]
        return ", ".join(words).replace("_", " ")

    def rows(self, profile: Profile) -> list[dict]:
        """The run's results as rows of results.csv."""
        run = self.config.get("run", self.config)
        common = {
            "profile": profile.name,
            "run": self.name,
            "dataset": run["data"]["source"],
            "model": self.model_name(profile),
            "fusion": run["model"]["fusion"]["kind"] if run["objective"] != "alignment" else "none",
            "precision": "bf16" if run["train"]["amp"] == "bf16" else "fp32",
            "engine": "eager",
            "world_size": run["launch"]["world_size"],
            "seed": run["seed"],
        }
        kept = json.loads((self.folder / "results.json").read_text())
        return [common | row | row["labels"] for row in kept]


class Report:
    """The report of one profile: its records, and what is drawn from them.

    For a `notebook` it ends there: what later ones left, perhaps in another year, is not seen.
    """

    def __init__(self, folder: Path, profile: Profile, notebook: str = "~"):
        self.folder, self.profile, self.notebook = folder, profile, notebook  # "~" comes after every name

    @functools.cached_property
    def source(self) -> sources.Source:
        return sources.load(self.profile.data)

    def records(self) -> list[Record]:
        """Every record once, though several notebooks may have kept it, in the order of the notebooks."""
        found: dict[str, Path] = {}
        for path in sorted(self.folder.glob("records/*/*/results.json")):
            if path.parents[1].name <= self.notebook:
                found.setdefault(path.parent.name, path.parent)
        return [Record(folder) for folder in found.values()]

    def answer_runs(self) -> list[Record]:
        """The runs that answer questions: teachers first, then by fusion and seed.

        Not those that 05_distillation trained in numbers, which its own figures show.
        """
        runs = [run for run in self.records() if run.answers() and run.folder.parent.name != "05_distillation"]
        return sorted(runs, key=lambda run: (run.config["role"] != "teacher", run.name))

    def first_seeds(self) -> list[Record]:
        """Of the runs that answer questions, one a role and fusion: what pictures of single answers show."""
        found = {}
        for run in self.answer_runs():
            kind = (run.config["role"], run.config["model"]["fusion"]["kind"], bool(run.config["parent"]))
            found.setdefault(kind, run)
        return list(found.values())

    def results(self) -> pd.DataFrame:
        """Every figure of every record, in the columns of results.csv."""
        rows = [row for record in self.records() for row in record.rows(self.profile)]
        return pd.DataFrame(rows, columns=COLUMNS)

    def write_results(self) -> pd.DataFrame:
        """results.csv, one row a figure."""
        table = self.results()
        self.folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(self.folder / "results.csv", index=False, float_format="%.10g")
        return table


def record(run: Run, folder: Path) -> None:
    """Copy the small files of a finished run to `folder`/<run>."""
    target = folder / run.folder.name
    target.mkdir(parents=True, exist_ok=True)
    for name in RECORDED:
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, target / name)
