import numpy as np
import pytest
from transformers import BertTokenizerFast

from vqa.data.processor import Processor, train_tokenizer

LONG = "is there a blue " * 20 + "circle?"


@pytest.fixture(scope="module")
def questions(source) -> list[str]:
    return source.splits["train"].questions["question"].unique().tolist()


def test_the_same_words_in_any_order_give_the_same_tokenizer(questions):
    """Ranks each make their own, and so does a run that takes over its parent's towers."""
    made = [train_tokenizer(texts) for texts in (questions, questions[::-1], set(questions))]
    assert len({tokenizer.to_str() for tokenizer in made}) == 1


def test_encoding_is_transformers_own(processor, questions):
    """The judge is given only the vocabulary; texts of other lengths, unknown words, accents and capitals."""
    vocabulary = processor.tokenizer.get_vocab()
    judge = BertTokenizerFast(vocab=vocabulary, do_lower_case=True)
    for texts in (questions[:40], ["", "WHAT colour is thé zebra?", LONG], [LONG]):
        expected = judge(texts, padding=True, truncation=True, max_length=32, return_tensors="np")
        ids, mask = processor.encode(texts)
        assert (ids == expected["input_ids"]).all() and (mask == expected["attention_mask"]).all()


def test_the_tokenizer_knows_every_training_word(processor, questions):
    ids, _ = processor.encode(questions)
    assert processor.tokenizer.token_to_id("[UNK]") not in ids
    assert processor.tokenizer.token_to_id("[UNK]") in processor.encode(["what colour is the 斑马?"])[0]


def test_length_is_counted_before_the_cut(processor):
    assert processor.encode([LONG])[0].shape == (1, 32)
    assert processor.length(LONG) == 4 * 20 + 2 + 2
    assert processor.length("what shape is present?") == 7


def test_a_processor_that_was_saved_reads_as_before(processor, tmp_path, questions):
    processor.save(tmp_path, more={"kept": True})
    again = Processor.load(tmp_path)
    assert (again.answers, again.image_size, again.max_question_tokens) == (processor.answers, 64, 32)
    for ours, before in zip(again.encode([*questions, LONG]), processor.encode([*questions, LONG]), strict=True):
        assert np.array_equal(ours, before)
