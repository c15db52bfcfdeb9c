import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vqa.config import MeasurementConfig
from vqa.experiments.quantization_aware import (
    FINE_TUNED,
    IN_FILE,
    POST_TRAINING,
    RoundedWeight,
    exported,
    round_input,
    rounded,
)
from vqa.run_folder import Run
from vqa.study.launch import launch


def test_a_weight_has_fifteen_levels_a_channel():
    """Against arithmetic by hand: the largest of a channel keeps its value, all others move half a level at most."""
    weight = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    weight[2] *= 100  # another channel's range is no concern of the rest
    found = RoundedWeight(4)(weight)
    for channel, given in zip(found, weight, strict=True):
        level = given.abs().max() / 7
        assert len(channel.unique()) <= 15
        assert (channel / level).sub((channel / level).round()).abs().max() < 1e-4
        assert (channel - given).abs().max() <= level / 2 + 1e-6


def test_gradients_pass_as_if_nothing_were_rounded():
    weight = torch.randn(4, 8, requires_grad=True)
    RoundedWeight(4)(weight).sum().backward()
    assert weight.grad.equal(torch.ones(4, 8))
    given = torch.randn(5, 8, requires_grad=True)
    round_input(nn.Identity(), (given,)).sum().backward()
    assert given.grad.equal(torch.ones(5, 8))


def test_an_input_keeps_zero_and_its_extremes():
    given = torch.tensor([-1.0, 0.0, 0.3, 4.1])
    found = round_input(nn.Identity(), (given,))
    assert found[1] == 0 and (found - given).abs().max() <= 5.1 / 255
    assert (round_input(nn.Identity(), (torch.zeros(3),)) == 0).all()


def test_the_model_keeps_its_rounded_weights_and_nothing_else(model):
    names, before = set(model.state_dict()), model.answer_head.weight.clone()
    with rounded(model, 4):
        assert "answer_head.parametrizations.weight.original" in model.state_dict()
    assert set(model.state_dict()) == names and not any(module._forward_pre_hooks for module in model.modules())
    assert model.answer_head.weight.equal(RoundedWeight(4)(before))


def test_ddp_was_in_the_way_of_export_and_taking_it_off_is_enough(one_rank):
    network, given = nn.Linear(4, 2), {"input": np.zeros((1, 4), dtype=np.float32)}
    inside = DistributedDataParallel(network)
    wrapped, unwrapped = exported("DDP", inside, given), exported("unwrapped", inside.module, given)
    assert (wrapped.value, unwrapped.value) == (0, 1)
    assert wrapped.arm.startswith("DDP: ") and unwrapped.arm == "unwrapped"


def test_fine_tuning_is_the_same_on_one_rank_and_on_two(trained, tiny_profile):
    """The tiny teacher as its own teacher; nearly, as inputs are rounded between the extremes of a rank's share."""
    taught = {
        "distilled": True,
        "aligned": False,
        "teacher": trained["alone"].config.model_dump(),
        "distillation__feature_weight": 0.0,
        "distillation__token_weight": 0.0,
    }
    configs = [tiny_profile.run("teacher", launch__world_size=ranks, **taught) for ranks in (1, 2)]
    runs = launch([Run(MeasurementConfig(kind="quantization_aware", runs=[run])) for run in configs], at_once=2)
    for run in runs:
        accuracy = {row.arm: row.value for row in run.results() if row.metric == "accuracy"}
        assert list(accuracy) == ["", POST_TRAINING, FINE_TUNED, IN_FILE]
        assert accuracy[""] == pytest.approx(trained["alone"].result("accuracy").value)
        assert accuracy[IN_FILE] == pytest.approx(accuracy[FINE_TUNED], abs=5)
        assert [row.value for row in run.results() if row.metric == "exported"] == [1, 0]
    one, two = (run.metrics()["loss"].dropna().iloc[0] for run in runs)
    assert one == pytest.approx(two, rel=0.05)
