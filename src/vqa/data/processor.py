"""From tables to batches in which each image and each distinct question stands once.

A batch scores N pairs but encodes only I images and U questions; index maps say which go together.
On easy-VQA an image has 9.6 questions and a split only 107 distinct ones, so this is most of the
speed of the study.
"""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def encode(tokenizer: PreTrainedTokenizerBase, questions: list[str], max_tokens: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (Q, T): T as the longest needs, cut at `max_tokens`."""
    encoded = tokenizer(questions, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def train_tokenizer(questions: list[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer in BERT's form, its vocabulary the words and letters of `questions`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for q in questions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(q))}
    letters = sorted({letter for word in words for letter in word})
    # The library's trainer numbers equal counts differently in each process; this order is always the same.
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *sorted(words)])
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
