"""Every command of the README: those that a CPU can run are run, in a clone whose path has a blank and brackets."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vqa.config import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = {
    command
    for block in re.findall(r"`([^`\n]+)`", README) + re.findall(r"^ {4}(make .*?) {2,}#", README, re.M)
    if re.match(r"(\S+=\S+ )?(make|sbatch|\.venv/bin/\S+) ?", command := block.strip())
}
ELSEWHERE = {  # not run here, and where they are tried instead
    "make study": "minutes; every notebook runs under smoke in test_notebooks.py",
    "make study PROFILE=smoke": "the same",
    'make study PROFILE=vqa_v2 NOTEBOOKS="00_data 02_prototype 08_results"': "needs the official archives",
    "make test": "runs this",
    "make lab": "a server; opened by hand",
    "make faults": "half an hour; one trial of each in test_faults.py",
    "make diffs": "changes the settings of this clone",
    "sbatch --nodes 2 params/l4x4.slurm": "needs SLURM; its arguments are tried in test_distributed.py",
}
ELSEWHERE_IF = {"--nnodes 2": "two hosts in test_distributed.py", "vqa.data.vqa_v2": "data/test_vqa_v2.py"}  # by a part


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked and new files of this checkout at a place of their own, with its environment."""
    place = tmp_path_factory.mktemp("vqa (copy)")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / ".venv").symlink_to(Path(os.environ.get("VIRTUAL_ENV", ROOT / ".venv")))
    return place


@pytest.fixture(scope="module")
def shell(clone):
    """Gives a function that runs a command of the README in the clone; what it printed."""
    own = {name: value for name, value in os.environ.items() if name not in ("VQA_RUNS", "VQA_REPORTS")}
    environment = own | {"PYTHONPATH": str(clone / "src")}

    def run(command: str) -> str:
        done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def student(clone, shell) -> Path:
    """The run folder of the README's training command, under smoke."""
    (command,) = [c for c in COMMANDS if "-m vqa.training.train" in c and "--nnodes" not in c]
    shell(command.replace("--profile default", "--profile smoke"))
    (folder,) = (clone / "runs").glob("student-concat-seed0-*")
    return folder.relative_to(clone)


def matching(part: str) -> str:
    (command,) = [command for command in COMMANDS if part in command]
    return command


def test_every_command_is_tried_somewhere():
    tried = (
        "vqa.config",
        "vqa.evaluation",
        "vqa.training",
        "vqa.deployment",
        "papermill",
        "make figures",
        "make clean",
    )
    left = [c for c in COMMANDS - set(ELSEWHERE) if not any(part in c for part in (*tried, *ELSEWHERE_IF))]
    assert left == []


def test_a_profile_is_checked(shell):
    assert "lr: 0.0003" in shell(matching("-m vqa.config"))


def test_a_trained_run_is_judged_deployed_and_asked(clone, shell, student, photo):
    said = shell(matching("-m vqa.evaluation.evaluate").replace("runs/<run>", str(student)))
    assert re.search(r"^accuracy +\d+\.\d\d %", said, re.M)
    assert "is ready" in shell(matching("-m vqa.deployment.deploy").replace("runs/<run> FOLDER", f"{student} served"))
    ask = matching("-m vqa.deployment.ask").replace("IMAGE", f'"{photo}"').replace("FOLDER", "served")
    assert re.search(r"^\w+ +\d+\.\d %", shell(ask.replace("QUESTION", "what color is the shape?")), re.M)


def test_a_notebook_is_rerun_with_an_override_away_from_the_reports(clone, shell):
    rerun = matching("papermill notebooks/02_prototype.ipynb out.ipynb").replace("02_prototype", "00_data")
    before = sorted((clone / "reports").rglob("*"))
    shell(rerun + " -y '{overrides: {data.validation_images: 32}}'")
    assert sorted((clone / "reports").rglob("*")) == before and list((clone / "runs" / "reports").iterdir())


def test_figures_are_redrawn_and_runs_forgotten(clone, shell):
    before = {path: path.read_text() for path in [*clone.glob("reports/*/results.csv"), clone / "README.md"]}
    shell("make figures")
    assert {path: path.read_text() for path in before} == before  # the committed tables are those of the records
    shell("make clean")
    assert not (clone / "runs").exists()
