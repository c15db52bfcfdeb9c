import sys

import numpy as np
import pytest

from vqa.config import ConfigError, MeasurementConfig, save_yaml
from vqa.experiments import __main__ as entry
from vqa.experiments.measurement import (
    MEASURES,
    WARMUP_STEPS,
    TrainingArm,
    interleave_training,
    measure_of,
    measures,
    step_images,
)
from vqa.results import KINDS


def test_every_kind_that_is_described_can_be_measured():
    for kind in set(KINDS) - {"training", "alignment"}:
        assert measure_of(kind).__name__ == kind


def test_a_kind_that_nothing_measures_is_one_sentence():
    with pytest.raises(ConfigError, match="measures 'groupin'; did you mean grouping"):
        measure_of("groupin")


def test_a_measurement_without_a_sentence_is_refused():
    def undescribed(m):
        return []

    with pytest.raises(KeyError, match="undescribed"):
        measures(undescribed)
    assert "undescribed" not in MEASURES


def test_interleaved_arms_start_alike_and_see_the_same_images(tiny, source, one_rank, measurement):
    arms = [TrainingArm(tiny, source, one_rank, arm=name) for name in "ab"]
    start = arms[0].model.answer_head.weight.clone()
    interleave_training(arms, measurement("grouping", tiny, steps=1))
    states = [arm.model.state_dict() for arm in arms]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
    assert not start.equal(states[0]["answer_head.weight"]) and [len(arm.seconds) for arm in arms] == [1, 1]


def test_steps_go_through_all_images_and_begin_again(tiny):
    steps = step_images(tiny, 40, 2)
    assert len(steps) == WARMUP_STEPS + 2 and {len(images) for images in steps} == {16}
    order = np.concatenate(steps)
    assert sorted(order[:40]) == list(range(40)) and np.array_equal(order[40:80], order[:40])


def call(config, tmp_path, monkeypatch) -> None:
    save_yaml(config, tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["experiments", "--config", str(tmp_path / "config.yaml")])
    entry.main()


def test_without_torchrun_there_is_one_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"^error: start with torchrun"):
        call(MeasurementConfig(kind="grouping", runs=[tiny], steps=1), tmp_path, monkeypatch)


@pytest.mark.parametrize(("rank", "status"), [("0", "error: torchrun started 2 ranks but"), ("1", "1")])
def test_only_the_main_rank_says_what_is_wrong(rank, status, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        call(MeasurementConfig(kind="grouping", runs=[tiny], steps=1), tmp_path, monkeypatch)
    assert str(ended.value).startswith(status)
