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

from vqa.config import ROOT

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
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 15 and max(map(len, lines)) <= 100, cell.source


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
def test_defines_nothing_and_imports_from_vqa_study_alone(path):
    """So that no logic escapes the tests, and moving a module never touches a notebook."""
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef), cell.source
            modules = {ast.Import: lambda n: [a.name for a in n.names], ast.ImportFrom: lambda n: [n.module]}
            for module in modules.get(type(node), lambda n: [])(node):
                assert module.split(".")[0] != "vqa" or module == "vqa.study", cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saves_its_report_in_its_last_cell_and_asks_no_data_set_for_its_name(path):
    cells = code_cells(path)
    assert [cell.source for cell in cells if "study.save()" in cell.source] == [cells[-1].source] == ["study.save()"]
    assert not [cell.source for cell in cells if re.search(r"source\.name *(==|!=|in)", cell.source)]


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


def git(*arguments: str) -> str:
    """What git says; empty where it fails or there is no history."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_executed_notebook_is_the_stored_one_and_has_no_error(path):
    """The stored one as it was when the executed one was committed: it may have been worked on since."""
    executed = [cell for cell in code_cells(path) if "injected-parameters" not in cell.metadata.get("tags", [])]
    assert not [out for cell in executed for out in cell.outputs if out.output_type == "error"]
    name = str(path.relative_to(ROOT))
    commit = git("log", "-1", "--format=%H", "--", name).strip()
    if not commit or git("status", "--porcelain", "--", name):
        pytest.skip("not committed as it stands, or without history")
    stored = nbformat.reads(git("show", f"{commit}:notebooks/{path.name}"), as_version=4)
    assert [cell.source for cell in executed] == [cell.source for cell in stored.cells if cell.cell_type == "code"]


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
        assert (report / "records" / run / "config.yaml").is_file()
    lists = {path.stem: json.loads(path.read_text()) for path in report.glob("records/*.json")}
    assert set(lists) == {path.stem for path in NOTEBOOKS}
    drawn = {(name, figure) for name, kept in lists.items() for figure in kept["figures"]}
    assert drawn == {(path.parent.name, path.stem) for path in report.glob("figures/*/*.png")} and len(drawn) >= 30


def test_running_a_notebook_again_trains_nothing(study_folder):
    finished = {path: path.stat().st_mtime_ns for path in (study_folder / "runs").glob("*/results.json")}
    assert finished
    execute(ROOT / "notebooks" / "02_prototype.ipynb", study_folder)
    assert {path: path.stat().st_mtime_ns for path in (study_folder / "runs").glob("*/results.json")} == finished
