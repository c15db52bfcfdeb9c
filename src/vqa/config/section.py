"""What all sections of a configuration share: strict types, one-sentence errors, a place on disk, a hash."""

import difflib
import hashlib
import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ConfigError(ValueError):
    """A profile or an override that cannot be used; its message is one sentence for the user."""


class Section(BaseModel):
    """Common rules of every part: no unknown keys, no silent conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


S = TypeVar("S", bound=Section)


def load_section(kind: type[S], path: Path) -> S:
    """The section that `save_yaml` stored at `path`."""
    return validate(kind, read_yaml(path), str(path))


def save_yaml(section: Section, path: Path) -> None:
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(section.model_dump(), file)


def digest(section: Section) -> str:
    """Eight hex digits that change when any resolved value changes."""
    text = json.dumps(section.model_dump(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_yaml(path: Path) -> dict:
    try:
        raw = YAML(typ="safe", pure=True).load(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path.name}{line} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path.name} holds no keys")
    return raw


def validate(kind: type[S], raw: dict, where: str) -> S:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(kind, error)}") from None


def _sentence(kind: type[Section], error: ValidationError) -> str:
    """The first problem of `error`, in words."""
    first = error.errors()[0]
    place, known = _walk(kind, [str(part) for part in first["loc"] if part != "[key]"])
    dotted = ".".join(place)
    if first["type"] == "union_tag_invalid":
        tags = first["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{dotted}.kind is {first['ctx']['tag']!r}; {near(first['ctx']['tag'], tags)}"
    if first["type"] == "union_tag_not_found":
        return f"the key {dotted}.kind is missing"
    if known and place[-1] not in known:
        return f"unknown key {dotted}; {near(place[-1], known)}"
    if first["type"] == "missing":
        return f"the key {dotted} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted} is {first['input']!r}: {message[0].lower()}{message[1:]}"


def _walk(annotation: Any, path: list[str]) -> tuple[list[str], list[str]]:
    """The keys of `path` without pydantic's tags of unions, and the names allowed in the place of its last key."""
    shown: list[str] = []
    known: list[str] = []
    for key in path:
        while get_origin(annotation) is Annotated or _optional(annotation):
            annotation = get_args(annotation)[0]
        known = []
        if get_origin(annotation) in (Union, UnionType):  # of sections told apart by `kind`: pydantic names the tag
            annotation = next(
                one for one in get_args(annotation) if key in get_args(one.model_fields["kind"].annotation)
            )
            continue
        shown.append(key)
        if get_origin(annotation) is dict:
            names, annotation = get_args(annotation)
            known = list(get_args(names))
        elif isinstance(annotation, type) and issubclass(annotation, Section):
            known = list(annotation.model_fields)
            field = annotation.model_fields.get(key)
            annotation = None if field is None else field.rebuild_annotation()
        else:
            annotation = None
    return shown, known


def _optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType) and type(None) in get_args(annotation)


def near(word: str, known: Any) -> str:
    known = list(known)
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(sorted(known))}"
