"""06_quantization, quantization-aware fine-tuning: a trained model learns to live with coarse weights.

It is taught by itself in fp32. In the forward pass the weights of convolutions and linear layers are rounded, per
output channel, and so are their inputs, to 8 bits; gradients pass as if nothing were rounded (straight-through
estimator, https://arxiv.org/abs/1308.3432; in this use https://arxiv.org/abs/1712.05877, section 3).
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from vqa.deployment import ask
from vqa.deployment.deploy import calibration_images, one_pair, write_model
from vqa.deployment.onnx_int8 import all_logits
from vqa.evaluation.evaluate import predict
from vqa.evaluation.metrics import cluster_interval, paired_difference, percent
from vqa.experiments.measurement import Measurement, measures
from vqa.models.build import load_vqa_model
from vqa.results import EAGER, ONNX_RUNTIME, Result
from vqa.run_folder import Run
from vqa.training.distillation import Distillation
from vqa.training.logger import Logger
from vqa.training.train import Trainer

WEIGHT_BITS = 3  # with 8 and 4 too little is lost to be won back
POST_TRAINING, FINE_TUNED, IN_FILE = "post-training", "fine-tuned", "fine-tuned, int8 file"  # arms


class RoundedWeight(nn.Module):
    """A weight (O, …) on a grid of 2**bits - 1 levels per output channel, symmetric about zero."""

    def __init__(self, bits: int):
        super().__init__()
        self.top = 2 ** (bits - 1) - 1

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12) / self.top
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -self.top, self.top)


def round_input(layer: nn.Module, arguments: tuple[torch.Tensor]) -> torch.Tensor:
    """A layer's input on 256 levels between its extremes, zero one of them; a forward pre-hook."""
    (given,) = arguments
    low, high = given.detach().aminmax()
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).clamp(min=1e-12) / 255
    return torch.fake_quantize_per_tensor_affine(given, scale, (-low / scale).round().int(), 0, 255)


@contextmanager
def rounded(model: nn.Module, bits: int) -> Iterator[None]:
    """`model` computing with weights of `bits` bits and inputs of 8; afterwards it keeps the rounded weights."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(round_input) for layer in layers]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", RoundedWeight(bits))
    try:
        yield
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        for hook in hooks:
            hook.remove()


@measures
def quantization_aware(m: Measurement) -> list[Result]:
    """The teacher of the run with weights of WEIGHT_BITS, before and after fine-tuning on its own fp32 answers.

    On any number of ranks; DDP is then taken off and the model deployed in int8 as usual.
    """
    objective = Distillation(m.first, m.source, m.rank)
    objective.network.to(m.rank.device)
    model, test = objective.model, objective.splits["test"]
    model.load_state_dict(load_vqa_model(Run(m.first.teacher).folder / "model").state_dict())
    answered = {"": predict(model, test, m.rank)}
    with rounded(model, WEIGHT_BITS):
        answered[POST_TRAINING] = predict(model, test, m.rank)
        trainer = Trainer(m.first, objective, m.rank)
        logger = Logger(m.run, m.rank, m.first.train.epochs, trainer.steps_per_epoch)
        for epoch in range(m.first.train.epochs):
            trainer.epoch(epoch, logger.step)
            logger.epoch(epoch, objective.validate(), better=True)
        answered[FINE_TUNED] = predict(model, test, m.rank)
    wrapped = DistributedDataParallel(model)
    if not m.rank.is_main:
        return []
    rows = [exported("unwrapped", model.eval(), one_pair(test)), exported("DDP", wrapped.eval(), one_pair(test))]
    with tempfile.TemporaryDirectory() as scratch:
        write_model(model.cpu(), calibration_images(model, m.source), Path(scratch))
        logits = all_logits(ask.onnx_logits(Path(scratch) / "model-int8.onnx", torch.get_num_threads()), test)
    prediction = np.array(model.processor.answers)[logits.argmax(-1)]
    answered[IN_FILE] = test.frame.assign(correct=prediction == test.frame["answer"])
    return [*rows, *_accuracies(answered, m.first.role)]


def exported(name: str, network: nn.Module, inputs: dict[str, np.ndarray]) -> Result:
    """Whether torch.export, with which PT2E begins, takes `network`: 1, or 0 with its reason in the arm."""
    arm, device = name, next(network.parameters()).device
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every buffer that DDP keeps a list of
            torch.export.export(network, (), kwargs={k: torch.from_numpy(v).to(device) for k, v in inputs.items()})
    except RuntimeError as error:
        arm = f"{name}: {str(error).splitlines()[0]}"
    return Result("exported", float(arm == name), arm=arm)


def _accuracies(answered: dict[str, pd.DataFrame], role: str) -> list[Result]:
    """Test accuracy of each arm, and what it loses to fp32, the arm without a name, on the same questions."""
    rows, fp32 = [], answered[""]
    for arm, frame in answered.items():
        precision = f"int{WEIGHT_BITS}" if arm else "fp32"
        engine, image = ONNX_RUNTIME if arm == IN_FILE else EAGER, frame["image_id"]
        labels = {"arm": arm, "model": role, "precision": precision, "engine": engine}
        share = percent(cluster_interval(frame["correct"].to_numpy(), image.to_numpy()))
        lost = percent(paired_difference(fp32["correct"], frame["correct"], image))
        rows += [Result("accuracy", *share, "test", **labels), Result("accuracy_drop", *lost, "test", **labels)]
    return rows
