"""03_fusion: what each way to bring image and question together costs, and where cross attention looks."""

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from vqa.config import load_profile
from vqa.config.runs import ConcatConfig, CrossAttentionConfig
from vqa.data.batches import Batch, Split
from vqa.data.processor import Processor
from vqa.evaluation.timing import Arm, interleave, peak_memory, ratio
from vqa.experiments.measurement import (
    WARMUP_STEPS,
    Measurement,
    TrainingArm,
    interleave_training,
    measures,
    step_images,
)
from vqa.experiments.prototype import step_memory
from vqa.models.build import load_vqa_model
from vqa.models.parts import parameter_count, without_public_weights
from vqa.models.vqa_model import VQAModel
from vqa.results import Result
from vqa.run_folder import Run
from vqa.training.objectives import processor_for
from vqa.training.train import autocast

FULL_SIZE_FUSIONS = (
    ConcatConfig(width=768),
    CrossAttentionConfig(kind="cross_attention", width=768, layers=2, heads=12),
)
SHOWN = 8  # questions whose attention is drawn, at most half of them answered wrongly


@measures
def sharing(m: Measurement) -> list[Result]:
    """Questions a second through the fusion alone, forward and backward, shared against per pair."""
    learner = TrainingArm(m.first, m.source, m.rank)
    split, model, pairs = learner.split, learner.model, []

    def towers(batch: Batch) -> tuple:
        """The arguments of the fusion, the towers' features among them as its trainable inputs."""
        batch = batch.to(m.rank.device)
        with torch.no_grad():
            image = model.image_encoder(batch.pixel_values)
            text = model.text_encoder(batch.input_ids, batch.attention_mask)
        for features in (*image, *text):
            features.requires_grad_()
        return image, text, batch.attention_mask, batch.image_index, batch.question_index

    def inputs():
        for images in step_images(m.first, len(split), m.config.steps):
            batch = split.batch(images)
            pairs.append(len(batch))
            yield {"once per image": towers(batch), "once per pair": towers(batch.ungrouped())}

    def fuse(given: dict[str, tuple], name: str) -> None:
        model.fusion(*given[name]).sum().backward()

    shared, each = (Arm({"arm": name}, partial(fuse, name=name)) for name in ("once per image", "once per pair"))
    interleave([shared, each], inputs(), WARMUP_STEPS)
    asked = np.array(pairs[WARMUP_STEPS:])
    rows = [arm.result("questions_per_second", asked / arm.seconds) for arm in (shared, each)]
    return [*rows, shared.result("shared_over_per_pair_ratio", ratio(each, shared))]


@measures
def costs(m: Measurement) -> list[Result]:
    """Parameters, operations a question, memory, and questions a second in training and in answering."""
    named = [(run, {"fusion": run.model.fusion.kind, "model": run.model_name}) for run in m.config.runs]
    learners = [TrainingArm(run, m.source, m.rank, **labels) for run, labels in named]
    interleave_training(learners, m)
    batch = learners[0].split.batch(np.arange(m.first.train.global_batch_size)).to(m.rank.device)
    rows = []
    for learner in learners:
        rows.append(learner.result("training_questions_per_second", len(batch) / np.array(learner.seconds)))
        rows.append(Result("parameters", parameter_count(learner.model), **learner.labels))
        rows.append(step_memory(learner))
    with torch.inference_mode():
        for learner in learners:
            with FlopCounterMode(display=False) as counter:
                learner.model.eval()(**batch.inputs())
            operations = counter.get_total_flops() / len(batch)
            rows.append(Result("flops_per_question", operations, **learner.labels))
        answering = [Arm(learner.labels, partial(_answer, learner.model)) for learner in learners]
        interleave(answering, [batch] * m.config.steps)
    return rows + [arm.result("questions_per_second", len(batch) / np.array(arm.seconds)) for arm in answering]


def _answer(model: VQAModel, batch: Batch) -> None:
    model(**batch.inputs())


@measures
def full_size(m: Measurement) -> list[Result]:
    """Peak memory of a training step on one image at 224 px, per fusion, precision and checkpointing.

    The towers have the public full size and random weights, which cost the same memory.
    """
    base = load_profile("base").run("teacher", aligned=False)
    small = processor_for(m.first, m.source)
    processor = Processor(small.tokenizer, small.answers, base.data.image_size, base.model.max_question_tokens)
    rows = []
    for fusion in FULL_SIZE_FUSIONS:
        shape = without_public_weights(base.model).model_copy(update={"fusion": fusion, "dropout": 0.0})
        model = VQAModel(shape, processor).to(m.rank.device).train()
        batch = Split(m.source.splits["train"], model.processor).batch(np.arange(1)).to(m.rank.device)
        _backward(model, batch, m.rank.device, "off")  # gradients are allocated, and stay
        for checkpointing in (False, True):
            if checkpointing:
                model.checkpoint_gradients()
            for amp, precision in (("off", "fp32"), ("bf16", "bf16")):
                peak = peak_memory(partial(_backward, model, batch, m.rank.device, amp), m.rank.device)
                labels = {"model": "teacher", "fusion": fusion.kind, "precision": precision}
                rows.append(Result("peak_memory_bytes", peak, arm="checkpointing" if checkpointing else "", **labels))
    return rows


def _backward(model: VQAModel, batch: Batch, device: torch.device, amp: str) -> None:
    with autocast(device, amp):
        loss = model(**batch.inputs(), labels=batch.labels).loss
    loss.backward()


@measures
def attention(m: Measurement) -> list[Result]:
    """Write attention.npz into the run folder: where the last layer looks, for test questions, wrong ones first.

    question_id (S,), maps (S, T, P) means over heads, tokens (S, T), for up to SHOWN questions, the shorter padded.
    """
    trained = Run(m.first)
    model = load_vqa_model(trained.folder / "model")
    answered = trained.predictions().query("split == 'test'")
    wrong = answered[answered["correct"] == 0].drop_duplicates("image_id").head(SHOWN // 2)
    right = answered[answered["correct"] == 1].drop_duplicates("question_type").head(SHOWN - len(wrong))
    chosen = pd.concat([wrong, right]).drop_duplicates("question_id")
    split = Split(m.source.splits["test"], model.processor)
    place = {question: row for row, question in enumerate(split.frame["question_id"])}
    seen = [_look(model, split, place[question]) for question in chosen["question_id"]]
    longest = max(len(words) for _, words in seen)
    maps = np.stack([np.pad(look, ((0, longest - len(look)), (0, 0))) for look, _ in seen])
    tokens = np.array([[*words, *[""] * (longest - len(words))] for _, words in seen])
    with m.run.replacing("attention.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, question_id=chosen["question_id"].to_numpy(), maps=maps, tokens=tokens)
    return [Result("wrong_answers_shown", len(wrong))]


def _look(model: VQAModel, split: Split, row: int) -> tuple[np.ndarray, list[str]]:
    """Attention (T, P) of the question in `row` of the split's frame, and its T tokens."""
    image = np.searchsorted(split.first_pair, row, side="right") - 1
    batch = split.batch(np.array([image]))
    pair = int(row - split.first_pair[image])
    look = model.fusion.look(*model.towers(batch), batch)[pair].mean(0)  # (T, P)
    ids = batch.input_ids[batch.question_index[pair]].tolist()
    return look.numpy(), [model.processor.tokenizer.id_to_token(number) for number in ids]
