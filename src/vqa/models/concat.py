"""Fusion by concatenation: a perceptron on the two towers' summaries side by side."""

from torch import Tensor, nn

from vqa.config.runs import ConcatConfig
from vqa.models.layers import Features


class ConcatFusion(nn.Module):
    """Two-layer perceptron on [image summary; question summary].

    The first layer's product with a concatenation is the sum of its products with the parts, so
    each part is multiplied once per image and once per question, not once per pair.
    """

    def __init__(self, config: ConcatConfig, image_width: int, text_width: int):
        super().__init__()
        self.image_norm, self.text_norm = nn.LayerNorm(image_width), nn.LayerNorm(text_width)
        self.image_half = nn.Linear(image_width, config.width)
        self.text_half = nn.Linear(text_width, config.width, bias=False)  # one bias is enough
        self.rest = nn.Sequential(nn.GELU(), nn.Linear(config.width, config.width), nn.GELU())
        self.width = config.width

    def forward(
        self, image: Features, text: Features, attention_mask: Tensor, image_index: Tensor, question_index: Tensor
    ) -> Tensor:
        """One vector per pair, (N, D)."""
        images = self.image_half(self.image_norm(image.pooled))  # (I, D)
        questions = self.text_half(self.text_norm(text.pooled))  # (U, D)
        return self.rest(images[image_index] + questions[question_index])  # (N, D)
