"""What a notebook needs: its runs made and measured, its figures drawn, its report saved.

study = Study("02_prototype", profile, overrides)  # in the cell after the one tagged `parameters`
study.run("teacher", seed=1)                       # trained, or reused if it was trained before
study.figure("learning_curves")                    # drawn from the records, shown
study.save()                                       # the last cell: records, figures and results.csv are written

Whatever takes seconds to import is imported by the method that needs it: a notebook that only draws opens fast.
"""

import builtins
from typing import Any, NamedTuple

import pandas as pd
from IPython import get_ipython
from matplotlib.figure import Figure

from vqa.config import ConfigError, MeasurementConfig, RunConfig, digest, load_profile, near
from vqa.experiments.jobs import forensics_configs, parity_configs
from vqa.run_folder import RUNS, Run
from vqa.study.records import Report
from vqa.study.report import REPORTS, accuracy_table, draw

INJECTED = "# Parameters"  # papermill puts this line on top of the cell it injects
PARAMETERS = ("profile", "overrides")  # of every notebook


class Verdict(NamedTuple):
    """An expectation against what was found: bold in a notebook, plain in a log."""

    expectation: str
    holds: bool
    found: str

    def __repr__(self) -> str:
        return f"{'As expected' if self.holds else 'NOT as expected'}: {self.expectation}. Found: {self.found}."

    def _repr_markdown_(self) -> str:
        head, rest = repr(self).split(":", 1)
        return f"**{head}**:{rest}"


class Difference(NamedTuple):
    """A difference of accuracy in points, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} points [{self.low:+.2f}, {self.high:+.2f}]"


class Study:
    """One notebook's view of the study, under one profile."""

    verdict = Verdict  # study.verdict(expectation, holds, found): one line that says whether it held

    def __init__(self, notebook: str, profile: str, overrides: dict[str, Any]):
        """`overrides` are dotted keys of the profile; their reports stay away from the committed ones.

        Raises ConfigError for a profile or an override that cannot be used, or a parameter that does not exist.
        """
        _refuse_unknown_parameters()
        if not isinstance(overrides, dict):
            raise ConfigError(f"overrides is {overrides!r}, not a dictionary of dotted keys")
        self.profile = load_profile(profile, overrides)
        folder = REPORTS / profile if not overrides else RUNS / "reports" / f"{profile}-{digest(self.profile)}"
        self.report = Report(folder, self.profile, notebook)
        self.report.begin()
        self.figures: dict[str, Figure] = {}

    @property
    def source(self):
        """The profile's data set, a vqa.data.source.Source."""
        return self.report.source

    def run(self, role: str, seed: int | None = None, **changes: Any) -> Run:
        """The finished run of `role`; arguments as of Profile.run."""
        return self.runs(self.profile.run(role, seed, **changes))[0]

    def runs(self, *configs: RunConfig) -> list[Run]:
        """The finished runs of `configs`, trained as many side by side as the profile says."""
        from vqa.study.launch import launch

        runs = launch([Run(config) for config in configs], self.profile.at_once)
        for run in runs:
            self.report.add(*run.needed, run)
        return runs

    def measure(self, kind: str, *runs: RunConfig, steps: int | None = None) -> pd.DataFrame:
        """The rows that the measurement `kind` (a key of results.KINDS) gives for `runs`, measured once.

        `steps` are the timed steps an arm, where not as the profile's benchmark_steps says. `parity` measures
        on each of the profile's world sizes; `forensics` chooses its runs itself.
        """
        from vqa.study.launch import launch

        steps = self.profile.benchmark_steps if steps is None else steps
        if kind == "parity":
            configs = parity_configs(list(runs), self.profile.scaling.world_sizes)
        elif kind == "forensics":
            configs = forensics_configs(self.profile)
        else:
            configs = [MeasurementConfig(kind=kind, runs=list(runs), steps=steps)]
        measured = launch([Run(config) for config in configs], self.profile.at_once)
        self.report.add(*measured)
        return self.results(run=[run.folder.name for run in measured])

    def results(self, **columns: Any) -> pd.DataFrame:
        """The rows of results.csv so far whose `columns` hold the given value, or one of a list of values."""
        rows = self.report.results()
        for column, wanted in columns.items():
            rows = rows[rows[column].isin(wanted if isinstance(wanted, list) else [wanted])]
        return rows

    def accuracy_table(self) -> pd.DataFrame:
        """One row a trained model: size, test accuracy with its interval, the blind baseline beside it."""
        return accuracy_table(self.report.results())

    def compare(self, first: list[Run], second: list[Run]) -> Difference:
        """Test accuracy of `first` minus that of `second` on the same questions, several seeds each, by image."""
        from vqa.evaluation.metrics import mean_paired_difference

        answers = ([run.predictions() for run in runs] for runs in (first, second))
        return Difference(*(100 * part for part in mean_paired_difference(*answers)))

    def figure(self, name: str) -> Figure:
        """Figure `name`, drawn from the records and kept for `save`."""
        self.figures[name] = draw(self.report, name)
        return self.figures[name]

    def save(self) -> None:
        """Write records, figures and results.csv: only a notebook that came to its end changes the report."""
        self.report.save(self.figures)
        rows = self.report.results()
        print(f"saved: {len(self.figures)} figures, {len(rows)} numbers of {rows['run'].nunique()} runs so far")


def _refuse_unknown_parameters() -> None:
    """Raise ConfigError for a parameter that the notebook does not have.

    papermill itself only warns of one, and assigns it in the cell that it injects.
    """
    shell = get_ipython()
    for cell in shell.user_ns["In"] if shell else ():
        if cell.startswith(INJECTED):
            for name in compile(cell, "parameters", "exec").co_names:
                if name not in PARAMETERS and not hasattr(builtins, name):
                    raise ConfigError(f"the notebook has no parameter {name!r}; {near(name, PARAMETERS)}")
