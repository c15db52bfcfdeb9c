"""The notebooks: how they are stored, that they run headless, and that nothing secret is in them."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from vqa.config import ROOT, ConfigError
from vqa.study.study import checked_parameters

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = sorted((ROOT / "reports").glob("*/*.ipynb"))
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|xox[abp]-[A-Za-z0-9-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|AIza[0-9A-Za-z_-]{35}"
    r"|(?i:key|token|secret|password|passwd)\\?[\"']?\]?\s*[=:]\s*\\?[\"'][A-Za-z0-9+/_-]{16,}"
)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def parameters_cell(path: Path) -> str:
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


def text_without_images(path: Path) -> str:
    """All of a notebook but its pictures, whose base64 would match anything."""
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    return json.dumps(notebook, ensure_ascii=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs_and_in_short_cells(path):
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None
        assert len([line for line in cell.source.splitlines() if line.strip()]) <= 15, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_typed_literals_with_a_comment(path):
    """papermill puts its values after this cell, so a value derived here would go stale."""
    source = parameters_cell(path)
    statements = ast.parse(source).body
    assert {node.target.id for node in statements} == {"profile", "overrides"}
    for node, line in zip(statements, source.splitlines(), strict=True):
        assert isinstance(node, ast.AnnAssign)
        ast.literal_eval(node.value)
        assert "#" in line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defines_no_function_or_class_and_imports_only_what_is_tested(path):
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef), cell.source


@pytest.mark.parametrize("path", [*NOTEBOOKS, *EXECUTED], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_holds_no_secret(path):
    assert not SECRETS.findall(text_without_images(path))


@pytest.mark.parametrize("where", ["source", "output"])
def test_a_planted_secret_is_found(tmp_path, where):
    planted = "api_key = '" + "Zk3" * 8 + "'"
    cell = nbformat.v4.new_code_cell(planted if where == "source" else "1")
    if where == "output":
        cell.outputs = [nbformat.v4.new_output("stream", text=planted)]
    path = tmp_path / "planted.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    assert SECRETS.findall(text_without_images(path))


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_executed_notebook_is_the_stored_one_and_has_no_error(path):
    executed = [cell for cell in code_cells(path) if "injected-parameters" not in cell.metadata.get("tags", [])]
    stored = code_cells(ROOT / "notebooks" / path.name)
    assert [cell.source for cell in executed] == [cell.source for cell in stored]
    assert not [out for cell in executed for out in cell.outputs if out.output_type == "error"]


def test_parameters_are_checked():
    declared = 'profile: str = "default"  # …\noverrides: dict = {}  # …'
    good = {"In": ["", declared, '# Parameters\nprofile = "smoke"\n'], "profile": "smoke", "overrides": {}}
    assert checked_parameters(good) == {"profile": "smoke", "overrides": {}}
    with pytest.raises(ConfigError, match="did you mean profile"):
        checked_parameters({**good, "In": ["", declared, '# Parameters\nprofiel = "smoke"\n']})
    with pytest.raises(ConfigError, match="overrides is 'x', not of type dict"):
        checked_parameters({**good, "overrides": "x"})


def test_papermill_with_an_unknown_parameter_fails_through_our_check(tmp_path):
    """papermill itself only warns and runs on."""
    with pytest.raises(papermill.PapermillExecutionError, match="has no parameter 'profil'; did you mean profile"):
        papermill.execute_notebook(
            str(NOTEBOOKS[0]), str(tmp_path / "out.ipynb"), {"profil": "smoke"}, cwd=str(ROOT), progress_bar=False
        )


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("study")


def execute(notebook: Path, folder: Path) -> float:
    """Run `notebook` under profile smoke as `make study` does, in a folder of its own; seconds taken."""
    started = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "papermill", str(notebook), str(folder / notebook.name)),
            *("--cwd", str(notebook.parent), "--no-progress-bar", "-p", "profile", "smoke"),
        ],
        env=os.environ | {"VQA_RUNS": str(folder / "runs"), "VQA_REPORTS": str(folder / "reports")},
        check=True,
        capture_output=True,
        timeout=600,
    )
    return time.perf_counter() - started


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_headless_on_smoke(path, study_folder):
    """In order, as each builds on the records of those before."""
    execute(path, study_folder)
    assert (study_folder / path.name).is_file()


def test_the_smoke_report_is_complete(study_folder):
    report = study_folder / "reports" / "smoke"
    results = pd.read_csv(report / "results.csv", keep_default_na=False)
    assert {"teacher", "student"} <= set(results["model"])
    assert {"accuracy", "accuracy_blind", "grouped_over_pairwise_ratio", "peak_memory_bytes"} <= set(results["metric"])
    for run in results["run"].unique():
        assert list(report.glob(f"records/*/{run}/config.yaml"))
    assert len(list(report.glob("figures/*/*.png"))) >= 10


def test_running_a_notebook_again_trains_nothing(study_folder):
    finished = {path: path.stat().st_mtime_ns for path in (study_folder / "runs").glob("*/results.json")}
    assert finished
    execute(ROOT / "notebooks" / "02_prototype.ipynb", study_folder)
    assert {path: path.stat().st_mtime_ns for path in (study_folder / "runs").glob("*/results.json")} == finished
