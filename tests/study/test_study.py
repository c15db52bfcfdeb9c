"""The surface that notebooks use: what it refuses, what it tells apart, what it needs to be imported."""

import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from vqa.config import ConfigError
from vqa.study import Study, study


@pytest.fixture
def shell(monkeypatch) -> list[str]:
    """The cells that a notebook has run."""
    cells = ["", 'profile: str = "default"\noverrides: dict = {}']
    monkeypatch.setattr(study, "get_ipython", lambda: SimpleNamespace(user_ns={"In": cells}))
    return cells


def test_a_parameter_that_papermill_injects_must_be_one_of_the_notebooks(shell):
    shell.append('# Parameters\nprofile = "default"\noverrides = {"seeds": [1]}\n')
    assert Study("02_prototype", "default", {"seeds": [1]}).profile.seeds == [1]
    shell[-1] = '# Parameters\nprofiel = "smoke"\n'
    with pytest.raises(ConfigError, match="has no parameter 'profiel'; did you mean profile"):
        Study("02_prototype", "default", {})


def test_overrides_must_be_keys_with_values(shell):
    with pytest.raises(ConfigError, match="overrides is 'seeds=1', not a dictionary"):
        Study("02_prototype", "default", "seeds=1")


def test_overrides_keep_away_from_the_committed_reports(shell):
    usual, changed = (Study("02_prototype", "default", overrides) for overrides in ({}, {"seeds": [1]}))
    assert usual.report.folder == study.REPORTS / "default"
    assert changed.report.folder.parent == study.RUNS / "reports"


def test_results_are_chosen_by_columns(shell, monkeypatch):
    rows = pd.DataFrame({"kind": ["costs", "costs", "training"], "arm": ["a", "b", "a"], "value": [1, 2, 3]})
    opened = Study("02_prototype", "default", {})
    monkeypatch.setattr(opened.report, "results", lambda: rows)
    assert opened.results(kind="costs", arm="a")["value"].tolist() == [1]
    assert opened.results(arm=["a", "b"])["value"].tolist() == [1, 2, 3]


def test_two_models_are_compared_in_points_on_the_same_questions(shell):
    """Of four questions about two images the first model is right on two more, both about one image."""
    asked = {"split": "test", "image_id": [0, 0, 1, 1], "question_id": [0, 1, 2, 3]}
    right, wrong = (
        SimpleNamespace(predictions=lambda correct=correct: pd.DataFrame(asked | {"correct": correct}))
        for correct in ([1, 1, 1, 0], [0, 0, 1, 0])
    )
    difference = Study("02_prototype", "default", {}).compare([right], [wrong])
    assert difference.value == 50 and difference.low < 0 < 50 < difference.high
    assert str(difference).startswith("+50.00 points [-")


def test_a_notebook_that_only_draws_does_not_wait_for_the_training_stack():
    code = "import sys; from vqa.study import Study; Study('00_data', 'default', {}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
