"""The report of a profile on disk: the small files of its runs, and which notebook used which run.

    reports/<profile>/
        records/<run>/          config.yaml, results.json, metrics, predictions: a run without its weights, kept once
        records/<notebook>.json the runs that the notebook used and the figures that it drew, in order
        figures/<notebook>/<name>.png
        results.csv             every figure of every record

Nothing here is written before a notebook's last cell: an interrupted notebook leaves the report as it was.
"""

import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from ruamel.yaml import YAML

from vqa.config import Profile
from vqa.results import COMPILED, EAGER
from vqa.run_folder import Run

RECORDED = ("config.yaml", "env.json", "metrics.jsonl", "predictions.parquet", "attention.npz", "results.json")
RUN_COLUMNS = ["profile", "run", "kind", "dataset", "split", "model", "fusion", "arm", "precision", "engine"]
COLUMNS = [*RUN_COLUMNS, "world_size", "seed", "metric", "value", "low", "high", "unit"]


@dataclass(frozen=True)
class Record:
    """One run, read from its run folder or from what a report keeps of it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @functools.cached_property
    def config(self) -> dict:
        """A RunConfig or a MeasurementConfig (which has `runs`) as YAML has it."""
        return YAML(typ="safe", pure=True).load(self.folder / "config.yaml")

    @property
    def run(self) -> dict:
        """The RunConfig, or the first of those that a measurement measured."""
        return self.config["runs"][0] if "runs" in self.config else self.config

    @property
    def kind(self) -> str:
        """A key of results.KINDS."""
        if "runs" in self.config:
            return self.config["kind"]
        return "alignment" if self.config["objective"] == "alignment" else "training"

    @property
    def model(self) -> str:
        """teacher, student or distilled."""
        return "distilled" if self.run["objective"] == "distillation" else self.run["role"]

    @functools.cached_property
    def metrics(self) -> pd.DataFrame:
        return pd.read_json(self.folder / "metrics.jsonl", lines=True)

    @functools.cached_property
    def predictions(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "predictions.parquet")

    def arm(self, profile: Profile) -> str:
        """In what a training run differs from what `profile` says of its model; empty if in nothing."""
        if self.kind != "training":
            return ""
        run, words = self.config, []
        if not run["parent"] and run["role"] in profile.alignment:
            words.append("from scratch")
        if run["data"]["question_fraction"] != profile.data.question_fraction:
            words.append(f"{100 * run['data']['question_fraction']:g} % of questions")
        usual = profile.models[run["role"]].text_encoder.width
        if run["model"]["text_encoder"]["width"] != usual:
            words.append(f"text tower {run['model']['text_encoder']['width']} wide")
        usual, taught = profile.distillation.model_dump(), run["distillation"] or {}
        words += [f"{key} {value:g}" for key, value in taught.items() if value != usual[key]]
        return ", ".join(words).replace("_", " ")

    def rows(self, profile: Profile) -> list[dict]:
        """The run's results as rows of results.csv; what a result does not say is as the run's config has it."""
        run = self.run
        common = {
            "profile": profile.name,
            "run": self.name,
            "kind": self.kind,
            "dataset": run["data"]["source"],
            "model": self.model,
            "fusion": run["model"]["fusion"]["kind"] if run["objective"] != "alignment" else "none",
            "precision": "bf16" if run["train"]["amp"] == "bf16" else "fp32",
            "engine": COMPILED if run["train"]["compile"] else EAGER,
            "world_size": self.config.get("simulated_ranks") or run["launch"]["world_size"],
            "seed": run["seed"],
        }
        arm = self.arm(profile)
        results = json.loads((self.folder / "results.json").read_text())
        return [common | row | {"arm": row["arm"] or arm} for row in results]


class Report:
    """The report of one profile: its records, and what is drawn from them.

    For a `notebook` it ends there: what later ones used, perhaps in another year, is not seen.
    """

    def __init__(self, folder: Path, profile: Profile, notebook: str = "~"):  # "~" comes after every name
        self.folder, self.profile, self.notebook = folder, profile, notebook
        lists = {name: kept["runs"] for name, kept in listed(folder).items() if name <= notebook}
        self.used = {name: [folder / "records" / run for run in runs] for name, runs in lists.items()}

    @functools.cached_property
    def source(self):
        """The data set (vqa.data.source.Source); imported here, as most figures need no data."""
        from vqa.data.source import load

        return load(self.profile.data)

    def begin(self) -> None:
        """Forget, here and not yet on disk, what the notebook used when it last ran."""
        self.used[self.notebook] = []

    def add(self, *runs: Run) -> None:
        """Note that the notebook used `runs`, which are finished. They are copied by `save`."""
        self.used.setdefault(self.notebook, []).extend(run.folder for run in runs)

    def records(self) -> list[Record]:
        """Every record once, in the order of the notebooks, each from where it was used last."""
        found = {folder.name: folder for notebook in sorted(self.used) for folder in self.used[notebook]}
        return [Record(folder) for folder in found.values()]

    def answer_runs(self) -> list[Record]:
        """The runs that answer questions: teachers first, then by name.

        Of the students only those trained as the profile says: the others have figures of their own, in 05.
        """
        runs = [run for run in self.records() if run.kind == "training"]
        runs = [run for run in runs if run.model == "teacher" or not run.arm(self.profile)]
        return sorted(runs, key=lambda run: (run.model != "teacher", run.name))

    def first_seeds(self) -> list[Record]:
        """Of the runs that answer questions, one a model and fusion: what pictures of single answers show."""
        found: dict[tuple, Record] = {}
        for run in self.answer_runs():
            found.setdefault((run.model, run.config["model"]["fusion"]["kind"], bool(run.config["parent"])), run)
        return list(found.values())

    def results(self) -> pd.DataFrame:
        """Every figure of every record, in the columns of results.csv."""
        rows = [row for record in self.records() for row in record.rows(self.profile)]
        return pd.DataFrame(rows, columns=COLUMNS)

    def write_results(self) -> None:
        """results.csv, one row a figure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results().to_csv(self.folder / "results.csv", index=False, float_format="%.10g")

    def save(self, figures: dict[str, Figure]) -> None:
        """Write what the notebook used and drew, and results.csv; remove records that no notebook uses any more."""
        records, pictures = self.folder / "records", self.folder / "figures" / self.notebook
        records.mkdir(parents=True, exist_ok=True)
        used = self.used[self.notebook]
        for folder in used:
            _copy(folder, records / folder.name)
        shutil.rmtree(pictures, ignore_errors=True)
        for name, figure in figures.items():
            save_figure(figure, pictures / f"{name}.png")
        kept = {"runs": list(dict.fromkeys(folder.name for folder in used)), "figures": list(figures)}
        unfinished = records / f".{self.notebook}.json"
        unfinished.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(unfinished, records / f"{self.notebook}.json")
        still_used = {run for kept in listed(self.folder).values() for run in kept["runs"]}
        for folder in records.iterdir():
            if folder.is_dir() and folder.name not in still_used:
                shutil.rmtree(folder)
        Report(self.folder, self.profile).write_results()


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def listed(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The names of the `runs` that each notebook of the report in `folder` used, and of its `figures`."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("records/[!.]*.json")}


def _copy(run: Path, target: Path) -> None:
    """The small files of the finished `run` as `target`, whole or not at all."""
    if run == target:
        return
    unfinished = target.with_name(f".{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name in RECORDED:
        if (run / name).is_file():
            shutil.copyfile(run / name, unfinished / name)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
