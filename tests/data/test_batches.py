from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vqa.data.batches import UNKNOWN_ANSWER, EpochPlan, Split
from vqa.data.processor import Processor
from vqa.data.source import QUESTION_COLUMNS, Table
from vqa.evaluation.evaluate import predict

WORLDS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]  # ranks, accumulation steps


@pytest.fixture(scope="module")
def split(source, processor) -> Split:
    return Split(source.splits["train"], processor)


@pytest.fixture(scope="module")
def rows(source) -> np.ndarray:
    """The training images as the library `datasets` decodes them, (M, 3, 64, 64)."""
    table = source.splits["train"]
    return np.array([table.images[int(row)]["image"] for row in table.rows], np.uint8)


def contents(pixel_values: torch.Tensor) -> Counter:
    return Counter(image.numpy().tobytes() for image in pixel_values)


def test_a_batch_scores_what_scoring_pair_by_pair_does(model, split):
    """The judge takes one image and one question at a time, tokenised alone, without any padding.

    Measured over 8 seeds: at most 2.1e-7 apart, at logits up to 0.66 and a spread between pairs above 1.4e-2.
    """
    batch = split.batch(np.array([5, 0, 17, 9]))
    records = [record for image in (5, 0, 17, 9) for record in records_of(split, image)]
    one = torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        together = model(**batch.inputs()).logits
        apart = []
        for image, question in records:
            ids = torch.tensor([model.processor.tokenizer.encode(question).ids])
            pixels = split.batch(np.array([image])).pixel_values
            apart.append(model(pixels, one, ids, torch.ones_like(ids), one).logits)
        repeated = model(**batch.ungrouped().inputs()).logits
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-6)
    torch.testing.assert_close(together, repeated, rtol=0, atol=1e-6)
    assert together.std(0).max() > 1e-2  # pairs do differ


def records_of(split: Split, image: int) -> list[tuple[int, str]]:
    image_id = split.frame["image_id"].unique()[image]
    return [(image, question) for question in split.frame.loc[split.frame["image_id"] == image_id, "question"]]


def test_each_image_and_each_distinct_question_stands_once(split, rows):
    images = np.array([3, 1, 40, 2])
    batch = split.batch(images)
    assert (batch.pixel_values.numpy() == rows[images]).all()
    assert len(batch.input_ids.unique(dim=0)) == len(batch.input_ids) < len(batch)
    assert batch.question_number.unique().tolist() == batch.question_number.tolist()


def test_index_maps_lead_back_to_the_table(split, source, processor):
    images = np.array([3, 1, 40, 2])
    batch = split.batch(images)
    texts = processor.tokenizer.decode_batch(batch.input_ids.tolist())
    paired = [
        (int(images[i]), texts[q].replace(" ?", "?"), source.answers[label])
        for i, q, label in zip(batch.image_index, batch.question_index, batch.labels, strict=True)
    ]
    ids, questions = source.splits["train"].image_ids, source.splits["train"].questions
    expected = [(i, row) for i in images.tolist() for row in questions[questions["image_id"] == ids[i]].itertuples()]
    assert paired == [(i, row.question, row.answer) for i, row in expected]


def test_a_selection_has_its_own_images_and_questions_in_its_own_order(source, rows):
    whole = source.splits["train"]
    table = whole.select(np.array([9, 2, 30])).select(np.array([2, 0]))
    assert (table.pixels(np.array([1, 0])) == rows[[9, 30]]).all()
    assert table.image_ids.tolist() == whole.image_ids[[30, 9]].tolist()
    assert table.captions == [whole.captions[30], whole.captions[9]]
    by_image = [whole.questions[whole.questions["image_id"] == whole.image_ids[i]] for i in (30, 9)]
    pd.testing.assert_frame_equal(table.questions, pd.concat(by_image, ignore_index=True))


def test_images_of_a_table_in_several_pieces(source, rows):
    table = source.splits["train"]
    pieces = [table.images.select(table.rows[[i]]).flatten_indices() for i in (4, 8, 1)]
    joined = Table.of(datasets.concatenate_datasets(pieces), table.questions)
    assert (joined.pixels(np.array([2, 0, 1])) == rows[[1, 4, 8]]).all()


def test_a_batch_is_a_copy_that_may_be_changed(split, rows):
    split.batch(np.array([0])).pixel_values.zero_()
    assert (split.batch(np.array([0])).pixel_values.numpy() == rows[:1]).all() and rows[0].any()


def test_flips_are_numpys(split, rows):
    images, flips = np.array([4, 5, 6, 7]), np.array([[False, False], [True, False], [False, True], [True, True]])
    expected = [rows[4], rows[5][:, :, ::-1], rows[6][:, ::-1, :], rows[7][:, ::-1, ::-1]]
    assert (split.batch(images, flips).pixel_values.numpy() == np.stack(expected)).all()


def test_resizing_is_pillows(source, processor, rows):
    """To within one of 255 levels, by which two fixed-point roundings may differ."""
    forty = Processor(processor.tokenizer, source.answers, 40, 32)
    small = Split(source.splits["train"], forty).batch(np.arange(8)).pixel_values.numpy()
    for ours, image in zip(small, rows[:8], strict=True):
        pillow = Image.fromarray(image.transpose(1, 2, 0)).resize((40, 40), Image.Resampling.BILINEAR)
        assert np.abs(ours.transpose(1, 2, 0).astype(int) - np.asarray(pillow)).max() <= 1


def test_an_epoch_takes_each_image_at_most_once():
    plan = EpochPlan.make(67, 8, seed=0, epoch=0, flips=False)
    assert plan.steps.shape == (8, 8)  # three images wait for another epoch
    assert len(np.unique(plan.steps)) == 64 and plan.steps.min() >= 0 and plan.steps.max() < 67


def test_epochs_and_seeds_differ_and_repeat():
    def plan(seed: int, epoch: int) -> bytes:
        made = EpochPlan.make(64, 8, seed, epoch, flips=True)
        return made.steps.tobytes() + made.flips.tobytes()

    assert len({plan(0, 0), plan(0, 1), plan(1, 0), plan(1, 1)}) == 4
    assert plan(1, 1) == plan(1, 1)


def test_flips_change_half_of_the_images_each_way_and_no_order():
    flipped, plain = (EpochPlan.make(4000, 8, 0, 0, flips=flips) for flips in (True, False))
    assert (flipped.steps == plain.steps).all() and plain.flips is None
    share = flipped.flips.mean((0, 1))  # 4,000 coins: four standard deviations are 0.032
    assert (abs(share - 0.5) < 0.032).all()
    assert abs(np.corrcoef(flipped.flips.reshape(-1, 2).T)[0, 1]) < 0.063


@pytest.mark.parametrize("flips", [False, True])
def test_a_step_is_the_same_images_for_any_number_of_ranks_and_parts(split, flips):
    plan = EpochPlan.make(len(split), 16, seed=0, epoch=3, flips=flips)
    for step in range(2):
        whole = contents(split.batch(plan.steps[step], plan.flips[step] if flips else None).pixel_values)
        for ranks, parts in WORLDS:
            shares = [list(plan.micro_batches(step, split, rank, ranks, parts)) for rank in range(ranks)]
            assert [len(share) for share in shares] == [parts] * ranks
            assert {len(batch.pixel_values) for share in shares for batch in share} == {16 // ranks // parts}
            assert sum((contents(batch.pixel_values) for share in shares for batch in share), Counter()) == whole


@pytest.fixture
def odd(source) -> Table:
    """One image with questions that nobody planned for; the last answer was never seen in training."""
    table = source.splits["train"].select(np.array([0]))
    asked = zip(
        ["", "why " * 5000, "🟥🔺 what?", "what shape is present?"], ["yes", "no", "circle", "heptagon"], strict=True
    )
    rows = [(table.image_ids[0], number, question, "odd", answer) for number, (question, answer) in enumerate(asked)]
    return replace(table, questions=pd.DataFrame(rows, columns=QUESTION_COLUMNS))


def test_odd_questions_get_finite_logits_within_the_token_limit(model, odd):
    batch = Split(odd, model.processor).batch(np.array([0]))
    assert batch.input_ids.shape == (4, model.processor.max_question_tokens)
    assert batch.attention_mask.sum(1).min() == 2  # the empty question: [CLS] [SEP]
    with torch.inference_mode():
        logits = model(**batch.inputs()).logits
    assert logits.shape == (4, len(model.processor.answers)) and logits.isfinite().all()


def test_an_answer_outside_the_vocabulary_is_counted_and_wrong(model, odd, one_rank):
    frame = predict(model, Split(odd, model.processor), one_rank)
    assert frame["answer"].tolist() == ["yes", "no", "circle", "heptagon"]
    assert not frame["correct"].iloc[3] and frame["prediction"].isin(model.processor.answers).all()


def test_an_answer_outside_the_vocabulary_adds_nothing_to_the_loss(model, odd):
    batch = Split(odd, model.processor).batch(np.array([0]))
    assert batch.labels[3] == UNKNOWN_ANSWER and batch.labels[:3].min() >= 0
    output = model(**batch.inputs(), labels=batch.labels)
    expected = -output.logits.log_softmax(1)[range(3), batch.labels[:3]].sum().item() / 4
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    assert not gradient[3].any() and gradient[:3].any(1).all()
