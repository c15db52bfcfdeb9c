import pytest

from vqa.config import load_profile
from vqa.deployment import ask
from vqa.experiments import quantization_latency as deployment
from vqa.experiments.measurement import BenchmarkConfig
from vqa.experiments.quantization import quantization, sensitivity
from vqa.experiments.quantization_latency import latency, untrained
from vqa.run_folder import Run


def test_a_public_text_tower_gets_its_whole_vocabulary(source):
    """Without its weights or its tokenizer: 30,522 words."""
    shape = load_profile("base").run("student", aligned=False)
    small = shape.model.image_encoder.model_copy(update={"width": 32, "pretrained": None})
    text = shape.model.text_encoder.model_copy(update={"width": 32, "layers": 1, "heads": 2})
    model = shape.model.model_copy(update={"image_encoder": small, "text_encoder": text})
    made = untrained(shape.model_copy(update={"model": model}), source)
    assert len(made.tokenizer) == 30522 and made.image_size == 224
    assert made.text_encoder.text.embeddings.word_embeddings.num_embeddings == 30522


def test_latency_measures_every_arm_and_the_ratios_follow(tiny_profile, source, one_rank, monkeypatch):
    monkeypatch.setattr(deployment, "STARTS", dict.fromkeys(deployment.STARTS, 1))
    ask_alone = deployment._peak_of_asking  # PyTorch takes seconds to start: not here
    monkeypatch.setattr(
        deployment,
        "_peak_of_asking",
        lambda pair, model, code: ask_alone(pair, model, code) if model.name != "run" else 1,
    )
    shapes = [tiny_profile.run(role) for role in ("teacher", "student")]
    rows = latency(BenchmarkConfig(kind="latency", run=shapes[1], others=shapes, steps=3), source, one_rank)
    arms = {
        (row.labels["model"], row.labels["precision"], row.labels["engine"])
        for row in rows
        if row.metric == "latency_p50_ms" and "file" not in row.labels["engine"]
    }
    models = [f"{role}, random weights" for role in ("teacher", "student")]
    ways = [("fp32", "eager"), ("bf16", "eager"), ("fp32", "ONNX Runtime"), ("int8", "ONNX Runtime")]
    assert arms == {(model, *way) for model in models for way in ways}
    found = {(row.metric, *sorted(row.labels.values())): row.value for row in rows}
    sizes = [row.value for row in rows if row.metric == "bytes_on_disk"]
    assert len(sizes) == 6 and min(sizes) > 10_000
    smaller = next(row.value for row in rows if row.metric == "teacher_over_student_int8_bytes_ratio")
    assert smaller == pytest.approx(
        found["bytes_on_disk", "eager", "fp32", models[0]] / found["bytes_on_disk", "ONNX Runtime", "int8", models[1]]
    )
    rates = {row.labels["engine"] for row in rows if row.metric == "questions_per_second"}
    engines = ("eager", "ONNX Runtime")
    assert rates == {
        f"{engine}, {pairs} at once, {threads}"
        for engine in engines
        for pairs in (1, 8)
        for threads in ("1 thread", "2 threads")
    }
    slower = {tuple(sorted(row.labels.items())) for row in rows if row.metric == "teacher_over_student_latency_ratio"}
    assert len(slower) == len(ways)  # one an engine and precision
    assert found["flops_per_question", models[0]] > 0
    assert 30e6 < found["process_peak_memory_bytes", "ONNX Runtime", "int8", models[1]] < 250e6  # no torch in it


def test_quantization_leaves_a_folder_that_ask_finds(trained, source, one_rank, tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "DEPLOYMENTS", tmp_path)
    config = BenchmarkConfig(kind="quantization", run=trained["alone"].config, steps=2)
    run = Run(config, module="vqa.experiments")
    rows = quantization(config, source, one_rank, run)
    assert ask.newest_deployment() == tmp_path / trained["alone"].folder.name
    assert {"accuracy", "agreement", "accuracy_drop_int8", "latency_p50_ms"} <= {row.metric for row in rows}
    assert {"prediction", "fp32_prediction"} <= set(run.predictions().columns)


def test_each_layer_is_judged_alone(trained, source, one_rank, monkeypatch):
    monkeypatch.setattr(deployment, "CALIBRATIONS", (4,))
    monkeypatch.setattr(deployment, "JUDGED_IMAGES", 8)
    config = BenchmarkConfig(kind="sensitivity", run=trained["alone"].config, steps=2)
    moved = {row.labels["precision"]: row.value for row in sensitivity(config, source, one_rank)}
    whole = moved.pop("int8, 4 calibration images")
    assert "int8 in image_encoder/vit/embeddings/patch_embeddings/projection" in moved
    assert all(0 <= value < 1 for value in moved.values()) and 0 < max(moved.values()) < 10 * whole
