"""Towers of the library's classes: random weights, or public ones.

Public weights are a local folder, a hub id at a pinned revision, or torchvision's ResNet18. What their own config.json
and preprocessor_config.json say holds, such as the activation; what a profile asks for must agree with it.
"""

import json
import pickle
import re
import socket
from pathlib import Path

import torch
import torchvision
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from vqa.config import ConfigError
from vqa.config.runs import Tower, TransformerTower

transformers.logging.set_verbosity_error()  # it would warn of every head that a tower leaves out

WAIT_SECONDS = 5  # for a server to answer
TORCHVISION_WIDTH = 512
LFS_POINTER = b"version https://git-lfs"
KEYS = {  # the library's name of a size: its key in a profile
    "hidden_size": "width", "dim": "width", "hidden_sizes": "width", "num_hidden_layers": "layers",
    "n_layers": "layers", "num_attention_heads": "heads", "n_heads": "heads", "patch_size": "patch_size",
    "image_size": "image_size", "depths": "depths", "layer_type": "layer_type",
}  # fmt: skip


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's ResNet18 weights under the names that transformers' ResNetModel gives them."""
    library = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}

    def renamed(name: str) -> str:
        if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
            return f"embedder.embedder.{library[match[1]]}.{match[2]}"
        stage, block, kind, number, part = re.fullmatch(r"layer(\d)\.(\d)\.([a-z]+)\.?(\d)\.(\w+)", name).groups()
        place = f"shortcut.{library[number]}" if kind == "downsample" else f"layer.{int(number) - 1}.{library[kind]}"
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.{place}.{part}"

    return {renamed(name): value for name, value in state.items() if not name.startswith("fc.")}


def pretrained_folder(name: str, revision: str | None) -> str:
    """A local folder as it is, or the hub's snapshot of `name` at `revision`, fetched if need be.

    Only weights that are safetensors are fetched, and no code. Raises ConfigError in one sentence if neither
    is there, without trying again and again.
    """
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return name
    if revision is None:
        raise ConfigError(f"pretrained {name!r} is no local folder, and a hub id needs a revision (a commit hash)")
    files, reached = ["*.json", "*.txt", "model*.safetensors"], _hub_answers()
    try:
        return snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=not reached)
    except OSError:
        why = "does not give it: check its name and revision, or" if reached else "cannot be reached:"
        raise ConfigError(
            f"no copy of {name} at {revision[:8]} here and the hub {why} download it where "
            f"there is a network and put its folder's path under pretrained"
        ) from None


def _hub_answers() -> bool:
    """Whether the hub can be reached, asked once: a download by itself asks six times, which takes 24 s."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    try:
        get_session().head(constants.ENDPOINT, timeout=WAIT_SECONDS)
    except (HTTPError, OSError):  # the latter when HF_HUB_OFFLINE says not to ask
        return False
    return True


def public_folder(config: Tower) -> Path | None:
    """Where the public weights of `config` lie; None if it asks for none, or for torchvision's.

    Raises ConfigError as `pretrained_folder`.
    """
    if config.pretrained is None or _is_torchvisions(config):
        return None
    return Path(pretrained_folder(config.pretrained, config.revision))


def pretrained_tokenizer(name: str, revision: str | None) -> Tokenizer:
    """The tokenizer beside public weights. Raises ConfigError if it is not there, or would need code of its own."""
    folder = pretrained_folder(name, revision)
    if not any((Path(folder) / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise ConfigError(
            f"cannot load the tokenizer of {name}: there is none, and the library would make an empty one"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {name}: {str(error).splitlines()[0]}") from None


def image_statistics(folder: Path | None, default: tuple) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels from 0 to 1, as the preprocessor_config.json in `folder` has them."""
    file = folder / "preprocessor_config.json" if folder else None
    if file is None or not file.is_file():
        return default
    settings = json.loads(file.read_text())
    if not settings.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return settings.get("image_mean", default[0]), settings.get("image_std", default[1])


def _torchvision_state(name: str) -> dict[str, Tensor]:
    """torchvision's ResNet18 weights `name`, fetched if need be. Raises ConfigError if they cannot be.

    They are pickled: the hash of what is fetched is checked, and nothing but tensors is unpickled.
    """
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(WAIT_SECONDS)
    try:
        weights = torchvision.models.ResNet18_Weights[name]
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"torchvision's {name} cannot be fetched or read: {str(error).splitlines()[0]}") from None
    finally:
        socket.setdefaulttimeout(patience)


def checkpoint_layers(model: transformers.PreTrainedModel) -> None:
    """Turn on gradient checkpointing, which transformers renamed in 5.2x."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def transformer_sizes(config: TransformerTower, dropout: float) -> dict:
    """What a profile asks for under the names of ViTConfig and BertConfig."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.width,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def build(kind: type, config: Tower, asked: dict, public: Path | None, library: dict | None, **arguments) -> nn.Module:
    """A model of the library's class `kind`, with public weights if `config` names any, else with random ones.

    `asked` is what the profile asks for, under the library's names. `library` is the library's config of a tower that
    was saved: it takes the place of `asked`, as a public tower's activation is not in `config`. Raises ConfigError if
    public weights are not what the profile asks for.
    """
    if config.pretrained is None:
        shape = kind.config_class(**asked) if library is None else kind.config_class.from_dict(library)
        return kind(shape, **arguments)
    if public is None:
        return _torchvision_resnet18(kind(kind.config_class(**asked), **arguments), config)
    try:
        shape = _public_shape(kind, config, asked, public)
        model, report = kind.from_pretrained(
            public, config=shape, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **arguments
        )
    except ConfigError:
        raise
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"cannot load {config.pretrained}: {str(error).splitlines()[0]}") from None
    if report["missing_keys"]:
        raise ConfigError(f"{config.pretrained} lacks {len(report['missing_keys'])} weights of a {config.kind}")
    return model


def _public_shape(kind: type, config: Tower, asked: dict, folder: Path) -> transformers.PretrainedConfig:
    """The config in `folder`, with the dropout that the profile asks for. Raises ConfigError if they disagree."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ConfigError(f"{path} is a Git LFS pointer and holds no weights: run git lfs pull in its folder")
    found = kind.config_class.get_config_dict(folder)[0].get("model_type")
    if found != kind.config_class.model_type:
        raise ConfigError(f"{config.pretrained} is a {found} and the profile asks for a {config.kind}")
    shape = kind.config_class.from_pretrained(folder)
    for name in [name for name in asked if name in KEYS]:
        key, ours, theirs = KEYS[name], asked[name], getattr(shape, name)
        if key == "width" and isinstance(theirs, list):  # a ResNet's last stage
            ours, theirs = ours[-1], theirs[-1]
        if ours != theirs and key in ("depths", "layer_type"):  # no keys of a profile: they make it a ResNet18
            raise ConfigError(f"{config.pretrained} is no ResNet18: its {key} is {theirs}, not {ours}")
        if ours != theirs:
            raise ConfigError(
                f"{config.pretrained} has {key} {theirs} and the profile asks for {ours}: set it to {theirs}"
            )
    if "vocab_size" in asked and asked["vocab_size"] > shape.vocab_size:
        raise ConfigError(
            f"{config.pretrained} knows {shape.vocab_size} tokens and its tokenizer {asked['vocab_size']}"
        )
    shape.update({name: value for name, value in asked.items() if "dropout" in name})
    return shape


def _is_torchvisions(config: Tower) -> bool:
    return config.kind == "resnet18" and hasattr(torchvision.models.ResNet18_Weights, config.pretrained)


def _torchvision_resnet18(model: nn.Module, config: Tower) -> nn.Module:
    """`model` with torchvision's weights."""
    if config.width != TORCHVISION_WIDTH:
        raise ConfigError(
            f"{config.pretrained} has width {TORCHVISION_WIDTH} and the profile asks for {config.width}: "
            f"set it to {TORCHVISION_WIDTH}"
        )
    model.load_state_dict(from_torchvision(_torchvision_state(config.pretrained)))
    return model
