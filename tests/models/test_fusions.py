"""Fusions against the same thing said plainly: one linear layer, PyTorch's attention, a loop, pair by pair."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from vqa.config.runs import ConcatConfig
from vqa.models.concat import ConcatFusion
from vqa.models.cross_attention import CrossAttentionFusion, CrossAttentionLayer, PairRows
from vqa.models.layers import Features
from vqa.models.parts import FUSIONS
from vqa.models.vqa_model import VQAModel

IMAGE_INDEX = torch.tensor([2, 0, 3, 2, 2, 0, 3, 2])  # 8 pairs in no order; images 1 and 4 have none
IMAGES, WIDTH, HEADS = 5, 8, 2


@pytest.fixture(params=[*sorted(FUSIONS), "cross_attention of summaries", "unified_decoder"])
def model(request, build) -> VQAModel:
    """One with each fusion (the decoder is its own)."""
    return build(request.param)


@torch.inference_mode()
def test_grouped_pairs_score_as_pairs_on_their_own_do(model, stirred, five, scattered):
    """Measured over 3 seeds: 1.5e-6 at most, on scores that another image moves by 0.13 and more."""
    stirred(model)
    for grouped in (five, scattered):
        scores = model(**grouped.inputs()).logits
        torch.testing.assert_close(scores, model(**grouped.ungrouped().inputs()).logits, rtol=0, atol=2e-5)
        others = model(**replace(grouped, image_index=(grouped.image_index + 1) % IMAGES).inputs()).logits
        assert (others - scores).abs().amax(1).min() > 0.01


@torch.inference_mode()
def test_what_stands_in_the_padding_of_a_question_changes_nothing(model, stirred, five):
    """Nor how much of it there is. Measured over 3 seeds: 3e-6 at most."""
    stirred(model)
    ids, mask = pad(five.input_ids, (0, 3)), pad(five.attention_mask, (0, 3))
    noise = torch.randint(5, model.processor.vocabulary_size, ids.shape, generator=torch.Generator().manual_seed(0))
    filled = replace(five, input_ids=torch.where(mask.bool(), ids, noise), attention_mask=mask)
    torch.testing.assert_close(model(**filled.inputs()).logits, model(**five.inputs()).logits, rtol=0, atol=2e-5)


def test_every_row_of_every_weight_after_the_towers_learns(model, stirred, five):
    """Rows, so that keys cannot hide behind values in one matrix."""
    stirred(model)(**five.inputs(), labels=five.labels).loss.backward()
    towers = ("image_encoder", "text_encoder")
    after = {name: weight.grad for name, weight in model.named_parameters() if not name.startswith(towers)}
    after.pop("position.weight", None)  # a table with places that no text here is long enough for
    if getattr(model.config.fusion, "queries", "tokens") == "summary":  # a single token has no other to look at
        after = {name: grad.chunk(3)[2] if "self_qkv" in name else grad for name, grad in after.items()}
    matrices = [name for name, grad in after.items() if grad.dim() == 2]
    assert len(matrices) >= 4
    assert [name for name in matrices if not after[name].any(1).all()] == []
    assert [name for name in after if not after[name].any()] == []


def test_one_batch_is_learned_by_heart(model, overfit, lesson):
    """Which takes the image as well as the question: each alone leaves answers that differ."""
    for index in (lesson.image_index, lesson.question_index):
        assert any(len(lesson.labels[index == i].unique()) > 1 for i in index)
    overfit(model, lesson)
    with torch.inference_mode():
        assert model(**lesson.inputs()).logits.argmax(1).equal(lesson.labels)


def test_concat_is_one_linear_layer_on_the_two_summaries_side_by_side(stirred):
    torch.manual_seed(0)
    fusion = stirred(ConcatFusion(ConcatConfig(width=WIDTH), 6, 5))
    image, text = Features(torch.randn(3, 4, 6), torch.randn(3, 6)), Features(torch.randn(4, 7, 5), torch.randn(4, 5))
    image_index, question_index = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([3, 1, 0, 0, 2])
    plain = nn.Linear(6 + 5, WIDTH)
    plain.weight.data = torch.cat([fusion.image_half.weight, fusion.text_half.weight], 1).detach()
    plain.bias.data = fusion.image_half.bias.detach()
    summaries = [fusion.image_norm(image.pooled)[image_index], fusion.text_norm(text.pooled)[question_index]]
    torch.testing.assert_close(
        fusion(image, text, torch.ones(4, 7), image_index, question_index),
        fusion.rest(plain(torch.cat(summaries, 1))),
    )


def torch_attention(qkv: torch.Tensor, bias: torch.Tensor, out: nn.Linear) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    attention.in_proj_weight.data, attention.in_proj_bias.data = qkv.detach(), bias.detach()
    attention.out_proj = out
    return attention


class Layer:
    """A CrossAttentionLayer, its input, and what PyTorch's attention makes of the same weights."""

    def __init__(self, layer: CrossAttentionLayer):
        self.layer = layer
        self.tokens = torch.randn(len(IMAGE_INDEX), 5, WIDTH)
        self.mask = torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5, 3, 1])[:, None]
        self.memory = torch.randn(IMAGES, 7, WIDTH)
        self.rows = PairRows.of(IMAGE_INDEX, IMAGES)

        within = torch_attention(layer.self_qkv.weight, layer.self_qkv.bias, layer.self_out)
        normed = layer.self_norm(self.tokens)
        self.among = self.tokens + within(normed, normed, normed, key_padding_mask=~self.mask)[0]

        weight = torch.cat([layer.cross_q.weight, layer.cross_kv.weight])
        across = torch_attention(weight, torch.cat([layer.cross_q.bias, layer.cross_kv.bias]), nn.Linear(WIDTH, WIDTH))
        across.out_proj.weight.data, across.out_proj.bias.data = torch.eye(WIDTH), torch.zeros(WIDTH)
        repeated = self.memory[IMAGE_INDEX]  # the image again for each of its pairs
        query = layer.cross_norm(self.among)
        seen, self.weights = across(query, repeated, repeated, average_attn_weights=False)
        self.across = layer.cross_out(layer.gate(query) * seen)


@pytest.fixture
def case(stirred) -> Layer:
    torch.manual_seed(0)
    with torch.no_grad():
        return Layer(stirred(CrossAttentionLayer(WIDTH, HEADS)))


@torch.inference_mode()
def test_a_layer_is_pytorchs_attention_within_the_question_then_to_its_image(case):
    """Default tolerance (1.3e-6 relative, 1e-5 absolute): both are a handful of float32 sums over 8 numbers."""
    asked = case.layer.ask(case.tokens, case.mask)
    torch.testing.assert_close(asked.tokens, case.among)
    both = case.among + case.across
    expected = both + case.layer.feed_forward(both)
    torch.testing.assert_close(case.layer(asked, case.memory, case.rows), expected)
    mean = torch.stack([row[mask].mean(0) for row, mask in zip(expected, case.mask, strict=True)])
    torch.testing.assert_close(case.layer.summary(asked, case.memory, case.rows, case.mask), mean)


@torch.inference_mode()
def test_the_weights_that_are_shown_are_the_weights_that_are_used(case):
    """They sum to one, are PyTorch's, and with values and output projection give what the layer adds."""
    layer, added = case.layer, []
    layer.cross_out.register_forward_hook(lambda _, __, output: added.append(output))
    asked = layer.ask(case.tokens, case.mask)
    layer(asked, case.memory, case.rows)
    weights = layer.attention(asked.query, case.memory, case.rows)  # (N, heads, T, P)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(weights, case.weights)
    values = layer.cross_kv(case.memory)[IMAGE_INDEX, :, WIDTH:].unflatten(-1, (HEADS, -1))  # (N, P, heads, D / heads)
    looked_up = asked.gate * torch.einsum("nhtp,nphd->nthd", weights, values).flatten(2)
    torch.testing.assert_close(nn.functional.linear(looked_up, layer.cross_out.weight, layer.cross_out.bias), added[0])


@torch.inference_mode()
def test_look_shows_the_last_layer_in_the_midst_of_a_forward(build, stirred, scattered):
    model, given = stirred(build("cross_attention")), []
    last = model.fusion.layers[-1]
    assert isinstance(model.fusion, CrossAttentionFusion) and last is not model.fusion.layers[0]
    hook = last.cross_q.register_forward_hook(lambda _, __, query: given.append(query))
    model(**scattered.inputs())
    hook.remove()
    image, text = model.towers(scattered)
    expected = last.attention(given[0], model.fusion.image_in(image.tokens), PairRows.of(IMAGE_INDEX, IMAGES))
    torch.testing.assert_close(model.fusion.look(image, text, scattered), expected)


@torch.inference_mode()
def test_keys_and_values_are_made_once_an_image_not_once_a_pair(build, five):
    model, made = build("cross_attention"), []
    for layer in model.fusion.layers:
        layer.cross_kv.register_forward_hook(lambda module, inputs, _: made.append((module, inputs[0].shape)))
    model.eval()(**five.inputs())
    assert len(five) > IMAGES
    patches = model.image_encoder(five.pixel_values).tokens.shape[1]
    assert made == [(layer.cross_kv, (IMAGES, patches, layer.cross_kv.in_features)) for layer in model.fusion.layers]


@pytest.mark.parametrize("image_index", [IMAGE_INDEX, torch.tensor([0, 0, 0]), torch.arange(IMAGES)], ids=str)
def test_pairs_stand_in_the_row_of_their_image_in_order(image_index):
    pairs = torch.randn(len(image_index), 2, generator=torch.Generator().manual_seed(0))
    rows = [[pair for pair, image in zip(pairs, image_index, strict=True) if image == i] for i in range(IMAGES)]
    longest = max(map(len, rows))
    expected = torch.stack([torch.stack(row + [torch.zeros(2)] * (longest - len(row))) for row in rows])
    places = PairRows.of(image_index, IMAGES)
    assert places.gather(pairs).equal(expected)
    assert places.scatter(expected).equal(pairs)
