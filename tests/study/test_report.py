"""Tables for people are generated from results, not typed; figures can be drawn again without training."""

import pandas as pd
import pytest
from matplotlib.figure import Figure

from vqa.config import ROOT, load_profile
from vqa.results import Result
from vqa.run_folder import Run
from vqa.study import report
from vqa.study.records import Report
from vqa.study.report import FAULT_MARKS, MARKS, accuracy_table, fault_table, markdown, redraw

RESULTS = [
    Result("accuracy", 91.25, 90.0, 92.5, "test"),
    Result("accuracy_blind", 67.0, 66.0, 68.0, "test"),
    Result("parameters", 1234567),
    Result("training_seconds", 12.3),
]


@pytest.fixture
def reports(tmp_path, monkeypatch) -> Report:
    """reports/default after 02_prototype trained one teacher and one that differs from the profile; a README."""
    profile = load_profile("default")
    monkeypatch.setattr(report, "REPORTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text("\n".join(["a", MARKS[0], "old numbers", MARKS[1], "b", *FAULT_MARKS, "c"]))
    made = Report(tmp_path / "default", profile, "02_prototype")
    for changes in ({}, {"aligned": False}):
        run = Run(profile.run("teacher", **changes))
        run.folder = tmp_path / "runs" / run.folder.name
        with run.writing():
            run.finish(RESULTS)
        made.add(run)
    made.save({"towers": Figure()})
    return made


def test_the_table_shows_accuracy_with_interval_beside_blind(reports):
    usual, scratch = accuracy_table(reports.results()).to_dict("records")
    assert usual["test accuracy, % [95 % interval]"] == "91.25 [90.00, 92.50]"
    assert usual["image-blind, %"] == "67.00" and usual["parameters"] == "1,234,567"
    assert (usual["arm"], scratch["arm"]) == ("", "from scratch")


def test_the_readme_has_new_tables_between_its_marks_and_is_otherwise_untouched(reports, tmp_path):
    rows = {"fault": ["kill", "wrong key"], "trials": [20, 10], "survived": [19, 10], "steps_lost": [3, 0]}
    faults = pd.DataFrame(rows | {"seconds": [4.26, 0.5]})
    faults.to_csv(tmp_path / "faults.csv", index=False)
    report.write_readme()
    text = report.README.read_text()
    before, table = text.split(MARKS[0])
    table, rest = table.split(MARKS[1])
    assert before == "a\n" and "old numbers" not in text
    assert table.count("91.25 [90.00, 92.50]") == 1 and "from scratch" not in table  # variations are for the reports
    assert rest == f"\nb\n{FAULT_MARKS[0]}\n{markdown(fault_table(faults))}{FAULT_MARKS[1]}\nc"
    assert "| kill | 20 | 19 | 3 | 4.3 |" in rest


def test_redrawing_gives_every_listed_figure_from_what_its_notebook_saw(reports, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(report, "draw", lambda *seen: drawn.append(seen) or Figure())
    picture = tmp_path / "default" / "figures" / "02_prototype" / "towers.png"
    for path in (picture, tmp_path / "default" / "results.csv"):
        path.unlink()
    redraw("default")
    ((seen, name),) = drawn
    assert (seen.notebook, name) == ("02_prototype", "towers") and len(seen.records()) == 2
    assert picture.is_file() and (tmp_path / "default" / "results.csv").is_file()


def test_the_readme_shows_the_committed_results(monkeypatch, tmp_path):
    """`make figures` would not change it."""
    copy = tmp_path / "README.md"
    copy.write_text(report.README.read_text())
    monkeypatch.setattr(report, "REPORTS", ROOT / "reports")
    monkeypatch.setattr(report, "README", copy)
    report.write_readme()
    assert copy.read_text() == (ROOT / "README.md").read_text()
