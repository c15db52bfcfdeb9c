import numpy as np
import pytest
import torch

from vqa.deployment import pt2e
from vqa.deployment.deploy import eager
from vqa.deployment.onnx_int8 import LogitsOf, QuantizeError
from vqa.deployment.pt2e import compiled, compiled_int8, int8_kernels, missing, quantized
from vqa.models.vqa_model import VQAOutput

needs_a_compiler = pytest.mark.skipif(bool(missing()), reason=missing())


class Layers(torch.nn.Module):
    """A convolution and two linear layers: the kinds that PT2E quantizes, and little to compile."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3)
        self.inner, self.outer = torch.nn.Linear(8, 32), torch.nn.Linear(32, 5)

    def forward(self, pixels: torch.Tensor) -> VQAOutput:
        logits = self.outer(self.inner(self.convolution(pixels).relu().mean((2, 3))).relu())
        return VQAOutput(None, logits)


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    return Layers().eval()


@pytest.fixture(scope="module")
def pictures():
    return [{"pixels": np.random.default_rng(seed).random((1, 3, 16, 16), dtype=np.float32)} for seed in range(8)]


@needs_a_compiler
def test_compiled_is_eager_and_int8_is_near(layers, pictures):
    """Against eager PyTorch, and the imitation in fp32 that is not compiled. Measured: 1e-7, 0.6 % of the spread."""
    graph = quantized(layers, pictures)
    in_fp32, in_int8 = compiled(layers, pictures[0]), compiled_int8(layers, graph, pictures[0])
    plain = np.concatenate([eager(layers)(**picture) for picture in pictures])
    assert np.abs(np.concatenate([in_fp32(**picture) for picture in pictures]) - plain).max() < 1e-5
    found = np.concatenate([in_int8(**picture) for picture in pictures])
    with torch.no_grad():
        imitated = torch.cat([graph(pixels=torch.from_numpy(picture["pixels"])) for picture in pictures]).numpy()
    assert 0 < np.abs(found - plain).max() < 0.1 * np.ptp(plain)
    assert np.abs(found - imitated).max() < 0.02 * np.ptp(plain)
    assert int8_kernels(in_int8, pictures[0]) == 3 and int8_kernels(in_fp32, pictures[0]) == 0


@needs_a_compiler
def test_a_silent_fp32_run_is_refused(layers, pictures):
    """Uncompiled, the graph imitates int8 in fp32, and so it does when inductor finds no pattern it knows."""
    with pytest.raises(QuantizeError, match="only 0 of 3 layers run in int8"):
        compiled_int8(layers, LogitsOf(layers), pictures[0])


def test_without_a_compiler_or_torchao_there_is_one_sentence(monkeypatch):
    """As on a fresh machine: inductor's own search for a compiler finds none of those it is told of."""
    from torch._inductor import config

    monkeypatch.setattr(pt2e.importlib.util, "find_spec", lambda name: object())
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert missing() == "torch.compile needs a C++ compiler and this machine has none: install g++ or clang++"
    monkeypatch.setattr(pt2e.importlib.util, "find_spec", lambda name: None)
    assert missing() == "PT2E needs torchao, which is not installed: pip install -r requirements.txt"
