"""Reports: every number of results.csv traces to a record, and tables are generated, not typed."""

import json

import pandas as pd
import pytest

from vqa.config import ROOT, load_profile, save_yaml
from vqa.results import Result
from vqa.run_folder import Run
from vqa.study import report
from vqa.study.records import COLUMNS, Record, record
from vqa.study.report import FAULT_MARKS, MARKS, Report, accuracy_table, fault_table, markdown

METRICS = [
    Result("accuracy", 91.25, "%", 90.0, 92.5, "test"),
    Result("accuracy_blind", 67.0, "%", 66.0, 68.0, "test"),
    Result("parameters", 1234567, "count"),
    Result("training_seconds", 12.3, "s"),
    Result("step_seconds", 0.5, "s", labels={"engine": "grouped"}),
]


@pytest.fixture
def finished_run(monkeypatch, tmp_path) -> Run:
    """A run folder whose figures are known, for what reads run folders."""
    run = Run(load_profile("default").run("teacher"))
    run.folder = tmp_path / run.folder.name
    with run.writing():
        run.log_metrics(step=1, loss=1.0)
        run.finish(METRICS)
    return run


@pytest.fixture
def one_report(finished_run, tmp_path) -> Report:
    record(finished_run, tmp_path / "report" / "records" / "02_prototype")
    return Report(tmp_path / "report", load_profile("default"))


def test_results_hold_every_figure_of_every_record_and_nothing_else(one_report, finished_run):
    one_report.write_results()
    table = pd.read_csv(one_report.folder / "results.csv")
    assert list(table.columns) == COLUMNS
    assert table["value"].tolist() == [result.value for result in METRICS]
    assert set(table["run"]) == {finished_run.folder.name}
    assert table.iloc[0][["model", "fusion", "dataset", "seed"]].tolist() == ["teacher", "concat", "easy_vqa", 0]
    assert table.iloc[4]["engine"] == "grouped" and table.iloc[0]["engine"] == "eager"


def test_a_run_kept_by_two_notebooks_counts_once(one_report, finished_run):
    record(finished_run, one_report.folder / "records" / "03_fusion")
    assert len(one_report.records()) == 1


def test_an_unfinished_run_is_no_record(one_report, finished_run):
    (one_report.records()[0].folder / "results.json").unlink()
    assert one_report.records() == []


def test_the_table_shows_accuracy_with_interval_beside_blind(one_report):
    (row,) = accuracy_table(one_report.results()).to_dict("records")
    assert row["test accuracy, % [95 % interval]"] == "91.25 [90.00, 92.50]"
    assert row["image-blind, %"] == "67.00" and row["parameters"] == "1,234,567"


def test_the_readme_table_is_replaced_and_the_rest_untouched(monkeypatch, one_report, tmp_path):
    readme = tmp_path / "README.md"
    faults = "\n".join([*FAULT_MARKS, ""])
    readme.write_text(f"before\n{MARKS[0]}\nold numbers\n{MARKS[1]}\nafter\n{faults}")
    one_report.write_results()
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "REPORTS", tmp_path)
    report.write_readme()
    text = readme.read_text()
    assert text.startswith(f"before\n{MARKS[0]}\n") and f"{MARKS[1]}\nafter\n{FAULT_MARKS[0]}" in text
    assert "91.25 [90.00, 92.50]" in text and "old numbers" not in text


def committed_results() -> list:
    return sorted((ROOT / "reports").glob("*/results.csv"))


@pytest.mark.parametrize("path", committed_results(), ids=lambda path: path.parent.name)
def test_every_committed_number_stands_in_a_committed_record(path):
    table = pd.read_csv(path)
    for name, rows in table.groupby("run"):
        folders = list(path.parent.glob(f"records/*/{name}"))
        assert folders, name
        kept = json.loads((folders[0] / "results.json").read_text())
        assert rows["value"].tolist() == pytest.approx([row["value"] for row in kept], rel=1e-5)
        assert Record(folders[0]).config and (folders[0] / "env.json").is_file()


def test_the_readme_shows_the_committed_results(monkeypatch, tmp_path):
    """`make figures` would not change it."""
    copy = tmp_path / "README.md"
    copy.write_text(report.README.read_text())
    monkeypatch.setattr(report, "REPORTS", ROOT / "reports")
    monkeypatch.setattr(report, "README", copy)
    report.write_readme()
    assert copy.read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "student"),
        ({"distilled": True}, "distilled"),
        ({"aligned": False, "data__question_fraction": 0.1}, "student, from scratch, 10 % of questions"),
        ({"distilled": True, "distillation__feature_weight": 0.0}, "distilled, feature weight 0"),
    ],
)
def test_a_model_is_named_by_what_it_is_and_how_it_differs_from_the_profile(changes, name, tmp_path):
    profile = load_profile("default")
    save_yaml(profile.run("student", **changes), tmp_path / "config.yaml")
    assert Record(tmp_path).model_name(profile) == name


def test_a_profile_that_aligns_nothing_has_no_runs_from_scratch(tmp_path):
    profile = load_profile("relations")
    save_yaml(profile.run("teacher"), tmp_path / "config.yaml")
    assert Record(tmp_path).model_name(profile) == "teacher"


def test_the_readme_leaves_variations_to_the_reports(monkeypatch, one_report, tmp_path):
    table = one_report.write_results()
    table.assign(model="student, 10 % of questions").to_csv(one_report.folder / "results.csv", index=False)
    (tmp_path / "README.md").write_text("\n".join([*MARKS, *FAULT_MARKS]))
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "REPORTS", tmp_path)
    report.write_readme()
    assert "10 %" not in (tmp_path / "README.md").read_text()


def test_a_notebook_does_not_see_what_later_ones_left(one_report, finished_run):
    """On a fresh clone the committed records of later notebooks are there before those notebooks have run."""
    seen = {name: Report(one_report.folder, one_report.profile, name).records() for name in ("01_a", "02_prototype")}
    assert not seen["01_a"] and len(seen["02_prototype"]) == 1
    record(finished_run, one_report.folder / "records" / "01_a")
    (kept,) = Report(one_report.folder, one_report.profile, "01_a").records()
    assert kept.folder.parent.name == "01_a"


def test_the_table_of_faults_stands_between_its_marks(monkeypatch, tmp_path):
    rows = {"fault": ["kill", "wrong key"], "trials": [20, 10], "survived": [19, 10], "steps_lost": [3, 0]}
    faults = pd.DataFrame(rows | {"seconds": [4.26, 0.5]})
    faults.to_csv(tmp_path / "faults.csv", index=False)
    (tmp_path / "README.md").write_text("\n".join(["a", *MARKS, "b", *FAULT_MARKS, "c"]))
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "REPORTS", tmp_path)
    report.write_readme()
    text = (tmp_path / "README.md").read_text()
    assert text.split(FAULT_MARKS[0])[1] == f"\n{markdown(fault_table(faults))}{FAULT_MARKS[1]}\nc"
    assert "| kill | 20 | 19 | 3 | 4.3 |" in text and text.startswith(f"a\n{MARKS[0]}\nNo results yet.\n")
