"""Imports only go down the list of layers, so that a reader can follow one import at a time."""

import ast
from pathlib import Path

import vqa

PACKAGE = Path(vqa.__file__).parent
LAYERS = [  # from the top; a module may import what stands below it
    *("study", "report"),
    *("figures_architecture", "figures_deployment", "figures_distillation", "figures_scaling", "figures"),
    *("launch", "scaling", "forensics", "loops", "benchmark", "prediction", "deployment", "qat", "train", "progress"),
    *("quantize", "pt2e", "int8"),
    *("understanding", "objectives", "targets", "evaluate", "ask"),
    *("models", "models.decoder", "models.vqa_model", "models.fusion", "models.encoders"),
    *("losses", "metrics", "vqa_accuracy", "batches"),
    *("sources.easy_vqa", "sources.sort_of_clevr", "sources.vqa_v2", "sources"),
    *("images", "checkpoint", "distributed", "runs", "config", "orphans"),
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> set[str]:
    """The vqa modules that `source` imports when it runs; imports for type checkers do not count."""
    found = set()
    tree = ast.parse(source)
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing_only and (node.module or "").startswith("vqa"):
            below = node.module.removeprefix("vqa").removeprefix(".")
            found |= {below} if below else {alias.name for alias in node.names}
    return found


def upward(module: str, source: str) -> set[str]:
    """What `module` imports from its own place or above."""
    return {name for name in imports(source) if LAYERS.index(name) <= LAYERS.index(module)}


def test_imports_only_go_down():
    modules = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert modules.keys() - {"__init__"} == set(LAYERS)
    assert {name: up for name in LAYERS if (up := upward(name, modules[name]))} == {}


def test_an_import_upwards_would_be_found():
    assert upward("losses", "from vqa.training.train import train\nfrom vqa import launch") == {"train", "launch"}
