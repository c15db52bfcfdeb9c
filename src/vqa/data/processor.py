"""How a question becomes token ids, and all else that a model's weights mean nothing without.

Imports neither torch nor transformers: a deployed model reads its questions through the same class.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Processor:
    """A tokenizer in BERT's form, the closed list of answers and the model's sizes: what travels with its weights."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str], image_size: int, max_question_tokens: int):
        """`image_size` in pixels a side; a question is cut at `max_question_tokens`, its end mark kept."""
        self.answers, self.image_size, self.max_question_tokens = answers, image_size, max_question_tokens
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, as its settings are changed here
        self.tokenizer.enable_truncation(max_question_tokens)
        self.tokenizer.enable_padding(pad_id=self.tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")

    @property
    def vocabulary_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, questions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and attention_mask, (Q, T) int64 each: T as the longest needs, at most `max_question_tokens`."""
        rows = self.tokenizer.encode_batch(questions)
        return np.array([row.ids for row in rows], np.int64), np.array([row.attention_mask for row in rows], np.int64)

    def length(self, question: str) -> int:
        """The tokens of `question` before any are cut off."""
        first = self.tokenizer.encode(question)
        rest = sum(sum(part.attention_mask) - 2 for part in first.overflowing)  # each part has two marks of its own
        return sum(first.attention_mask) + rest

    def save(self, folder: Path, **more: Any) -> None:
        """Write tokenizer.json, and config.json with the answers, the sizes and `more`, which must be JSON."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        names = ("answers", "image_size", "max_question_tokens")
        settings = more | {name: getattr(self, name) for name in names}
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote. Raises FileNotFoundError if a file is missing."""
        config = json.loads((folder / "config.json").read_text())
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text())
        return cls(tokenizer, config["answers"], config["image_size"], config["max_question_tokens"])


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """BERT's WordPiece tokenizer, its vocabulary the words and letters of `texts`."""
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = sorted({letter for word in words for letter in word})
    # The library's trainer numbers equal counts differently in each process; this order is always the same.
    pieces = dict.fromkeys([*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *sorted(words)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return Tokenizer.from_str(BertWordPieceTokenizer(vocabulary, lowercase=True).to_str())
