"""Training losses beside the cross-entropy that a model's forward gives.

Those that take a `global_count` are sums over pairs divided by it, the pairs of the whole step, so that shares of a
batch on several ranks, or in several accumulation steps, add up to the loss of the whole.
"""

import torch
from torch.nn import functional


def soft_target_loss(
    logits: torch.Tensor, teacher: torch.Tensor, temperature: float, global_count: int
) -> torch.Tensor:
    """T² KL(teacher ‖ student) of both answer distributions at temperature T, over the pairs of the step.

    `logits`, `teacher` (N, A). T² keeps gradients the same size at every T
    (https://arxiv.org/abs/1503.02531, section 2); for large T they become (logits - teacher) / A.
    """
    ours, theirs = ((scores.float() / temperature).log_softmax(-1) for scores in (logits, teacher))
    summed = functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return temperature**2 * summed / global_count


def feature_loss(features: torch.Tensor, teacher: torch.Tensor, index: torch.Tensor, global_count: int) -> torch.Tensor:
    """Mean squared difference of `features` and `teacher` (B, D), each row counted once for each pair.

    `index` (N,) says which row a pair is about, so that the loss does not depend on how pairs are
    shared out over ranks. Hints through a projection: https://arxiv.org/abs/1412.6550, eq. 3.
    """
    return (features.float() - teacher.float()).square().mean(-1)[index].sum() / global_count


def token_loss(
    tokens: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, global_count: int
) -> torch.Tensor:
    """As feature_loss, `tokens` and `teacher` (B, T, D): of each row the mean over the tokens that `mask` (B, T) keeps.

    Every question weighs the same, however long it is and however far its batch is padded.
    """
    difference = (tokens.float() - teacher.float()).square().mean(-1)  # (B, T)
    mask = mask.bool()
    return (difference.where(mask, 0).sum(1) / mask.sum(1))[index].sum() / global_count


def contrastive_loss(
    images: torch.Tensor,
    captions: torch.Tensor,
    image_number: torch.Tensor,
    caption_number: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Symmetric InfoNCE (CLIP, https://arxiv.org/abs/2103.00020, figure 3) that knows what belongs together.

    `images`, `captions` (N, E) are unit vectors, row n a true pair; the numbers (N,) are equal where
    the image is the same, or the caption the same words. An image chooses among the distinct captions,
    a caption among the distinct images; where several are right, the mean over them counts (SupCon's
    L_out, https://arxiv.org/abs/2004.11362). With N distinct images and captions this is CLIP's loss.
    """
    products = scale * images @ captions.T  # (N images, N captions)
    return (_choice(products, caption_number) + _choice(products.T, image_number)) / 2


def _choice(scores: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row of `scores` (N, N) choosing its own column among those of distinct `number` (N,)."""
    first = (number[:, None] == number[None, :]).int().argmax(1)  # the first column of the same number
    repeated = first != torch.arange(len(first), device=first.device)
    return functional.cross_entropy(scores.masked_fill(repeated, float("-inf")), first)
