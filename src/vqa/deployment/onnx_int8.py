"""A model as ONNX, in fp32 and in int8, and the proof that int8 is what runs.

Convolutions, and what stands between them, are quantized statically: uint8 activations, whose ranges
training images gave, and int8 weights per channel. Products with a weight matrix (text tower, ViT,
fusion, head) find the ranges of their activations anew for each question; embeddings are kept in int8.
"""

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch.nn.functional import kl_div

from vqa.data.batches import Split
from vqa.evaluation.evaluate import outputs
from vqa.models.vqa_model import VQAModel

OPSET = 17
IMAGES_PER_BATCH = 32
WEIGHTED = {"Conv": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}  # kinds of node, and which input is the weight
BETWEEN = ("Relu", "MaxPool", "Add")  # may stay in int8 from one convolution to the next
INT8_KERNELS = ("QLinearConv", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat")
Logits = Callable[..., np.ndarray]  # VQAModel.forward with NumPy arrays: (N, A)


class QuantizeError(RuntimeError):
    """A model that cannot be deployed; its message is one sentence for the user."""


class LogitsOf(torch.nn.Module):
    """`model`, a VQAModel, giving its logits (N, A) alone: what exporters and compilers shall see."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # exporters put the whole back into the mode that they find here

    def forward(self, *arrays: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return self.model(*arrays, **named).logits


def export(model: VQAModel, path: Path) -> None:
    """Write `model` as ONNX in fp32: any number of images, questions, tokens and pairs.

    Raises QuantizeError for the unified decoder, whose answers are written in a loop.
    """
    if model.config.fusion.kind == "unified_decoder":
        raise QuantizeError("a unified decoder cannot be deployed: choose a run with fusion concat or cross_attention")
    size = model.processor.image_size
    inputs = {
        "pixel_values": torch.zeros(2, 3, size, size, dtype=torch.uint8),
        "image_index": torch.tensor([0, 1, 0]),
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "question_index": torch.tensor([0, 1, 1]),
    }
    text, pair = {0: "questions", 1: "tokens"}, {0: "pairs"}
    axes = {"pixel_values": {0: "images"}, "input_ids": text, "attention_mask": text}
    axes |= {"image_index": pair, "question_index": pair, "logits": pair}
    with _quiet(), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        traced = str(Path(scratch) / "traced.onnx")
        warnings.simplefilter("ignore")  # of constants in the trace; that shapes are free is tested
        # The exporter by tracing names nodes by their place in the model, which lets layers be told apart.
        torch.onnx.export(
            LogitsOf(model.eval()),
            tuple(inputs.values()),
            traced,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
        # Fold constants and write shapes down: the quantizer passes over what it cannot see through.
        quant_pre_process(traced, str(path), skip_symbolic_shape=True)


def quantize_layers(fp32: Path, int8: Path, images: np.ndarray, only: Collection[str] = ()) -> None:
    """Quantize the ONNX model `fp32`, all of its layers or `only` some, calibrated with `images` (I, 3, H, W) uint8.

    Raises QuantizeError if a layer was left in fp32.
    """
    graph = onnx.load(fp32).graph
    chosen = [name for name in only or _weighted(graph)]
    convolved = [name for name in convolutions(graph) if name in chosen]
    products = [name for name in chosen if name not in convolved]
    with _quiet(), tempfile.TemporaryDirectory(dir=int8.parent) as scratch:
        dynamic = Path(scratch) / "dynamic.onnx" if convolved else int8
        if products:  # an empty list would mean every node
            quantize_dynamic(
                fp32,
                dynamic,
                op_types_to_quantize=[kind for kind in WEIGHTED if kind != "Conv"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=[*products, *(f"{name}_MatMul" for name in products)],  # it splits Gemm and renames
            )
        if convolved:
            quantize_static(
                dynamic if products else fp32,
                int8,
                _Images(images),
                op_types_to_quantize=["Conv", *BETWEEN],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=convolved if only else _convolutional(graph),
            )
    _refuse_fp32(int8, convolved, products, graph)


def _refuse_fp32(int8: Path, convolved: list[str], products: list[str], graph: onnx.GraphProto) -> None:
    """A tool that cannot quantize a layer leaves it as it is and says nothing: count what will run."""
    gathers = {node.name for node in graph.node if node.op_type == "Gather"}
    wanted, found = len(convolved) + len(set(products) - gathers), int8_kernels(int8)
    if found < wanted:
        raise QuantizeError(f"only {found} of {wanted} layers run in int8")


def layers(model: Path) -> list[str]:
    """The nodes of an ONNX file that hold a weight worth quantizing: convolutions, matrix products, embeddings."""
    return _weighted(onnx.load(model).graph)


def _weighted(graph: onnx.GraphProto) -> list[str]:
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) > 1]
    weights = {tensor.name for tensor in matrices if tensor.data_type == onnx.TensorProto.FLOAT}
    return [n.name for n in graph.node if n.op_type in WEIGHTED and n.input[WEIGHTED[n.op_type]] in weights]


def convolutions(graph: onnx.GraphProto) -> list[str]:
    return [node.name for node in graph.node if node.op_type == "Conv"]


def _convolutional(graph: onnx.GraphProto) -> list[str]:
    """Convolutions and the nodes between them, which see nothing else."""
    names, outputs = [], set()
    for node in graph.node:  # each stands after what it reads
        if node.op_type == "Conv" or (node.op_type in BETWEEN and outputs.issuperset(node.input)):
            names.append(node.name)
            outputs.update(node.output)
    return names


def kernels(model: Path) -> Counter:
    """How many nodes of each kind ONNX Runtime runs for `model` on this machine, after its own fusions."""
    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that the file is for this machine alone, as is meant
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def int8_kernels(model: Path) -> int:
    """How many of the nodes that ONNX Runtime runs for `model` compute with int8 numbers."""
    return sum(count for kind, count in kernels(model).items() if kind in INT8_KERNELS)


class _Images(CalibrationDataReader):
    """Calibration images in batches, each batch with one short question, which no convolution sees."""

    def __init__(self, images: np.ndarray):
        count = -(-len(images) // IMAGES_PER_BATCH)
        self.batches = iter(np.array_split(images, count))

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.batches, None)
        if images is None:
            return None
        one = np.ones((1, 1), dtype=np.int64)
        index = np.zeros(1, dtype=np.int64)
        return {
            "pixel_values": images,
            "image_index": index,
            "input_ids": one,
            "attention_mask": one,
            "question_index": index,
        }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of exporter and quantizer on steps that are taken here in another order."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.getLogger().setLevel(level)


def all_logits(logits: Logits, split: Split) -> np.ndarray:
    """What `logits` gives for all pairs of `split`, (N, A), in its order."""

    def model(**inputs: torch.Tensor) -> np.ndarray:
        return logits(**{name: value.numpy() for name, value in inputs.items()})

    return np.concatenate([made for _, made in outputs(model, split, torch.device("cpu"))])


def divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the probabilities from those of `reference`; both (N, A)."""
    given, true = (torch.from_numpy(values).double().log_softmax(-1) for values in (logits, reference))
    return kl_div(given, true, reduction="batchmean", log_target=True).item()


def layer_name(node: str) -> str:
    """A node's place in the model, without the words that every path has."""
    everywhere = ("model", "resnet", "encoder", "convolution", "text")
    return "/".join(part for part in node.split("/")[1:-1] if part not in everywhere)
