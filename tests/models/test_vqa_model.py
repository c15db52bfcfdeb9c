import json
import math

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from vqa.config import ModelConfig
from vqa.data.batches import Split
from vqa.models.parts import parameter_count, without_public_weights
from vqa.models.vqa_model import AlignmentModel, VQAModel
from vqa.training.objectives import processor_for


@pytest.fixture
def batch(processor, source):
    return Split(source.splits["train"], processor).batch(torch.arange(16).numpy())


@torch.inference_mode()
def logits(model: VQAModel, batch) -> torch.Tensor:
    return model.eval()(**batch.inputs()).logits


def test_a_saved_model_answers_bit_for_bit_the_same(model, batch, tmp_path):
    with torch.no_grad():
        model.train()(**batch.inputs())  # moves batch statistics, which have to be saved too
    expected = logits(model, batch)
    model.save(tmp_path)
    read = VQAModel.from_pretrained(tmp_path)
    assert not read.training
    assert logits(read, batch).equal(expected)
    assert read.config == model.config
    ours, theirs = dict(vars(read.processor)), dict(vars(model.processor))
    assert ours.pop("tokenizer").to_str() == theirs.pop("tokenizer").to_str() and ours == theirs


def test_a_folder_without_weights_is_a_missing_file(model, tmp_path):
    model.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        VQAModel.from_pretrained(tmp_path)


def test_a_saved_model_does_not_ask_for_the_public_weights_it_began_with(tiny, processor, source, tmp_path):
    """The public weights are a tiny BERT of the test's own, which is gone when the model is read."""
    public = tmp_path / "public"
    first = VQAModel(tiny.model, processor)
    first.text_encoder.text.save_pretrained(public)
    processor.tokenizer.save(str(public / "tokenizer.json"))
    text = tiny.model.text_encoder.model_copy(update={"pretrained": str(public)})
    config = tiny.model_copy(update={"model": tiny.model.model_copy(update={"text_encoder": text})})
    assert processor_for(config, source).tokenizer.get_vocab() == processor.tokenizer.get_vocab()

    model = VQAModel(config.model, processor).eval()
    assert same(model.text_encoder, first.text_encoder) and not same(model.image_encoder, first.image_encoder)
    model.save(tmp_path / "saved")
    for path in public.iterdir():
        path.unlink()
    assert same(VQAModel.from_pretrained(tmp_path / "saved"), model)
    assert without_public_weights(config.model) == tiny.model


def test_a_saved_model_keeps_the_activation_that_came_with_its_public_weights(tiny, processor, batch, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    text = transformers.BertConfig(vocab_size=processor.vocabulary_size, **sizes, hidden_act="relu", layer_norm_eps=0.1)
    transformers.BertModel(text).save_pretrained(tmp_path / "public")
    config = tiny.model.model_dump()
    config["text_encoder"]["pretrained"] = str(tmp_path / "public")
    model = VQAModel(ModelConfig.model_validate(config), processor)
    model.save(tmp_path / "saved")
    expected = logits(model, batch)
    assert logits(VQAModel.from_pretrained(tmp_path / "saved"), batch).equal(expected)
    assert not logits(swapped_activation(model), batch).equal(expected)


def swapped_activation(model: VQAModel) -> VQAModel:
    model.text_encoder.text.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.GELU()
    return model


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(states[1][name].equal(x) for name, x in states[0].items())


def test_towers_are_taken_over_and_nothing_else(model, tmp_path):
    torch.manual_seed(1)
    aligned = AlignmentModel(model.config, model.processor)
    aligned.save(tmp_path)
    fusion, head = ({k: v.clone() for k, v in part.state_dict().items()} for part in (model.fusion, model.answer_head))
    assert not same(model.image_encoder, aligned.image_encoder)
    model.load_towers(tmp_path)
    assert same(model.image_encoder, aligned.image_encoder) and same(model.text_encoder, aligned.text_encoder)
    assert all(model.fusion.state_dict()[name].equal(value) for name, value in fusion.items())
    assert all(model.answer_head.state_dict()[name].equal(value) for name, value in head.items())


def test_an_untrained_model_guesses_among_its_answers(model, batch):
    """Its loss is that of even chances, ln 13. Measured over 8 seeds: within 0.08."""
    assert len(model.processor.answers) == 13
    loss = cross_entropy(logits(model, batch), batch.labels)
    assert loss.item() == pytest.approx(math.log(13), abs=0.15)


def gradients(model: VQAModel, batch) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**batch.inputs(), labels=batch.labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradient_checkpointing_computes_twice_and_changes_no_gradient(model, batch):
    """Measured: the same bits; batch statistics too, which must not be counted twice."""
    calls = []
    queries = ("layer.0.attention.q_lin", "layer.0.attention.self.query")
    linear = next(module for name, module in model.named_modules() if name.endswith(queries))
    linear.register_forward_hook(lambda *_: calls.append(1))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    plain = gradients(model, batch)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    assert len(calls) == 1

    model.load_state_dict(start)
    model.checkpoint_gradients()
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-7)
    assert len(calls) == 3
    assert all(value.equal(statistics[name]) for name, value in model.named_buffers())


def test_every_weight_of_the_model_learns(model, batch):
    assert [name for name, gradient in gradients(model, batch).items() if not gradient.any()] == []


def test_alignment_gives_unit_vectors_and_a_bounded_scale(model, batch):
    aligned = AlignmentModel(model.config, model.processor).eval()
    with torch.no_grad():
        aligned.log_scale.fill_(99.0)
        images, captions, scale = aligned(**batch.inputs())
    assert images.shape == captions.shape == (len(batch), AlignmentModel.WIDTH)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(len(batch)))
    torch.testing.assert_close(captions.norm(dim=1), torch.ones(len(batch)))
    assert scale == AlignmentModel.MAX_SCALE


def test_parameters_on_disk_are_those_that_are_counted(model, tmp_path):
    """A safetensors file is eight bytes, a header in JSON, and the numbers."""
    model.save(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    stored = sum(math.prod(header[name]["shape"]) for name, _ in model.named_parameters())
    assert stored == parameter_count(model)
