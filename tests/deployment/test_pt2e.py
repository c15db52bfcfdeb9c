import numpy as np
import pytest
import torch

from vqa.deployment import ask, pt2e
from vqa.deployment.deploy import eager, write_model
from vqa.deployment.onnx_int8 import QuantizeError
from vqa.deployment.pt2e import compiled, compiled_int8, int8_kernels, missing, quantized
from vqa.experiments import quantization_latency as deployment
from vqa.experiments.measurement import BenchmarkConfig
from vqa.experiments.quantization import cross_check
from vqa.models.build import load_vqa_model
from vqa.training.objectives import split_for

needs_a_compiler = pytest.mark.skipif(bool(missing()), reason=missing())


class Layers(torch.nn.Module):
    """A convolution and two linear layers: the kinds that PT2E quantizes, and little to compile."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3)
        self.inner, self.outer = torch.nn.Linear(8, 32), torch.nn.Linear(32, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(self.convolution(pixels).relu().mean((2, 3))).relu())


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
    imitated = np.concatenate([eager(graph)(**picture) for picture in pictures])
    assert 0 < np.abs(found - plain).max() < 0.1 * np.ptp(plain)
    assert np.abs(found - imitated).max() < 0.02 * np.ptp(plain)
    assert int8_kernels(in_int8, pictures[0]) == 3 and int8_kernels(in_fp32, pictures[0]) == 0


@needs_a_compiler
def test_a_silent_fp32_run_is_refused(layers, pictures):
    """Uncompiled, the graph imitates int8 in fp32, and so it does when inductor finds no pattern it knows."""
    with pytest.raises(QuantizeError, match="only 0 of 3 layers run in int8"):
        compiled_int8(layers, layers, pictures[0])


@needs_a_compiler
def test_two_engines_agree_on_a_trained_model(trained, source, one_rank, tmp_path, monkeypatch):
    """Two quantizers that share no code. Measured: 30 of 30 kernels; the stated rate for this model is 95 %."""
    monkeypatch.setattr(ask, "DEPLOYMENTS", tmp_path)
    monkeypatch.setattr(deployment, "TIMED_ROUNDS", 2)
    run = trained["alone"]
    folder = tmp_path / run.folder.name
    config = BenchmarkConfig(kind="cross_check", run=run.config, steps=2)
    folder.mkdir()
    model = load_vqa_model(run.folder / "model")
    write_model(model, split_for(model, source.splits["train"]).batch(np.arange(16)).pixel_values.numpy(), folder)
    found = {(row.metric, row.labels["engine"]): row.value for row in cross_check(config, source, one_rank)}
    assert found["agreement_with_onnx_runtime", "PT2E"] >= 95
    weighted = sum(isinstance(module, torch.nn.Linear | torch.nn.Conv2d) for module in model.modules())
    assert found["int8_kernels", "PT2E"] == weighted
    assert found["bytes_on_disk", "PT2E"] > 10_000
    assert {engine for metric, engine in found if metric == "latency_p50_ms"} == {"PT2E", "compiled"}
    assert min(value for (metric, _), value in found.items() if "seconds" in metric or "ratio" in metric) > 0


def test_without_a_compiler_or_torchao_there_is_one_sentence(monkeypatch):
    """As on a fresh machine: inductor's own search for a compiler finds none of those it is told of."""
    from torch._inductor import config

    monkeypatch.setattr(pt2e.importlib.util, "find_spec", lambda name: object())
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert missing() == "torch.compile needs a C++ compiler and this machine has none: install g++ or clang++"
    monkeypatch.setattr(pt2e.importlib.util, "find_spec", lambda name: None)
    assert missing() == "PT2E needs torchao, which is not installed: pip install -r requirements.txt"
