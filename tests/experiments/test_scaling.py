from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from vqa.data.batches import EpochPlan
from vqa.experiments import scaling_speed as scaling
from vqa.experiments.jobs import parity_configs
from vqa.experiments.measurement import Measurement
from vqa.experiments.scaling_parity import arm_name, compared, parity
from vqa.experiments.scaling_speed import OPTIONS, StepVariant, VariantArm, shared_share, step_results
from vqa.experiments.step_time_model import BUCKET_BYTES, exposed_seconds, predictions
from vqa.models.build import vqa_model
from vqa.run_folder import Run
from vqa.study.launch import launch
from vqa.training.objectives import Answers


@pytest.fixture(scope="module")
def jobs(tiny_profile, source, one_rank) -> list[Run]:
    """The parity jobs of one rank, in this process, and of two, in processes of their own."""
    alone, pair = (Run(config) for config in parity_configs([tiny_profile.run("teacher")], [1, 2]))
    with alone.writing():
        alone.finish(parity(Measurement(alone.config, source, one_rank, alone)))
    launch(pair)
    return [alone, pair]


def test_a_parity_job_keeps_what_the_training_loop_did(jobs, source, tiny):
    """Images of every step against the plan; two ranks against one: measured 1e-7 (losses), 4e-7 (gradient)."""
    kept = [np.load(run.folder / "0.npz") for run in jobs]
    plans = [EpochPlan.make(64, 16, tiny.seed, epoch, flips=True).steps for epoch in range(2)]
    for arrays in kept:
        assert [set(step) for step in arrays["images"]] == [set(step) for step in np.concatenate(plans)]
        assert int(arrays["answered"]) == len(source.splits["test"].questions)
    assert kept[1]["losses"] == pytest.approx(kept[0]["losses"], rel=2e-6)
    assert kept[1]["gradient"] == pytest.approx(kept[0]["gradient"], abs=1e-5)
    assert np.linalg.norm(kept[0]["gradient"]) == pytest.approx(1, rel=1e-4)  # clipped to max_grad_norm
    assert jobs[1].metrics()["loss"].tolist() == pytest.approx(kept[1]["losses"].tolist())


def test_only_the_job_of_many_ranks_is_compared(jobs):
    one, two = ({row.metric: row.value for row in run.results()} for run in jobs)
    assert one["final_loss"] == pytest.approx(jobs[0].metrics()["loss"].tail(4).mean())
    assert set(two) - set(one) == {
        *("loss_max_relative_difference", "gradient_relative_difference", "steps_with_other_images"),
        *("questions_answered_difference", "questions_right_difference"),
    }
    assert two["loss_max_relative_difference"] < 2e-6 and two["gradient_relative_difference"] < 1e-5
    assert two["steps_with_other_images"] == two["questions_right_difference"] == 0


def test_differences_are_found(tmp_path):
    """Losses apart by 1 % in step 3, by 50 % after the compared steps; other images in one step; a longer gradient."""
    losses, images, gradient = np.ones(60), np.arange(120).reshape(60, 2), np.array([3.0, 4.0])
    np.savez(tmp_path / "one.npz", losses=losses, images=images, gradient=gradient, right=5, answered=9)
    losses[2], losses[55], images[7] = 1.01, 1.5, 0
    np.savez(tmp_path / "two.npz", losses=losses, images=images, gradient=gradient * [1, 1.125], right=3, answered=9)
    rows = {row.metric: row.value for row in compared(tmp_path / "one.npz", tmp_path / "two.npz", "answers")}
    assert rows == pytest.approx(
        {
            "loss_max_relative_difference": 0.01,
            "gradient_relative_difference": 0.1,
            "steps_with_other_images": 1,
            "questions_answered_difference": 0,
            "questions_right_difference": -2,
        }
    )


def test_an_accumulated_step_is_the_step_of_its_global_batches_at_once(tiny_profile, measurement):
    """Transformers only. Four global batches of 16 against one of 64, at equal rates; two steps."""
    sizes = ({"train__global_batch_size": 64, "train__epochs": 8}, {})
    runs = (tiny_profile.run("teacher", **size) for size in sizes)
    arms = [
        VariantArm(StepVariant(1, bool(accumulated)), run, measurement("speed", run), None)
        for accumulated, run in enumerate(runs)
    ]
    assert [arm.variant.parts for arm in arms] == [1, 4] and [arm.images for arm in arms] == [64, 64]
    for arm in arms:
        start = [p.detach().clone() for p in arm.trainer.model.parameters()]
        for _ in range(2):
            arm.step(np.arange(64))
    one, many = (list(arm.trainer.model.parameters()) for arm in arms)
    assert max((p - q).abs().max() for p, q in zip(one, many, strict=True)) < 2e-5
    assert max((p - q).abs().max() for p, q in zip(one, start, strict=True)) > 5e-4
    assert [len(arm.seconds) for arm in arms] == [2, 2]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_takes_whole_global_batches_where_it_accumulates_and_its_share_where_not(
    ranks, tiny, one_rank, measurement, monkeypatch
):
    """As the last rank of its variant takes them: micro-batches of 16 images, whatever the number of ranks."""
    m = measurement("speed", tiny)
    last = replace(m, rank=replace(one_rank, rank=ranks - 1))
    for variant, images in (
        (StepVariant(ranks, True), 16),
        (StepVariant(ranks), 16 // ranks),
        (StepVariant(1, half=True), 8),
    ):
        taken = []
        arm = VariantArm(replace(variant, exchange=False), tiny, last if variant.ranks > 1 else m, None)
        monkeypatch.setattr(arm.trainer, "update", lambda batches, images, taken=taken: taken.extend(batches))
        arm.step(np.arange(64))
        assert [len(batch.pixel_values) for batch in taken] == [images] * arm.variant.parts


def test_an_exchange_is_timed_without_the_computing(tiny, source, one_rank, monkeypatch):
    """DDP's backward pass takes 5 s here and the same one without DDP 2 s; weights keep no gradient of it."""
    monkeypatch.setattr(
        scaling, "_backward_seconds", lambda module: 5.0 if isinstance(module, DistributedDataParallel) else 2.0
    )
    model = Answers(tiny, source, one_rank).model
    assert scaling.exchange_seconds(model, one_rank, torch.distributed.group.WORLD, 1) == 3.0


def test_touching_every_weight_gives_every_weight_a_gradient_of_ones(model):
    assert scaling._backward_seconds(scaling.TouchAll(model)) > 0
    assert all((weight.grad == 1).all() for weight in model.parameters())


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_reaches_ddp(option, tiny, measurement):
    variant, m = StepVariant(2, option=option), measurement("speed", tiny)
    model = VariantArm(variant, tiny, m, torch.distributed.group.WORLD).trainer.model
    found = {
        "gradient_as_bucket_view": model.gradient_as_bucket_view,
        "static_graph": model.static_graph,
        "find_unused_parameters": model.find_unused_parameters,
        "buckets of 1 MB": model.bucket_bytes_cap == 2**20,
        "one bucket": model.bucket_bytes_cap == 1000 * 2**20,
        "bf16 gradients": bool(model._comm_hooks),
    }
    assert [name for name, on in found.items() if on] == [option]


def test_a_rank_outside_the_variant_takes_no_step(tiny, one_rank, measurement, monkeypatch):
    third = replace(measurement("speed", tiny), rank=replace(one_rank, rank=2))
    arm = VariantArm(StepVariant(2), tiny, third, None)
    monkeypatch.setattr(arm.trainer, "update", lambda *_: pytest.fail("took a step"))
    arm.step(np.arange(16))


def test_step_times_and_what_they_are_over_each_other():
    """On one rank 1 s, on two 0.8 s, 0.6 s of them without exchange; the exchange alone takes 0.1 s."""
    times = {
        StepVariant(1): 1.0,
        StepVariant(2): 0.8,
        StepVariant(2, exchange=False): 0.6,
        StepVariant(1, half=True): 0.5,
        StepVariant(2, option="static_graph"): 0.4,
    }
    rows = step_results({variant: np.full(3, seconds) for variant, seconds in times.items()}, {2: 0.1})
    found = {(row.metric, row.arm, row.world_size): row.value for row in rows}
    assert found["scaling_efficiency", "plain", 2] == pytest.approx(1 / (2 * 0.8))
    assert found["scaling_efficiency", "half the images", 1] == pytest.approx(1 / (2 * 0.5))
    assert found["predicted_step_seconds", "plain", 2] == pytest.approx(0.7)
    assert found["measured_over_predicted_ratio", "plain", 2] == pytest.approx(0.8 / 0.7)
    assert found["step_time_ratio", "static_graph", 2] == pytest.approx(0.5)
    assert found["step_seconds", "no exchange", 2] == pytest.approx(0.6) and len(rows) == 5 + 4 + 2 + 1


def test_arms_are_named_by_what_they_learn_and_by_batch_statistics(tiny_profile, processor):
    teacher, student = (tiny_profile.run(role) for role in ("teacher", "student"))
    stems = [tiny_profile.run("teacher", model__image_encoder__stem=stem) for stem in ("conv", "strided")]
    names = [arm_name("answers", vqa_model(run.model, processor)) for run in (teacher, student, *stems)]
    assert names == ["answers", *["answers, BatchNorm"] * 3]


@pytest.mark.parametrize(
    ("gradient", "hidden", "seconds"),
    [(100e6, 0.0, 1.0), (100e6, 0.4, 0.6), (100e6, 5.0, BUCKET_BYTES / 100e6), (10e6, 5.0, 0.1)],
)
def test_a_step_waits_for_what_is_not_hidden_and_for_the_last_bucket(gradient, hidden, seconds):
    assert exposed_seconds(gradient, 100e6, hidden) == pytest.approx(seconds)


def test_predictions_are_the_formula(model):
    """By hand for four L4: a step too short to hide anything but the backward pass."""
    table = predictions(model, image_tokens=1000, text_tokens=5000, images=8)
    assert len(table) == 12 and table.loc[table["ranks"] == 1, "efficiency"].to_list() == pytest.approx([1.0] * 4)
    flops = 6 * sum(
        tokens * sum(p.numel() for p in tower.parameters())
        for tower, tokens in ((model.image_encoder, 8000), (model.text_encoder, 5000))
    )
    compute = flops / (0.4 * 121e12) / 4
    waiting = 4 * sum(p.numel() for p in model.parameters()) * 1.5 / (0.4 * 32e9)
    row = table[(table["ranks"] == 4) & (table["exchange"] == "every step")].iloc[0]
    assert row["step, ms"] == pytest.approx(1e3 * (compute + waiting), rel=1e-6)  # one bucket: nothing is hidden
    assert row["images/s"] == pytest.approx(8 / (compute + waiting), rel=1e-6)


def test_overlap_counts_covered_time_once():
    """All-reduces cover 0-4 and 6-8; computing covers 3-7: of 6 units, 2."""
    assert shared_share([[0, 4], [1, 2], [6, 8]], [[3, 5], [4, 7]]) == pytest.approx(2 / 6)
    assert shared_share([[0, 1]], [[2, 3]]) == 0
