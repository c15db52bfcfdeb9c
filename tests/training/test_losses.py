import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from vqa.training.losses import contrastive_loss, feature_loss, soft_target_loss, token_loss


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    return [normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]


def by_the_formula(images, captions, image_number, caption_number, scale) -> float:
    """Written out, for each row: -log of the share that its own choice has among all distinct ones."""
    n, total = len(image_number), 0.0
    score = lambda i, c: math.exp(scale * float(images[i] @ captions[c]))  # noqa: E731
    distinct_images, distinct_captions = (
        [number.index(k) for k in set(number)] for number in (image_number, caption_number)
    )
    for row in range(n):
        total += -math.log(score(row, row) / sum(score(row, c) for c in distinct_captions))
        total += -math.log(score(row, row) / sum(score(i, row) for i in distinct_images))
    return total / (2 * n)


@pytest.mark.parametrize(
    ("image_number", "caption_number"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([0, 1, 2, 3, 4, 5], [5, 2, 5, 0, 2, 5]),  # one caption each, some the same
        ([0, 1, 2, 3, 4, 5], [3, 3, 3, 3, 3, 3]),
        ([4, 4, 1, 1, 0, 0], [0, 1, 2, 3, 4, 5]),  # two captions each
        ([4, 4, 1, 1, 0, 0], [5, 2, 5, 0, 2, 3]),
    ],
)
def test_contrastive_loss_is_its_formula(vectors, image_number, caption_number):
    images, captions = vectors
    images = images[[image_number.index(i) for i in image_number]]  # the same image has the same vector,
    captions = captions[[caption_number.index(c) for c in caption_number]]  # and so have the same words
    scale = torch.tensor(3.0, dtype=torch.float64)
    loss = contrastive_loss(images, captions, torch.tensor(image_number), torch.tensor(caption_number), scale)
    expected = by_the_formula(images, captions, image_number, caption_number, 3.0)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_contrastive_loss_is_clips_where_captions_are_distinct(vectors):
    images, captions = vectors
    loss = contrastive_loss(images, captions, torch.arange(6), torch.arange(6), torch.tensor(7.0))
    assert loss.item() == pytest.approx(image_text_contrastive_loss(7.0 * captions @ images.T).item(), rel=1e-10)


def test_an_image_of_an_equal_caption_is_no_negative(vectors):
    """Perfect vectors for three captions, two images each: what is left is the choice between two right images."""
    number = torch.tensor([0, 1, 2, 0, 1, 2])
    perfect = torch.eye(3, dtype=torch.float64)[number]
    loss = contrastive_loss(perfect, perfect, torch.arange(6), number, torch.tensor(100.0))
    assert loss.item() == pytest.approx(math.log(2) / 2, rel=1e-6)


@pytest.fixture
def answers():
    """Logits of a student and a teacher for five pairs and seven answers, double precision."""
    generator = torch.Generator().manual_seed(1)
    return [4 * torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2)]


def softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_target_loss_is_its_formula_in_numpy(answers, temperature):
    ours, theirs = (softmax(scores.numpy() / temperature) for scores in answers)
    expected = temperature**2 * (theirs * np.log(theirs / ours)).sum() / 11
    assert soft_target_loss(*answers, temperature, 11).item() == pytest.approx(expected, rel=1e-5)


def test_at_high_temperature_logits_are_matched(answers):
    """Hinton et al. 2015, eq. 4: the gradient becomes (z - v) / A for logits that are centred."""
    student, teacher = (scores - scores.mean(1, keepdim=True) for scores in answers)
    student.requires_grad_()
    soft_target_loss(student, teacher, 1000.0, 5).backward()
    expected = (student - teacher).detach() / 7 / 5
    assert torch.allclose(student.grad, expected, rtol=0.02, atol=2e-3 * expected.abs().max().item())


def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn(answers):
    student = answers[0].clone().requires_grad_()
    loss = soft_target_loss(student, answers[0], 2.0, 5)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and student.grad.abs().max() < 1e-6


def test_feature_loss_counts_a_row_once_for_each_pair():
    """By hand: mean squares 1 and 4, asked about twice and once, of five pairs in the step."""
    features, teacher = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    assert feature_loss(features, teacher, torch.tensor([0, 1, 0]), 5).item() == pytest.approx((1 + 4 + 1) / 5)


@pytest.fixture
def tokens():
    """Questions of three and two tokens with mean squares 1, 4, 9 and 2, 8, as (student, teacher, mask)."""
    roots = torch.tensor([[1.0, 2.0, 3.0], [2**0.5, 8**0.5, 100.0]])
    return roots[..., None] * torch.tensor([1.0, -1.0]), torch.zeros(2, 3, 2), torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_token_loss_is_a_questions_mean_counted_once_for_each_pair(tokens):
    """By hand: questions differ by 14/3 and 5, asked once and twice, of seven pairs in the step; on two ranks alike."""
    assert token_loss(*tokens, torch.tensor([1, 0, 1]), 7).item() == pytest.approx((5 + 14 / 3 + 5) / 7)
    second = [part[1:] for part in tokens]
    shares = [token_loss(*tokens, torch.tensor([1, 0]), 7), token_loss(*second, torch.tensor([0]), 7)]
    assert sum(shares).item() == pytest.approx((5 + 14 / 3 + 5) / 7)


def test_token_loss_sees_no_padding(tokens):
    ours, theirs, mask = tokens
    longer = [torch.cat([part, torch.full((2, 4, 2), value)], 1) for part, value in ((ours, 1e9), (theirs, 7.0))]
    longer[0].requires_grad_()
    index = torch.tensor([1, 0, 1])
    loss = token_loss(*longer, torch.cat([mask, torch.zeros(2, 4, dtype=int)], 1), index, 7)
    loss.backward()
    assert loss.item() == token_loss(*tokens, index, 7).item()
    assert longer[0].grad[0, 2].all() and not longer[0].grad[:, 3:].any() and not longer[0].grad[1, 2].any()
