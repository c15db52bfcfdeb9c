import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vqa.data.batches import Split
from vqa.deployment import ask
from vqa.deployment import deploy as quantize
from vqa.deployment.deploy import deploy, latency_rows, one_pair
from vqa.deployment.onnx_int8 import all_logits
from vqa.evaluation.evaluate import predict
from vqa.evaluation.metrics import accuracy_results, paired_difference
from vqa.evaluation.timing import Arm
from vqa.models.build import load_vqa_model
from vqa.run_folder import Run, RunError


@pytest.fixture(scope="module")
def run(trained, source, one_rank, tmp_path_factory):
    """The run of the tiny teacher, its head shifted so that it gives all 13 answers: as trained, it says yes to all."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    shutil.copytree(trained["alone"].folder, folder)
    model = load_vqa_model(folder / "model")
    with torch.no_grad():
        logits = model(**Split(source.splits["test"], model.processor).batch(np.arange(32)).inputs()).logits
        model.answer_head.weight /= logits.std(0)[:, None]
        model.answer_head.bias.sub_(logits.mean(0)).div_(logits.std(0))
    shutil.rmtree(folder / "model")
    model.save(folder / "model")
    run = Run.open(folder)
    frames = [predict(model, Split(source.splits[name], model.processor), one_rank) for name in ("validation", "test")]
    named = [frame.assign(split=name) for name, frame in zip(("validation", "test"), frames, strict=True)]
    pd.concat(named, ignore_index=True).to_parquet(folder / "predictions.parquet")
    run.finish(accuracy_results(frames[1], "test"))
    return run


@pytest.fixture(scope="module")
def deployed(run, source, tmp_path_factory):
    return deploy(run, source, tmp_path_factory.mktemp("deployments") / "teacher")


def value(results, metric, precision, engine=None) -> float:
    (row,) = [
        row
        for row in results
        if row.metric == metric and row.precision == precision and (engine is None or row.engine == engine)
    ]
    return row.value


@pytest.mark.parametrize("precision, margin, tolerance", [("fp32", 0.0, 1e-4), ("int8", 0.5, 0.2)])
def test_the_folder_answers_as_evaluate_does(deployed, run, source, one_rank, tmp_path, precision, margin, tolerance):
    """200 test questions, asked with image files and words; int8 where the two best answers are not a close call."""
    model = load_vqa_model(run.folder / "model")
    split = Split(source.splits["test"], model.processor)
    expected = predict(model, split, one_rank).head(200)
    assert len(expected) == 200 and expected["prediction"].nunique() > 5
    test = source.splits["test"]
    for image_id, pixels in zip(test.image_ids, test.pixels(np.arange(len(test))), strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"{image_id}.png")
    answerer = ask.from_deployment(deployed.folder, precision)
    rows = answerer([(tmp_path / f"{row.image_id}.png", row.question) for row in expected.itertuples()])
    answers = np.array([answerer.top(row)[0][0] for row in rows])
    second, best = np.sort(all_logits(quantize.eager(model), split)[:200])[:, -2:].T
    clear = best - second >= margin
    assert clear.sum() > 25
    assert (answers == expected["prediction"].to_numpy())[clear].mean() >= (1.0 if precision == "fp32" else 0.95)
    assert np.abs(rows.max(-1) - expected["confidence"].to_numpy()).max() < tolerance


def test_what_is_said_of_int8_follows_from_its_answers(deployed):
    answered, results = deployed.predictions, deployed.results
    same = 100 * np.mean(answered["prediction"] == answered["fp32_prediction"])
    assert value(results, "agreement", "int8") == pytest.approx(same)
    for precision, column in (("int8", "prediction"), ("fp32", "fp32_prediction")):
        right = 100 * np.mean(answered[column] == answered["answer"])
        assert value(results, "accuracy", precision) == pytest.approx(right)
    lost = paired_difference(answered["fp32_correct"], answered["correct"], answered["image_id"])
    assert value(results, "accuracy_drop_int8", "int8") == pytest.approx(100 * lost[0])


def test_int8_is_smaller_and_runs(deployed):
    sizes = {p: (deployed.folder / f"model-{p}.onnx").stat().st_size for p in ("fp32", "int8")}
    assert sizes["int8"] < sizes["fp32"]
    assert all(value(deployed.results, "bytes_on_disk", p) == size for p, size in sizes.items())
    assert value(deployed.results, "int8_kernels", "int8") > 10


def test_the_card_says_what_was_measured(deployed, run):
    card = (deployed.folder / "README.md").read_text()
    accuracy = value(deployed.results, "accuracy", "int8")
    assert f"| int8, ONNX Runtime | {accuracy:.2f} [" in card
    assert f"{value(deployed.results, 'latency_p50_ms', 'int8'):.2f} |" in card
    assert run.folder.name in card and "easy_vqa" in card and "MIT" in card
    assert not re.search(r"[{}]", card)


def test_an_existing_folder_is_not_overwritten(deployed, run, source):
    before = (deployed.folder / "config.json").read_bytes()
    with pytest.raises(RunError, match="exists"):
        deploy(run, source, deployed.folder)
    assert (deployed.folder / "config.json").read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(run, source, tmp_path):
    """Under a file, because root may write into any directory."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "deployments" / "teacher"
    with pytest.raises(RunError, match=f"^cannot write {folder}: Not a directory; name another folder$"):
        deploy(run, source, folder)


def test_a_failure_leaves_nothing_behind(run, source, tmp_path, monkeypatch):
    def fail(*arguments):
        raise quantize.QuantizeError("no")

    monkeypatch.setattr(quantize, "quantize_layers", fail)
    with pytest.raises(quantize.QuantizeError):
        deploy(run, source, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_can_be_asked_too(deployed, run, source, tmp_path):
    test = source.splits["test"]
    Image.fromarray(test.pixels(np.array([0]))[0].transpose(1, 2, 0)).save(tmp_path / "image.png")
    pair = (tmp_path / "image.png", test.questions["question"].iloc[0])
    of_run, of_file = ask.load(run.folder), ask.from_deployment(deployed.folder, "fp32")
    assert np.abs(of_run([pair]) - of_file([pair])).max() < 1e-5


def test_what_is_not_a_finished_run_is_refused(tmp_path, monkeypatch, tiny_profile, source):
    monkeypatch.setattr(sys, "argv", ["quantize", str(tmp_path), str(tmp_path / "made")])
    with pytest.raises(SystemExit, match=r"^error: .* is not a run folder"):
        quantize.main()
    with pytest.raises(RunError, match="has not finished"):
        deploy(Run(tiny_profile.run("student", seed=77)), source, tmp_path / "made")


def test_an_alignment_is_refused_in_one_sentence(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deploy", str(trained["aligned"].folder), str(tmp_path / "made")])
    with pytest.raises(SystemExit, match=r"^error: .* aligned two towers; it answers no questions[^\n]*$"):
        quantize.main()


def test_a_reordered_answer_list_is_refused(run, source, tmp_path):
    """Two answers that the model gives, swapped in the run folder: nothing else would notice."""
    shutil.copytree(run.folder, tmp_path / "swapped")
    path = tmp_path / "swapped" / "model" / "config.json"
    config = json.loads(path.read_text())
    given = run.predictions().query("split == 'test'")["prediction"].value_counts().index
    first, second = (config["answers"].index(answer) for answer in given[:2])
    config["answers"][first], config["answers"][second] = given[1], given[0]
    path.write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"other answers to .* than it recorded"):
        deploy(Run.open(tmp_path / "swapped"), source, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_pair_alone_gets_the_answer_it_gets_among_others(deployed, source):
    """Whatever its question is filled up to; measured: 1e-5 apart at most, as the fixture spreads the logits."""
    split = Split(source.splits["test"], deployed.model.processor)
    together, logits = all_logits(quantize.eager(deployed.model), split), quantize.eager(deployed.model)
    for pair in (0, 1, 17, len(split.frame) - 1):
        for tokens in (0, 20):
            given = one_pair(split, pair, tokens)
            assert given["input_ids"].shape[1] >= tokens and given["attention_mask"][0, 0] == 1
            assert np.abs(logits(**given)[0] - together[pair]).max() < 1e-4


def test_latency_rows_are_in_milliseconds():
    labels = {"model": "student", "precision": "int8", "engine": "ONNX Runtime"}
    rows = latency_rows(Arm(labels, print, seconds=[0.001, 0.002, 0.003]))
    assert [(row.metric, row.value) for row in rows] == [("latency_p50_ms", 2.0), ("latency_p95_ms", 2.9)]
    assert (rows[0].model, rows[0].precision, rows[0].engine) == ("student", "int8", "ONNX Runtime")
