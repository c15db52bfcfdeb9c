import numpy as np
import pytest
import torch

from vqa.data.batches import Split
from vqa.deployment import ask
from vqa.deployment.deploy import write_model
from vqa.deployment.pt2e import missing
from vqa.experiments import quantization as experiment
from vqa.experiments.quantization import cross_check, quantization, sensitivity
from vqa.models.build import load_vqa_model
from vqa.run_folder import RunError


def test_quantization_leaves_a_folder_that_ask_finds(trained, measurement, tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "DEPLOYMENTS", tmp_path)
    m = measurement("quantization", trained["alone"].config)
    rows = quantization(m)
    assert ask.newest_deployment() == tmp_path / trained["alone"].folder.name
    assert {"accuracy", "agreement", "accuracy_drop_int8", "latency_p50_ms"} <= {row.metric for row in rows}
    assert {"prediction", "fp32_prediction"} <= set(m.run.predictions().columns)


def test_each_layer_is_compared_alone(trained, measurement, monkeypatch):
    monkeypatch.setattr(experiment, "CALIBRATIONS", (4,))
    monkeypatch.setattr(experiment, "VALIDATION_IMAGES", 8)
    rows = sensitivity(measurement("sensitivity", trained["alone"].config))
    assert {(row.precision, row.engine) for row in rows} == {("int8", "ONNX Runtime")}
    moved = {row.arm: row.value for row in rows}
    whole = moved.pop("4 calibration images")
    assert "int8 in image_encoder/vit/embeddings/patch_embeddings/projection" in moved
    assert all(0 <= value < 1 for value in moved.values()) and 0 < max(moved.values()) < 10 * whole


def test_without_a_deployment_there_is_nothing_to_check(trained, measurement, tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "DEPLOYMENTS", tmp_path)
    with pytest.raises(RunError, match="is missing: measure quantization first"):
        cross_check(measurement("cross_check", trained["alone"].config))


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_two_engines_agree_on_a_trained_model(trained, source, measurement, tmp_path, monkeypatch):
    """Two quantizers that share no code. Measured: 30 of 30 kernels; the stated rate for this model is 95 %."""
    monkeypatch.setattr(ask, "DEPLOYMENTS", tmp_path)
    monkeypatch.setattr(experiment, "TIMED_ROUNDS", 2)
    run = trained["alone"]
    folder = tmp_path / run.folder.name
    folder.mkdir()
    model = load_vqa_model(run.folder / "model")
    write_model(model, Split(source.splits["train"], model.processor).batch(np.arange(16)).pixel_values.numpy(), folder)
    rows = cross_check(measurement("cross_check", run.config))
    found = {(row.metric, row.engine): row.value for row in rows}
    assert found["agreement_with_onnx_runtime", "PT2E"] >= 95
    weighted = sum(isinstance(module, torch.nn.Linear | torch.nn.Conv2d) for module in model.modules())
    assert found["int8_kernels", "PT2E"] == weighted
    assert found["bytes_on_disk", "PT2E"] > 10_000
    assert {engine for metric, engine in found if metric == "latency_p50_ms"} == {"PT2E", "compiled"}
    assert min(value for (metric, _), value in found.items() if "seconds" in metric or "ratio" in metric) > 0
