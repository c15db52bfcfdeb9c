import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from vqa.losses import answer_loss, contrastive_loss


def test_shares_of_any_size_add_up_to_the_loss_of_the_whole():
    """By hand: three pairs that give their answer 1/2, 1/4 and 1/8 of the probability, in shares of two and one."""
    logits = torch.tensor([[0, 0], [math.log(3), 0], [0, math.log(7)]])
    labels = torch.tensor([0, 1, 0])
    shares = [answer_loss(logits[:2], labels[:2], 3), answer_loss(logits[2:], labels[2:], 3)]
    assert sum(shares).item() == pytest.approx((1 + 2 + 3) * math.log(2) / 3, rel=1e-6)
    assert sum(shares).item() == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)


def test_answer_loss_is_taken_in_single_precision():
    logits = torch.tensor([[4.0, 0.0]], dtype=torch.bfloat16)
    assert answer_loss(logits, torch.tensor([0]), 1).item() == pytest.approx(math.log1p(math.exp(-4)), rel=1e-4)


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    return [normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]


def by_the_formula(images, captions, number, scale) -> float:
    """Written out: -log of the share that a right choice has among all choices."""
    n, total = len(number), 0.0
    score = lambda i, c: math.exp(scale * float(images[i] @ captions[c]))  # noqa: E731
    for row in range(n):
        choices = [number.index(c) for c in set(number)]
        total += -math.log(score(row, number.index(number[row])) / sum(score(row, c) for c in choices))
        everyone = sum(score(i, number.index(number[row])) for i in range(n))
        right = [i for i in range(n) if number[i] == number[row]]
        total += -sum(math.log(score(i, number.index(number[row])) / everyone) for i in right) / len(right)
    return total / (2 * n)


@pytest.mark.parametrize("number", [[0, 1, 2, 3, 4, 5], [5, 2, 5, 0, 2, 5], [3, 3, 3, 3, 3, 3]])
def test_contrastive_loss_is_its_formula(vectors, number):
    images, captions = vectors
    captions = captions[[number.index(c) for c in number]]  # the same words have the same vector
    scale = torch.tensor(3.0, dtype=torch.float64)
    loss = contrastive_loss(images, captions, torch.tensor(number), scale)
    assert loss.item() == pytest.approx(by_the_formula(images, captions, number, 3.0), rel=1e-10)


def test_contrastive_loss_is_clips_where_captions_are_distinct(vectors):
    images, captions = vectors
    loss = contrastive_loss(images, captions, torch.arange(6), torch.tensor(7.0))
    assert loss.item() == pytest.approx(image_text_contrastive_loss(7.0 * captions @ images.T).item(), rel=1e-10)


def test_an_image_of_an_equal_caption_is_no_negative(vectors):
    """Perfect vectors for three captions, two images each: what is left is the choice between two right images."""
    number = torch.tensor([0, 1, 2, 0, 1, 2])
    perfect = torch.eye(3, dtype=torch.float64)[number]
    loss = contrastive_loss(perfect, perfect, number, torch.tensor(100.0))
    assert loss.item() == pytest.approx(math.log(2) / 2, rel=1e-6)
