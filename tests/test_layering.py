"""Imports only go down the folders, so that a reader can follow one import at a time. Annotations count."""

import ast
from pathlib import Path

import vqa

PACKAGE = Path(vqa.__file__).parent
FLOORS = [  # from the top; what stands on one line shares a floor
    ("study",),
    ("experiments",),
    ("deployment",),
    ("training",),
    ("evaluation",),
    ("models",),
    ("data",),
    ("run_folder", "distributed"),
    ("config",),
    ("results",),
    ("__init__",),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(reversed(FLOORS)) for room in rooms}


def room(path: Path) -> str:
    """The folder of `path` below the package, or its own name at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """The dotted names below vqa that `source` imports anywhere, type checkers' imports included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("vqa.") for name in found if name.startswith("vqa.")}


def rooms_of(source: str) -> set[str]:
    """The rooms that `source` enters; a name of the package itself, such as vqa.AGENT, is in __init__."""
    first = {name.split(".")[0] for name in imported(source)}
    return {name if name in FLOOR_OF else "__init__" for name in first}


def upward(own: str, source: str) -> set[str]:
    return {other for other in rooms_of(source) - {own} if FLOOR_OF[other] >= FLOOR_OF[own]}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others."""
    reached = {name: set(names) for name, names in imports.items()}
    for middle in reached:
        for names in reached.values():
            names |= reached[middle] if middle in names else set()
    return sorted(
        [name, other] for name in reached for other in reached[name] if name < other and name in reached[other]
    )


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def test_every_room_has_its_floor():
    assert {room(path) for path in modules().values()} == set(FLOOR_OF)
    assert len(FLOOR_OF) <= 13


def test_imports_only_go_down():
    found = {name: upward(room(path), path.read_text()) for name, path in modules().items()}
    assert {name: up for name, up in found.items() if up} == {}


def test_no_circle_within_a_room():
    known = modules()
    imports = {}
    for name, path in known.items():
        wanted = imported(path.read_text())
        imports[name] = {other for other in wanted | {w.rpartition(".")[0] for w in wanted} if other in known} - {
            name,
            "",
        }
    assert circles(imports) == []


def test_an_import_upwards_or_a_circle_would_be_found():
    assert upward("data", "def f(x: 'T'):\n    from vqa.training.train import train") == {"training"}
    assert upward("models", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vqa.study.launch") == {
        "study"
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b"], ["a", "c"], ["b", "c"]]
