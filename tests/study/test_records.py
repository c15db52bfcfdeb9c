"""Reports on disk: a run kept once, nothing lost by an interrupted notebook, every number traced to its record."""

import json

import pandas as pd
import pytest
from matplotlib.figure import Figure

from vqa.config import ROOT, MeasurementConfig, Profile, load_profile, save_yaml
from vqa.results import Result
from vqa.run_folder import Run
from vqa.study.records import COLUMNS, Record, Report

RESULTS = [
    Result("accuracy", 91.25, 90.0, 92.5, "test"),
    Result("accuracy_blind", 67.0, 66.0, 68.0, "test"),
    Result("parameters", 1234567),
    Result("training_seconds", 12.3),
]


@pytest.fixture
def profile() -> Profile:
    return load_profile("default")


@pytest.fixture
def finished(tmp_path):
    """Gives a function that makes a config a finished run with `results`, its folder beside the report."""

    def finish(config, results=RESULTS) -> Run:
        run = Run(config)
        run.folder = tmp_path / "runs" / run.folder.name
        with run.writing():
            run.finish(results)
        return run

    return finish


def used(folder, profile, notebook, *runs, figures=()) -> Report:
    """The report after `notebook` ran from top to bottom."""
    report = Report(folder, profile, notebook)
    report.begin()
    report.add(*runs)
    report.save({name: Figure() for name in figures})
    return report


def everything(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_hold_every_figure_of_every_record_and_nothing_else(finished, profile, tmp_path):
    run = finished(profile.run("teacher"))
    used(tmp_path / "report", profile, "02_prototype", run)
    table = pd.read_csv(tmp_path / "report" / "results.csv", keep_default_na=False)
    assert list(table.columns) == COLUMNS
    assert table["value"].tolist() == [result.value for result in RESULTS]
    assert table["unit"].tolist() == ["%", "%", "count", "s"]
    assert set(table["run"]) == {run.folder.name} and set(table["kind"]) == {"training"}
    assert table.iloc[0][["model", "fusion", "dataset", "seed"]].tolist() == ["teacher", "concat", "easy_vqa", 0]


def test_a_measurement_is_named_by_its_kind_and_says_what_differs_from_its_first_run(finished, profile, tmp_path):
    config = MeasurementConfig(kind="precision", runs=[profile.run("student")], steps=3)
    half = Result("step_seconds", 0.5, arm="checkpointing", precision="bf16", world_size=2)
    report = used(tmp_path, profile, "02_prototype", finished(config, [Result("step_seconds", 1.0), half]))
    columns = ["kind", "model", "arm", "precision", "engine", "world_size"]
    plain, other = report.results()[columns].values.tolist()
    assert plain == ["precision", "student", "", "fp32", "eager", 1]
    assert other == ["precision", "student", "checkpointing", "bf16", "eager", 2]


def test_a_simulated_number_of_ranks_is_the_world_size_of_its_rows(finished, profile, tmp_path):
    aligned = profile.run("student").parent
    run = finished(MeasurementConfig(kind="forensics", runs=[aligned], simulated_ranks=4), [Result("final_loss", 1.0)])
    assert Record(run.folder).rows(profile)[0]["world_size"] == 4


def test_a_run_that_two_notebooks_used_is_kept_and_counted_once(finished, profile, tmp_path):
    run = finished(profile.run("teacher"))
    for notebook in ("02_prototype", "03_fusion"):
        used(tmp_path / "report", profile, notebook, run, run)
    assert len(list(tmp_path.glob("report/records/*/results.json"))) == 1
    assert len(Report(tmp_path / "report", profile).results()) == len(RESULTS)


def test_a_notebook_that_does_not_come_to_its_end_changes_nothing(finished, profile, tmp_path):
    used(tmp_path / "report", profile, "02_prototype", finished(profile.run("teacher")), figures=["towers"])
    before = everything(tmp_path / "report")
    report = Report(tmp_path / "report", profile, "02_prototype")
    report.begin()
    other = finished(profile.run("teacher", seed=1))
    report.add(other)
    assert [record.name for record in report.records()] == [other.folder.name]  # its own last run is forgotten
    assert everything(tmp_path / "report") == before


def test_only_what_no_notebook_uses_any_more_is_removed(finished, profile, tmp_path):
    first, second = (finished(profile.run("teacher", seed)) for seed in (0, 1))
    used(tmp_path / "report", profile, "02_prototype", first, second, figures=["towers", "samples"])
    used(tmp_path / "report", profile, "03_fusion", second)
    used(tmp_path / "report", profile, "02_prototype", figures=["towers"])
    kept = {path.name for path in (tmp_path / "report" / "records").iterdir()}
    assert kept == {second.folder.name, "02_prototype.json", "03_fusion.json"}
    assert [path.name for path in tmp_path.glob("report/figures/*/*")] == ["towers.png"]


def test_a_run_made_again_replaces_its_record(finished, profile, tmp_path):
    used(tmp_path / "report", profile, "02_prototype", finished(profile.run("teacher")))
    again = finished(profile.run("teacher"), [Result("accuracy", 50.0, 49.0, 51.0, "test")])
    report = used(tmp_path / "report", profile, "03_fusion", again)
    assert report.results()["value"].tolist() == [50.0]
    assert Report(tmp_path / "report", profile).results()["value"].tolist() == [50.0]


def test_a_notebook_does_not_see_what_later_ones_left(finished, profile, tmp_path):
    """On a fresh clone the committed records of later notebooks are there before those notebooks have run."""
    used(tmp_path, profile, "02_prototype", finished(profile.run("teacher")))
    seen = {name: Report(tmp_path, profile, name).records() for name in ("01_architecture", "02_prototype")}
    assert not seen["01_architecture"] and len(seen["02_prototype"]) == 1


@pytest.mark.parametrize(
    ("changes", "model", "arm"),
    [
        ({}, "student", ""),
        ({"distilled": True}, "distilled", ""),
        ({"aligned": False, "data__question_fraction": 0.1}, "student", "from scratch, 10 % of questions"),
        ({"distilled": True, "distillation__feature_weight": 0.0}, "distilled", "feature weight 0"),
        ({"distilled": True, "model__text_encoder__width": 128}, "distilled", "text tower 128 wide"),
    ],
)
def test_a_run_says_which_model_it_is_and_how_it_differs_from_the_profile(changes, model, arm, profile, tmp_path):
    save_yaml(profile.run("student", **changes), tmp_path / "config.yaml")
    assert (Record(tmp_path).model, Record(tmp_path).arm(profile)) == (model, arm)


def test_a_profile_that_aligns_nothing_has_no_runs_from_scratch(tmp_path):
    profile = load_profile("relations")
    save_yaml(profile.run("teacher"), tmp_path / "config.yaml")
    assert Record(tmp_path).arm(profile) == ""


def test_answers_are_shown_of_teachers_and_of_students_as_the_profile_has_them(finished, profile, tmp_path):
    few = {"aligned": False, "data__question_fraction": 0.1}
    shown = [profile.run("teacher"), profile.run("teacher", aligned=False), profile.run("teacher", 1)]
    shown += [profile.run("student", distilled=True), profile.run("student")]
    hidden = [profile.run("student", **few), profile.run("student", aligned=False), profile.run("teacher").parent]
    report = Report(tmp_path, profile, "02_prototype")
    report.add(*(finished(config) for config in (*hidden, *reversed(shown))))
    names = [record.name for record in report.answer_runs()]
    assert set(names) == {Run(config).folder.name for config in shown} and names[0].startswith("teacher")
    second_seed = Run(shown[2]).folder.name
    assert [record.name for record in report.first_seeds()] == [name for name in names if name != second_seed]


@pytest.mark.parametrize("path", sorted((ROOT / "reports").glob("*/results.csv")), ids=lambda path: path.parent.name)
def test_every_committed_number_stands_in_a_committed_record(path):
    table = pd.read_csv(path)
    for name, rows in table.groupby("run"):
        folder = path.parent / "records" / name
        kept = json.loads((folder / "results.json").read_text())
        assert rows["value"].tolist() == pytest.approx([row["value"] for row in kept], rel=1e-5)
        assert Record(folder).config and (folder / "env.json").is_file()
