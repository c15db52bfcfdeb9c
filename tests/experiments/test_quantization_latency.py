import pytest

from vqa.config import load_profile
from vqa.experiments import quantization_latency as experiment
from vqa.experiments.quantization_latency import latency, untrained


def test_a_public_text_tower_gets_its_whole_vocabulary(source):
    """Without its weights or its tokenizer: 30,522 words."""
    run = load_profile("base").run("student", aligned=False)
    small = run.model.image_encoder.model_copy(update={"width": 32, "pretrained": None})
    text = run.model.text_encoder.model_copy(update={"width": 32, "layers": 1, "heads": 2})
    model = run.model.model_copy(update={"image_encoder": small, "text_encoder": text})
    made = untrained(run.model_copy(update={"model": model}), source)
    assert made.processor.vocabulary_size == 30522 and made.processor.image_size == 224
    assert made.text_encoder.text.embeddings.word_embeddings.num_embeddings == 30522


def test_latency_measures_every_arm_and_the_ratios_follow(tiny_profile, measurement, monkeypatch):
    monkeypatch.setattr(experiment, "STARTS", dict.fromkeys(experiment.STARTS, 1))
    ask_alone = experiment.peak_of_asking  # PyTorch takes seconds to start: not here
    monkeypatch.setattr(
        experiment, "peak_of_asking", lambda pair, folder, p: ask_alone(pair, folder, p) if folder.name != "run" else 1
    )
    rows = latency(measurement("latency", *(tiny_profile.run(role) for role in ("teacher", "student")), steps=3))
    found = {(row.metric, row.model, row.arm, row.precision, row.engine): row.value for row in rows}
    models, alone = ("teacher", "student"), "random weights"
    ways = [("fp32", "eager"), ("bf16", "eager"), ("fp32", "ONNX Runtime"), ("int8", "ONNX Runtime")]
    timed = {key[1:] for key in found if key[0] == "latency_p50_ms"}
    assert {key for key in timed if key[1] == alone} == {(model, alone, *way) for model in models for way in ways}
    assert {key for key in timed if key[1] != alone} == {
        (model, "file to answer", *way) for model in models for way in (ways[0], ways[3])
    }
    sizes = [value for key, value in found.items() if key[0] == "bytes_on_disk"]
    assert len(sizes) == 6 and min(sizes) > 10_000
    smaller = next(row.value for row in rows if row.metric == "teacher_over_student_int8_bytes_ratio")
    in_pytorch = found["bytes_on_disk", "teacher", alone, "fp32", "eager"]
    assert smaller == pytest.approx(in_pytorch / found["bytes_on_disk", "student", alone, "int8", "ONNX Runtime"])
    rates = {(row.arm, row.precision, row.engine) for row in rows if row.metric == "questions_per_second"}
    counts = [f"{pairs} at once, {threads}" for pairs in (1, 8) for threads in ("1 thread", "2 threads")]
    assert rates == {(arm, *way) for arm in counts for way in ways}
    per_engine = {(row.precision, row.engine) for row in rows if row.metric == "teacher_over_student_latency_ratio"}
    assert per_engine == set(ways)
    assert found["flops_per_question", "teacher", alone, None, None] > 0
    peaks = {key[3:]: value for key, value in found.items() if key[:2] == ("process_peak_memory_bytes", "student")}
    assert 30e6 < peaks["int8", "ONNX Runtime"] < 250e6 and peaks["fp32", "ONNX Runtime"] > 30e6  # no torch in it
