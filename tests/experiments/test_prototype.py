import sys

import numpy as np
import pytest
import torch

from vqa.config import save_yaml
from vqa.evaluation.metrics import median_result
from vqa.evaluation.timing import peak_memory
from vqa.experiments import measurement as benchmark
from vqa.experiments.distillation import caching
from vqa.experiments.measurement import Arm, BenchmarkConfig, interleave
from vqa.experiments.prototype import breakdown, grouping, precision

CPU = torch.device("cpu")
PARTS = {
    *("batch", "image_encoder", "text_encoder", "fusion", "answer_head", "loss"),
    *("optimizer", "backward_and_clipping"),
}


def by_label(rows, metric: str) -> dict[tuple, float]:
    return {tuple(row.labels.values()): row.value for row in rows if row.metric == metric}


def test_grouping_pays_and_changes_no_answer(tiny, source, one_rank):
    """An image has 9.6 questions. Measured: 2.5 times the speed at this size, logits 2.4e-7 apart."""
    rows = grouping(BenchmarkConfig(kind="grouping", run=tiny, steps=8), source, one_rank)
    assert len(rows) == 4
    rates, ratio = by_label(rows, "questions_per_second"), by_label(rows, "grouped_over_pairwise_ratio")["grouped",]
    assert ratio > 1.2
    assert rates["grouped",] / rates["pair by pair",] == pytest.approx(ratio, rel=0.3)  # medians of other things
    assert by_label(rows, "logits_max_difference")["grouped",] < 1e-5


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_checkpointing_takes_less_memory(tiny_profile, source, one_rank):
    """Six layers on 65 tokens. Measured: 41 % of the memory in fp32, 46 % in bf16."""
    run = tiny_profile.run("teacher", model__image_encoder__layers=6, model__image_encoder__patch_size=8)
    rows = precision(BenchmarkConfig(kind="precision", run=run, steps=1), source, one_rank)
    seconds, peaks = by_label(rows, "step_seconds"), by_label(rows, "peak_memory_bytes")
    arms = {(number, engine) for number in ("fp32", "bf16") for engine in ("eager", "eager, checkpointing")}
    assert seconds.keys() == peaks.keys() == arms and len(rows) == 8
    assert all(value > 0 for value in seconds.values())
    for number in ("fp32", "bf16"):
        assert peaks[number, "eager, checkpointing"] < 0.7 * peaks[number, "eager"]
    assert peaks["bf16", "eager"] < peaks["fp32", "eager"]


def test_the_parts_make_up_the_step(tiny, source, one_rank):
    """Against a clock around whole steps without a profiler. Measured: 1.1 to 1.3 times as long under it."""
    config = BenchmarkConfig(kind="breakdown", run=tiny, steps=6)
    rows = breakdown(config, source, one_rank)
    assert {row.metric for row in rows} == {f"seconds_{part}" for part in PARTS}
    assert all(row.value > 0 for row in rows)
    arm = Arm({}, tiny, source, one_rank)
    interleave([arm], config)
    assert len(arm.seconds) == 6
    assert 0.7 < sum(row.value for row in rows) / np.median(arm.seconds) < 2


def test_cached_targets_spare_the_teachers_time(tiny_profile, untrained_teacher, source, one_rank):
    """Measured: 1.06 and 1.35 times a plain step, with a teacher of a few thousand weights."""
    student, taught = tiny_profile.run("student"), tiny_profile.run("student", distilled=True)
    rows = caching(BenchmarkConfig(kind="caching", run=student, others=[taught], steps=8), source, one_rank)
    seconds = by_label(rows, "step_seconds")
    assert seconds.keys() == {("plain",), ("cached",), ("online",)}
    cached, online = (by_label(rows, f"{how}_over_plain_step_ratio")[how,] for how in ("cached", "online"))
    assert 0.7 < cached < online
    assert seconds["online",] / seconds["plain",] == pytest.approx(online, rel=0.3)  # medians of other things


def test_peak_memory_is_the_most_held_at_one_time():
    held = torch.zeros(1000)  # before: not counted

    def work():
        first = torch.zeros(1_000_000, dtype=torch.uint8)
        second = torch.zeros(500_000, dtype=torch.uint8)
        del first
        third = torch.zeros(250_000, dtype=torch.uint8)
        return second, third

    assert peak_memory(work, CPU) == 1_500_000
    assert peak_memory(lambda: held.add_(torch.ones(1000)), CPU) == 4000


def test_interleaved_arms_start_alike_and_see_the_same_images(tiny, source, one_rank):
    arms = [Arm({"engine": name}, tiny, source, one_rank) for name in "ab"]
    interleave(arms, BenchmarkConfig(kind="grouping", run=tiny, steps=1))
    states = [arm.objective.model.state_dict() for arm in arms]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_a_median_comes_with_its_interval():
    values = list(np.random.default_rng(0).normal(10, 1, 400))
    row = median_result("step_seconds", values, "s", {"engine": "eager"})
    assert row.value == np.median(values)
    half = 1.96 * 1.2533 / np.sqrt(400)  # of a normal sample's median
    assert (row.low, row.high) == pytest.approx((10 - half, 10 + half), abs=0.1)


def test_without_torchrun_there_is_one_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    save_yaml(BenchmarkConfig(kind="grouping", run=tiny, steps=1), tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit, match=r"^error: start with torchrun"):
        benchmark.main()
