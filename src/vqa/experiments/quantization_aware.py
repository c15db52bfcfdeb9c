"""Quantization-aware fine-tuning: a trained model learns to live with coarse weights, taught by itself in fp32.

In the forward pass the weights of convolutions and linear layers are rounded, per output channel, and so are
their inputs, to 8 bits; gradients pass as if nothing were rounded (straight-through estimator,
https://arxiv.org/abs/1308.3432; in this use https://arxiv.org/abs/1712.05877, section 3).
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

from vqa.data import source as sources
from vqa.deployment import ask
from vqa.deployment.deploy import calibration_images, one_pair, write_model
from vqa.deployment.onnx_int8 import ENGINE, all_logits
from vqa.distributed import Rank
from vqa.evaluation.evaluate import predict
from vqa.evaluation.metrics import cluster_interval, paired_difference
from vqa.experiments.measurement import BenchmarkConfig
from vqa.models.build import load_vqa_model
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training.logger import Reporter
from vqa.training.objectives import Distillation
from vqa.training.train import Trainer

WEIGHT_BITS = 3  # with 8 and 4 too little is lost to be won back
POST_TRAINING, FINE_TUNED = f"int{WEIGHT_BITS}", f"int{WEIGHT_BITS}, fine-tuned"
IN_FILE = f"{FINE_TUNED}, int8 file"  # precisions, as results name them


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


def qat(config: "BenchmarkConfig", source: sources.Source, rank: Rank, run: Run) -> list[Result]:
    """The teacher of `config.run` with weights of WEIGHT_BITS, before and after fine-tuning on its own fp32 answers.

    On any number of ranks; DDP is then taken off and the model deployed in int8 as usual.
    """
    objective = Distillation(config.run, source, rank)
    objective.network.to(rank.device)
    model, test = objective.model, objective.splits["test"]
    model.load_state_dict(load_vqa_model(Run(config.run.teacher).folder / "model").state_dict())
    answered = {"fp32": predict(model, test, rank)}
    with rounded(model, WEIGHT_BITS):
        answered[POST_TRAINING] = predict(model, test, rank)
        trainer = Trainer(config.run, objective, rank)
        reporter = Reporter(run, rank, trainer)
        for epoch in range(config.run.train.epochs):
            trainer.epoch(epoch, reporter)
            reporter.epoch(epoch, objective.judge(), better=True)
        answered[FINE_TUNED] = predict(model, test, rank)
    wrapped = DistributedDataParallel(model)
    if not rank.is_main:
        return []
    rows = [exported("unwrapped", model.eval(), one_pair(test)), exported("DDP", wrapped.eval(), one_pair(test))]
    with tempfile.TemporaryDirectory() as scratch:
        write_model(model.cpu(), calibration_images(model, source), Path(scratch))
        logits = all_logits(ask.onnx_logits(Path(scratch) / "model-int8.onnx", torch.get_num_threads()), test)
    prediction = np.array(model.answers)[logits.argmax(-1)]
    answered[IN_FILE] = test.frame.assign(correct=prediction == test.frame["answer"])
    return [*rows, *_accuracies(answered, config.run.role)]


def exported(name: str, network: nn.Module, inputs: dict[str, np.ndarray]) -> Result:
    """Whether torch.export, with which PT2E begins, takes `network`: 1, or 0 with its reason among the labels."""
    words, device = name, next(network.parameters()).device
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every buffer that DDP keeps a list of
            torch.export.export(network, (), kwargs={k: torch.from_numpy(v).to(device) for k, v in inputs.items()})
    except RuntimeError as error:
        words = f"{name}: {str(error).splitlines()[0]}"
    return Result("exported", float(words == name), "", labels={"engine": words})


def _accuracies(answered: dict[str, pd.DataFrame], role: str) -> list[Result]:
    """Test accuracy of each precision, and what it loses to fp32 on the same questions."""
    rows, fp32 = [], answered["fp32"]
    for precision, frame in answered.items():
        engine, image = ENGINE if precision == IN_FILE else "eager, rounded", frame["image_id"]
        labels = {"model": role, "precision": precision, "engine": engine}
        value, low, high = (100 * part for part in cluster_interval(frame["correct"].to_numpy(), image.to_numpy()))
        rows.append(Result("accuracy", value, "%", low, high, "test", labels))
        value, low, high = (100 * part for part in paired_difference(fp32["correct"], frame["correct"], image))
        rows.append(Result("accuracy_drop", value, "points", low, high, "test", labels))
    return rows
