"""What figures draw, judged by the marks on their axes; what they look like has to be looked at."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from vqa.config import ROOT, load_profile
from vqa.results import Result
from vqa.run_folder import Run
from vqa.study.figures.distillation import REMOVED, distillation_terms, students
from vqa.study.figures.quantization import deployment_pareto
from vqa.study.figures.results import accuracy_by_type
from vqa.study.figures.style import intervals
from vqa.study.records import COLUMNS, Report

FEW = {"aligned": False, "data__question_fraction": 0.1}
TAUGHT = FEW | {"distilled": True}
ARMS = {
    "alone": FEW,
    "distilled": TAUGHT,
    **{
        arm: TAUGHT | {f"distillation__{term}": value for term, value in change.items()}
        for arm, change in REMOVED.items()
    },
    "other": TAUGHT | {"distillation__temperature": 9.0},
}
ELSEWHERE = [{"distilled": True}, TAUGHT | {"model__text_encoder__width": 128, "distillation__inherit_text": True}]
IMPORTED = """
import importlib, pkgutil, sys
from vqa.study import figures
for module in pkgutil.iter_modules(figures.__path__):
    importlib.import_module(f"{figures.__name__}.{module.name}")
print(*figures.style.FIGURES)
print(*(name for name in sys.modules if name.startswith(("vqa.training", "vqa.models", "transformers"))))
"""


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    pyplot.close("all")


@pytest.fixture
def study(tmp_path) -> Report:
    """The records of one student of every arm, each more right than the one before, and of two of other questions."""
    report = Report(tmp_path / "report", load_profile("default"))
    for place, changes in enumerate([*ARMS.values(), *ELSEWHERE]):
        run = Run(report.profile.run("student", **changes))
        run.folder = tmp_path / run.folder.name
        with run.writing():
            run.finish([Result("accuracy", 60.0 + place, 59.0 + place, 62.0 + place, split="test")])
        report.add(run)
    return report


@pytest.fixture
def report_of():
    """A function that makes a report of rows of results, a dict each; columns that a dict lacks have one value."""

    def make(rows: list[dict], **more) -> SimpleNamespace:
        usual = dict.fromkeys(COLUMNS, "") | {"fusion": "concat", "world_size": 1, "precision": "fp32", "low": np.nan}
        table = pd.DataFrame([usual | {"engine": "eager", "high": np.nan} | row for row in rows])
        return SimpleNamespace(results=table.copy, **more)

    return make


def drawn(axis) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each group of points with intervals on `axis`: its points (x, y), and its intervals as (low, high)."""
    return [(bar[0].get_xydata(), np.array(bar[2][0].get_segments())[:, :, 1]) for bar in axis.containers]


def test_intervals_stand_side_by_side_from_low_to_high():
    """Ten groups, more than there are markers; one of them has two seeds in the same place."""
    rows = pd.DataFrame(
        {
            "x": ["left", "right"] * 10 + ["left"],
            "by": [group for group in range(10) for _ in "lr"] + [9],
            "value": np.arange(21.0),
            "low": np.arange(21.0) - 1,
            "high": np.arange(21.0) + 3,
        }
    )
    axis = pyplot.figure().subplots()
    intervals(axis, rows, "x", "by", scale=10)
    groups = drawn(axis)
    assert len(groups) == 10
    for (points, ends), (_, own) in zip(groups, rows.groupby("by"), strict=True):
        assert points[:, 1].tolist() == (10 * own["value"]).tolist()
        assert ends.tolist() == (10 * own[["low", "high"]]).to_numpy().tolist()
        assert np.round(points[:, 0]).tolist() == (own["x"] == "right").astype(int).tolist()
    at = np.concatenate([points[:, 0] for points, _ in groups])
    assert len(np.unique(at)) == len(at)


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_are_as_long_as_their_values(horizontal):
    axis = pyplot.figure().subplots()
    rows = pd.DataFrame({"x": ["a", "b", "a"], "by": ["one", "one", "two"], "value": [1.0, 2.0, 3.0]})
    intervals(axis, rows, "x", "by", bars=True, horizontal=horizontal, number="%.0f")
    lengths = [[bar.get_width() if horizontal else bar.get_height() for bar in group] for group in axis.containers]
    assert lengths == [[1.0, 2.0], [3.0]] and [text.get_text() for text in axis.texts] == ["1", "2", "3"]
    names = axis.get_yticklabels() if horizontal else axis.get_xticklabels()
    assert [name.get_text() for name in names] == ["a", "b"] and len(
        {group[0].get_hatch() for group in axis.containers}
    ) == 2


def test_students_are_told_apart_by_the_term_they_lack(study):
    """An aligned student, and one with another text tower, belong to other comparisons."""
    found = students(study).set_index("arm")["value"].to_dict()
    assert found == {arm: 60.0 + place for place, arm in enumerate(ARMS)} and "without tokens" in found


def test_the_figure_of_distillation_shows_every_term_in_its_place(study):
    (axis,) = distillation_terms(study).axes
    assert [label.get_text().replace("\n", " ") for label in axis.get_xticklabels()] == list(ARMS)[:-1]
    ((points, ends),) = drawn(axis)
    assert points.tolist() == [[place, 60 + place] for place in range(6)]
    assert ends.tolist() == [[59 + place, 62 + place] for place in range(6)]


def test_only_question_types_of_the_data_are_drawn_as_such(report_of):
    """accuracy_written begins like one; a third type is never asked in the test split."""
    common = {"kind": "training", "run": "a", "split": "test", "low": 1.0, "high": 99.0}
    metrics = {"accuracy_shape": 40.0, "accuracy_color": 50.0, "accuracy_written": 60.0, "accuracy_blind": 70.0}
    rows = [common | {"metric": metric, "value": value} for metric, value in metrics.items()]
    predictions = pd.DataFrame(
        {"split": "test", "question_type": ["color", "shape", "shape"], "blind_correct": [1, 1, 0]}
    )
    config = {"model": {"fusion": {"kind": "concat"}}, "seed": 3}
    run = SimpleNamespace(name="a", model="teacher", config=config, arm=lambda _: "", predictions=predictions)
    types = SimpleNamespace(question_types=("color", "shape", "size"))
    report = report_of(rows, answer_runs=lambda: [run], source=types, profile=None)
    (axis,) = accuracy_by_type(report).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["color", "shape"]
    ((points, _),) = drawn(axis)
    assert points.tolist() == [[0, 50], [1, 40]]
    blind = [lines.get_segments()[0][0][1] for lines in axis.collections[-2:]]
    assert blind == [100, 50]
    assert axis.get_legend().get_texts()[-1].get_text() == "teacher (concat, seed 3)"


def test_a_model_served_by_pytorch_is_as_right_and_as_large_as_its_own_run(report_of):
    """Not as a run of another fusion, of another seed, or from scratch."""
    trained = {"kind": "training", "model": "teacher"}
    runs = [{"fusion": "cross_attention"}, {"arm": "from scratch"}, {}, {"seed": 1}]
    rows = [
        trained | run | {"metric": metric, "value": value + place - 2}
        for place, run in enumerate(runs)
        for metric, value in (("accuracy", 90.0), ("bytes_on_disk", 4e6))
    ]
    served = {"kind": "quantization", "model": "teacher"}
    rows += [served | {"metric": "latency_p50_ms", "value": 5.0}]
    int8 = served | {"precision": "int8", "engine": "ONNX Runtime"}
    rows += [int8 | {"metric": "accuracy", "value": 89.0}, int8 | {"metric": "bytes_on_disk", "value": 1e6}]
    rows += [int8 | {"metric": "latency_p50_ms", "value": 2.0}]
    size, latency = deployment_pareto(report_of(rows)).axes
    places = {
        label.get_text(): [bar[0].get_xydata().tolist() for bar in (one, other)]
        for label, one, other in zip(latency.get_legend().get_texts(), size.containers, latency.containers, strict=True)
    }
    assert places == {
        "teacher, fp32, PyTorch": [[[4, 90]], [[5, 90]]],
        "teacher, int8, ONNX Runtime": [[[1, 89]], [[2, 89]]],
    }


def test_every_committed_figure_can_be_drawn_without_what_trains():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    known, imported = done.stdout.splitlines()
    committed = {path.stem for path in ROOT.glob("reports/*/figures/*/*.png")}
    assert committed and committed <= set(known.split())
    assert imported == ""
