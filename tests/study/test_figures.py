"""Which student of a study is which: the ablation compares students that differ in one term and in nothing else."""

import pytest

from vqa.config import load_profile
from vqa.results import Result
from vqa.run_folder import Run
from vqa.study.figures.distillation import REMOVED, distillation_terms, students
from vqa.study.records import record
from vqa.study.report import Report

FEW = {"aligned": False, "data__question_fraction": 0.1}
TAUGHT = FEW | {"distilled": True}
WAYS = {
    "alone": FEW,
    "distilled": TAUGHT,
    **{
        way: TAUGHT | {f"distillation__{term}": value for term, value in change.items()}
        for way, change in REMOVED.items()
    },
    "other": TAUGHT | {"distillation__temperature": 9.0},
}
ELSEWHERE = [{"distilled": True}, TAUGHT | {"model__text_encoder__width": 128, "distillation__inherit_text": True}]


@pytest.fixture
def study(tmp_path) -> Report:
    """The records of one student of every way, each more right than the one before, and of two of other questions."""
    profile = load_profile("default")
    for place, changes in enumerate([*WAYS.values(), *ELSEWHERE]):
        run = Run(profile.run("student", **changes))
        run.folder = tmp_path / run.folder.name
        with run.writing():
            run.finish([Result("accuracy", 60.0 + place, "%", 59.0 + place, 61.0 + place, "test")])
        record(run, tmp_path / "report" / "records" / "05_distillation")
    return Report(tmp_path / "report", profile)


def test_students_are_told_apart_by_the_term_they_lack(study):
    """An aligned student, and one with another text tower, belong to other comparisons."""
    found = students(study).set_index("way")["value"].to_dict()
    assert found == {way: 60.0 + place for place, way in enumerate(WAYS)} and "without tokens" in found


def test_the_figure_shows_every_term(study):
    (axis,) = distillation_terms(study).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == list(WAYS)[:-1]
    assert len(axis.containers) == len(WAYS) - 1
