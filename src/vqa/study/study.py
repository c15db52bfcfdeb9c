"""What a notebook needs: its parameters checked, its runs made and recorded, its figures kept.

study = Study.open("02_prototype")      # in the cell after the one tagged `parameters`
study.run("teacher", seed=1)            # trained, or reused if it was trained before
study.figure("learning_curves")         # drawn from the records, saved, shown
"""

import ast
import shutil
from dataclasses import dataclass
from typing import Any

import pandas as pd
from IPython import get_ipython
from matplotlib.figure import Figure
from pydantic import TypeAdapter, ValidationError

from vqa.config import ConfigError, RunConfig, Section, digest, load_profile, near
from vqa.data import source as sources
from vqa.experiments.measurement import BenchmarkConfig
from vqa.run_folder import RUNS, Run
from vqa.study.figures import style as figures
from vqa.study.launch import launch
from vqa.study.records import Report, record
from vqa.study.report import REPORTS, draw

INJECTED = "# Parameters"  # papermill puts this line on top of the cell it injects


@dataclass(frozen=True)
class Verdict:
    """An expectation against what was found: bold in a notebook, plain in a log."""

    expectation: str
    holds: bool
    found: str

    def __repr__(self) -> str:
        return f"{'As expected' if self.holds else 'NOT as expected'}: {self.expectation}. Found: {self.found}."

    def _repr_markdown_(self) -> str:
        head, rest = repr(self).split(":", 1)
        return f"**{head}**:{rest}"


class Study:
    """One notebook's view of the study, under one profile."""

    def __init__(self, notebook: str, profile: str, overrides: dict[str, Any]):
        """`overrides` are dotted keys of the profile; their reports stay away from the committed ones.

        Raises ConfigError for a profile or an override that cannot be used.
        """
        self.profile = load_profile(profile, overrides)
        folder = REPORTS / profile if not overrides else RUNS / "reports" / f"{profile}-{digest(self.profile)}"
        self.report = Report(folder, self.profile, notebook)
        self.records = folder / "records" / notebook
        shutil.rmtree(self.records, ignore_errors=True)  # made again by this notebook, from its own runs
        self.records.mkdir(parents=True)

    @classmethod
    def open(cls, notebook: str) -> "Study":
        """The study that the notebook's parameters ask for. Raises ConfigError if they are wrong."""
        parameters = checked_parameters(get_ipython().user_ns)
        return cls(notebook, parameters["profile"], parameters["overrides"])

    @property
    def source(self) -> sources.Source:
        return self.report.source

    def run(self, role: str, seed: int | None = None, **changes: Any) -> Run:
        """The finished run of `role`; `changes` as in Profile.run."""
        return self.runs([(role, seed, changes)])[0]

    def runs(self, wanted: list[tuple[str, int | None, dict]]) -> list[Run]:
        """Several runs, (role, seed, changes) each, as many side by side as the profile says."""
        made = [Run(self.profile.run(role, seed, **changes)) for role, seed, changes in wanted]
        runs = launch(made, self.profile.at_once)
        for run in runs:
            for kept in (*run.needed, run):
                record(kept, self.records)
        return runs

    def benchmark(self, kind: str, *runs: RunConfig) -> pd.DataFrame:
        """The rows that benchmark `kind` gives for `runs` (the first is the one it is named by), measured once."""
        first, *others = runs
        config = BenchmarkConfig(kind=kind, run=first, others=others, steps=self.profile.benchmark_steps)
        return self.measure("vqa.experiments", config)

    def measure(self, module: str, *configs: Section) -> pd.DataFrame:
        """The rows that the command `module` gives for each of `configs`, measured once, `at_once` side by side."""
        runs = launch([Run(config, module) for config in configs], self.profile.at_once)
        for run in runs:
            record(run, self.records)
        rows = self.report.results()
        return rows[rows["run"].isin([run.folder.name for run in runs])]

    @staticmethod
    def verdict(expectation: str, holds: bool, found: str) -> "Verdict":
        """One line that says whether `expectation` held, and what was found."""
        return Verdict(expectation, bool(holds), found)

    def figure(self, name: str) -> Figure:
        """Figure `name`, drawn from the records and saved with the report."""
        return draw(self.report, name)


def checked_parameters(namespace: dict[str, Any]) -> dict[str, Any]:
    """The values of the names that the notebook's parameters cell declares.

    papermill only warns of a parameter the notebook does not have, and injects it as it is. Here
    an unknown name or a wrong type is a ConfigError that names the nearest right one.
    """
    declared, injected = {}, []
    for source in namespace["In"]:
        assigned = _assignments(source)
        if source.startswith(INJECTED):
            injected = list(assigned)
        elif not declared:
            declared = {name: kind for name, kind in assigned.items() if kind}
    for name in injected:
        if name not in declared:
            raise ConfigError(f"the notebook has no parameter {name!r}; {near(name, declared)}")
    for name, kind in declared.items():
        try:
            TypeAdapter(eval(kind)).validate_python(namespace[name], strict=True)
        except ValidationError:
            raise ConfigError(f"parameter {name} is {namespace[name]!r}, not of type {kind}") from None
    return {name: namespace[name] for name in declared}


def _assignments(source: str) -> dict[str, str | None]:
    """Names assigned at the top of a cell, with their annotation if they have one."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic
        return {}
    annotated = {node.target.id: ast.unparse(node.annotation) for node in body if isinstance(node, ast.AnnAssign)}
    plain = {
        node.targets[0].id: None
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return annotated | plain


figures.set_style()
