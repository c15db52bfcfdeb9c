"""A model compiled by PyTorch itself, in fp32 and in int8: an independent check of the int8 file in ONNX Runtime.

PT2E, PyTorch 2 Export quantization (torchao): observers in the exported graph read the ranges of all activations
from training images and questions, and conversion writes int8 weights between quantize and dequantize nodes.
Inductor, weights frozen, turns those into oneDNN's int8 kernels; unfrozen, they run in fp32 without a warning.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vqa.deployment.onnx_int8 import Logits, LogitsOf, QuantizeError
from vqa.models.vqa_model import VQAModel

INT8_KERNELS = ("onednn::qconv", "onednn::qlinear_pointwise")  # how the profiler's names of them begin
Inputs = dict[str, np.ndarray]  # what VQAModel.forward takes


def missing() -> str:
    """Why this machine cannot compile a model or quantize it here, in one sentence; empty if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if importlib.util.find_spec("torchao") is None:
        return "PT2E needs torchao, which is not installed: pip install -r requirements.txt"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler and this machine has none: install g++ or clang++"
    return ""


def compiled(model: VQAModel, inputs: Inputs) -> Logits:
    """`model` compiled for inputs of the very shapes of `inputs`, its weights frozen; compilation happens here."""
    return _compiled(LogitsOf(model), inputs)


def _compiled(logits_of: nn.Module, inputs: Inputs) -> Logits:
    from torch._inductor import config

    network = torch.compile(logits_of, dynamic=False)

    @torch.no_grad()  # freezing refuses inference mode
    def logits(**given: np.ndarray) -> np.ndarray:
        return network(**_tensors(given)).float().numpy()

    with config.patch(freezing=True):  # as an option of compile it comes too late for Dynamo
        logits(**inputs)
    return logits


def quantized(model: VQAModel, calibration: Iterable[Inputs]) -> torch.fx.GraphModule:
    """`model`, giving its logits, with int8 weights and activations in the ranges that `calibration` gave.

    All inputs of `calibration` have one shape. Until the result is compiled, it imitates int8 arithmetic in fp32.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    first, *rest = calibration
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        observed = prepare_pt2e(torch.export.export(LogitsOf(model), (), kwargs=_tensors(first)).module(), quantizer)
        for inputs in (first, *rest):
            observed(**_tensors(inputs))
        return convert_pt2e(observed)


def compiled_int8(model: VQAModel, graph: torch.fx.GraphModule, inputs: Inputs) -> Logits:
    """`graph`, that `quantized` made of `model`, compiled for the shapes of `inputs`.

    Raises QuantizeError if a convolution or a linear layer of `model` does not run as an int8 kernel.
    """
    logits = _compiled(graph, inputs)
    wanted = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    if (found := int8_kernels(logits, inputs)) < wanted:
        raise QuantizeError(f"only {found} of {wanted} layers run in int8 under PT2E")
    return logits


def int8_kernels(logits: Logits, inputs: Inputs) -> int:
    """How many int8 kernels one call of `logits` runs, counted in a profiler's trace."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        logits(**inputs)
    return sum(event.count for event in profiled.key_averages() if event.key.startswith(INT8_KERNELS))


def save(graph: torch.fx.GraphModule, inputs: Inputs, path: Path) -> None:
    """Write `graph`, int8 weights and all, as an exported program for the shapes of `inputs`."""
    torch.export.save(torch.export.export(graph, (), kwargs=_tensors(inputs)), path)


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}
