import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from vqa.data.batches import Split
from vqa.deployment import ask
from vqa.deployment import onnx_int8 as int8
from vqa.deployment.onnx_int8 import QuantizeError, divergence, export, int8_kernels, kernels, layers, quantize_layers
from vqa.models.build import vqa_model

FUSIONS = {
    "concat": {"kind": "concat", "width": 32},
    "cross_attention": {"kind": "cross_attention", "width": 32, "layers": 2},
    "unified_decoder": {"kind": "unified_decoder", "width": 32, "layers": 1},
}


def make(role, fusion, tiny_profile, processor):
    torch.manual_seed(0)
    config = tiny_profile.run(role, model__fusion=FUSIONS[fusion])
    return vqa_model(config.model, processor).eval()


@pytest.fixture(scope="module")
def exported(tiny_profile, source, processor, tmp_path_factory):
    """The ONNX file of a random student with concat fusion, the model itself, and real images."""
    model = make("student", "concat", tiny_profile, processor)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export(model, path)
    images = Split(source.splits["train"], model.processor).batch(np.arange(16)).pixel_values.numpy()
    return model, path, images


def shapes(generator, images, questions, tokens, pairs):
    """Random inputs; the last question is padded to a third of its length."""
    mask = torch.ones(questions, tokens, dtype=torch.long)
    mask[-1, tokens // 3 + 1 :] = 0
    return {
        "pixel_values": torch.randint(0, 256, (images, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "image_index": torch.randint(0, images, (pairs,), generator=generator),
        "input_ids": torch.randint(5, 40, (questions, tokens), generator=generator),
        "attention_mask": mask,
        "question_index": torch.randint(0, questions, (pairs,), generator=generator),
    }


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_onnx_logits_are_pytorchs_at_any_shape(kind, fusion, tiny_profile, processor, tmp_path):
    """Tolerance 1e-5. Measured: at most 7e-7."""
    model = make(kind, fusion, tiny_profile, processor)
    export(model, tmp_path / "model.onnx")
    logits = ask.onnx_logits(tmp_path / "model.onnx", threads=1)
    generator = torch.Generator().manual_seed(0)
    for shape in [(1, 1, 4, 1), (3, 5, 9, 12), (2, 4, 32, 3), (5, 1, 6, 7)]:
        given = shapes(generator, *shape)
        with torch.no_grad():
            expected = model(**given).logits.numpy()
        found = logits(**{name: value.numpy() for name, value in given.items()})
        assert found.shape == expected.shape == (shape[-1], len(model.processor.answers))
        assert np.abs(found - expected).max() < 1e-5
        assert np.ptp(expected) > 0.01  # a constant would be equal too


def test_a_decoder_is_refused_in_one_sentence(tiny_profile, processor, tmp_path):
    model = make("teacher", "unified_decoder", tiny_profile, processor)
    with pytest.raises(QuantizeError, match="a unified decoder cannot be deployed"):
        export(model, tmp_path / "model.onnx")


def test_every_weight_is_found_and_runs_in_int8(exported, tmp_path):
    """20 convolutions, 6 products in the one text layer, 4 in fusion and head, 2 embeddings."""
    model, path, images = exported
    kinds = [node.split("/")[-1] for node in layers(path)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"Conv": 20, "Gemm": 3, "MatMul": 7, "Gather": 2}
    quantize_layers(path, tmp_path / "int8.onnx", images)
    ran = kernels(tmp_path / "int8.onnx")
    assert ran["QLinearConv"] == 20 and ran["Conv"] == 0 and int8_kernels(tmp_path / "int8.onnx") == 30
    assert int8_kernels(path) == 0
    tensors = {t.name: t for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    floats = sum(int(np.prod(t.dims)) for t in tensors.values() if t.data_type == onnx.TensorProto.FLOAT)
    assert floats < 0.05 * sum(p.numel() for p in model.parameters())  # norms and biases


def test_int8_weights_have_a_scale_for_each_channel(exported, tmp_path):
    """In the file itself: what multiplies an int8 weight has as many numbers as the weight has output channels.

    Dynamic products read their scale from an initializer named after the weight, convolutions from their fifth input.
    """
    _, path, images = exported
    quantize_layers(path, tmp_path / "int8.onnx", images)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    seen = Counter()
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1 and tensor.name.endswith("_quantized"):
            node = readers[tensor.name]
            if node.op_type == "Gather":  # an embedding: its rows are looked up, there is no channel to sum over
                continue
            channels = tensor.dims[0] if node.op_type in ("QLinearConv", "DequantizeLinear") else tensor.dims[-1]
            scale = tensor.name.removesuffix("_quantized") + "_scale"
            assert shapes[scale] == (channels,), (node.op_type, tensor.name)
            seen[node.op_type] += 1
    assert sum(seen.values()) == 30 and max(seen.values()) == 20, seen


def test_int8_answers_nearly_as_fp32(exported, tmp_path):
    _, path, images = exported
    quantize_layers(path, tmp_path / "int8.onnx", images)
    given = {n: v.numpy() for n, v in shapes(torch.Generator().manual_seed(1), 8, 6, 9, 40).items()}
    given["pixel_values"] = images[:8]
    found, expected = (ask.onnx_logits(file, 1)(**given) for file in (tmp_path / "int8.onnx", path))
    assert 0 < np.abs(found - expected).max() < 0.1 * np.ptp(expected)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_cross_attention_runs_in_int8_too(kind, tiny_profile, source, processor, tmp_path):
    """All of its products with a weight; measured: 1 % of the spread of the logits apart."""
    model = make(kind, "cross_attention", tiny_profile, processor)
    fp32, quantized = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export(model, fp32)
    images = Split(source.splits["train"], model.processor).batch(np.arange(16)).pixel_values.numpy()
    quantize_layers(fp32, quantized, images)
    weighted = sum(isinstance(module, torch.nn.Linear | torch.nn.Conv2d) for module in model.modules())
    assert int8_kernels(quantized) == weighted
    given = {n: v.numpy() for n, v in shapes(torch.Generator().manual_seed(1), 8, 6, 9, 40).items()}
    given["pixel_values"] = images[:8]
    found, expected = (ask.onnx_logits(file, 1)(**given) for file in (quantized, fp32))
    assert 0 < np.abs(found - expected).max() < 0.1 * np.ptp(expected)


def test_one_layer_alone(exported, tmp_path):
    _, path, images = exported
    convolution = next(name for name in layers(path) if name.endswith("Conv"))
    quantize_layers(path, tmp_path / "int8.onnx", images, only=[convolution])
    ran = kernels(tmp_path / "int8.onnx")
    assert ran["QLinearConv"] == 1 and int8_kernels(tmp_path / "int8.onnx") == 1


def test_layers_left_in_fp32_are_not_passed_over_in_silence(exported, tmp_path, monkeypatch):
    """As when the quantizer does not see a bias: it only warns."""
    _, path, images = exported
    monkeypatch.setattr(int8, "quantize_static", lambda given, made, *rest, **named: shutil.copyfile(given, made))
    with pytest.raises(QuantizeError, match="only 10 of 30 layers run in int8"):
        quantize_layers(path, tmp_path / "int8.onnx", images)


def test_divergence_is_that_of_the_textbook():
    first, second = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    assert divergence(first, second) == pytest.approx(0.25 * np.log(0.25 / 0.5) + 0.5 * np.log(0.5 / 0.25))
    assert divergence(first, first) == pytest.approx(0)
