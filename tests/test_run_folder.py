import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from vqa import run_folder as runs
from vqa.config import ROOT
from vqa.results import Result
from vqa.run_folder import Run, RunError

RESULTS = [
    Result("accuracy", 90.5, 88.0, 92.5, split="test"),
    Result("parameters", 12, engine="eager"),
]


@pytest.fixture
def run(tiny, tmp_path, monkeypatch) -> Run:
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    return Run(tiny)


def files(run: Run) -> set[str]:
    return {path.name for path in run.folder.rglob("*") if path.is_file()}


def test_a_run_touches_no_disk_until_it_writes(run):
    assert not run.folder.exists()
    with run.writing():
        assert files(run) == {"lock", "config.yaml", "env.json"}


def test_a_failed_write_leaves_the_old_file_whole_and_nothing_else(run):
    run.write_json("kept.json", "old")
    with pytest.raises(KeyboardInterrupt), run.replacing("kept.json") as path:
        path.write_text("half of the n")
        raise KeyboardInterrupt
    assert json.loads((run.folder / "kept.json").read_text()) == "old"
    assert files(run) == {"kept.json"}


def test_a_file_is_not_there_under_its_name_before_it_is_whole(run):
    with run.replacing("deep/new.txt") as path:
        path.write_text("whole")
        assert not (run.folder / "deep" / "new.txt").exists()
    assert files(run) == {"new.txt"}


def test_finished_means_that_results_are_there(run):
    with run.writing():
        run.log_metrics(step=1, loss=0.5)
        run.log_metrics(step=2, loss=0.25)
        assert not run.finished
        with pytest.raises(RunError, match=f"^{run.folder.name} has not finished$"):
            run.results()
        run.finish(RESULTS)
    assert run.finished and run.results() == RESULTS
    assert run.result("accuracy").value == 90.5
    assert run.metrics()["loss"].tolist() == [0.5, 0.25]


def test_a_run_is_read_back_from_its_folder(run):
    with run.writing():
        pass
    opened = Run.open(run.folder)
    assert opened.config == run.config and opened.folder == run.folder == Run(opened.config).folder


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        Run.open(tmp_path)


SECOND_WRITER = """
import sys
from importlib.metadata import version
from pathlib import Path
from vqa.run_folder import Run, RunError
try:
    with Run.open(Path(sys.argv[1])).writing():
        print("in")
except RunError as error:
    print(error)
"""


def test_a_second_writer_is_refused_and_the_first_goes_on(run):
    def second_process() -> str:
        command = [sys.executable, "-c", SECOND_WRITER, str(run.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with run.writing():
        before = {path: path.read_bytes() for path in run.folder.iterdir()}
        assert second_process() == f"{run.folder.name} is being written by another process"
        assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
        run.finish(RESULTS)
    assert run.results() == RESULTS
    assert second_process() == "in"  # the lock ends with its holder


def test_a_place_that_cannot_be_written_is_named(tiny, tmp_path, monkeypatch):
    """Under a file, because root may write into any directory."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(runs, "RUNS", tmp_path / "file")
    run = Run(tiny)
    with (
        pytest.raises(RunError, match=f"^cannot write {run.folder}: Not a directory; set VQA_RUNS elsewhere$"),
        run.writing(),
    ):
        pass


def test_needed_are_the_runs_of_the_parents_and_the_teachers_configs(tiny):
    assert Run(tiny).needed == []
    other = tiny.model_copy(update={"seed": 1})
    child = Run(tiny.model_copy(update={"parent": tiny, "teacher": other}))
    assert [run.folder for run in child.needed] == [Run(tiny).folder, Run(other).folder]
    assert child.folder not in (Run(tiny).folder, Run(other).folder)


def test_the_environment_says_what_computed_a_number(run):
    with run.writing():
        seen = run.environment()
    assert seen["packages"]["torch"] == version("torch")
    assert seen["threads"] == os.environ["OMP_NUM_THREADS"] == "1"
    assert seen["code"] == runs.code_digest() and seen["cpu"]["model"]


def test_the_code_digest_changes_with_a_source_file(tmp_path, monkeypatch):
    (tmp_path / "src" / "vqa").mkdir(parents=True)
    source = tmp_path / "src" / "vqa" / "a.py"
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    source.write_text("x = 1\n")
    first = runs.code_digest()
    source.write_text("x = 2\n")
    second = runs.code_digest()
    source.write_text("x = 1\n")
    assert runs.code_digest() == first != second


def test_what_the_code_digest_leaves_out_no_job_imports():
    jobs = "vqa.training.train, vqa.experiments.__main__"
    seen = subprocess.run(
        [sys.executable, "-c", f"import sys, {jobs}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    modules = seen.stdout.split()
    assert "vqa.training.train" in modules and not [name for name in modules if name.startswith("vqa.study")]


def test_where_runs_are_kept_may_be_relative_to_home(tmp_path):
    command = [sys.executable, "-c", "from vqa.run_folder import RUNS; print(RUNS)"]
    for given, meant in (
        ("~/my runs", tmp_path / "my runs"),
        ("some runs", tmp_path / "some runs"),
        ("", ROOT / "runs"),
    ):
        environment = os.environ | {"VQA_RUNS": given, "HOME": str(tmp_path)}
        seen = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert seen.stdout.strip() == str(meant)
