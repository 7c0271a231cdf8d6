"""The package installs what it imports, and imports downwards only."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen35_jax"

# The layers, top to bottom; a module may import its own layer and those below it. Commands are the rest of the top.
LAYERS = (
    "planner", "train", "generate", "checkpoint", "vision_io", "text", "model", "ops", "program", "hosts", "lifeline", "sharding",
    "config", "compilation", "command", "compat", "errors",
)  # fmt: skip
# Folders side by side that must not know each other.
STRANGERS = {
    ("train", "generate"),
    ("checkpoint", "text"),
    ("text", "model"),
    ("text", "ops"),
    ("vision_io", "model"),
    ("vision_io", "ops"),
    ("checkpoint", "vision_io"),
}


def _modules():
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import anywhere in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(name.name, node.lineno) for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "qwen35_jax":
            found += [(f"qwen35_jax.{name.name}", node.lineno) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.lineno))
    return found


def _layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer not in LAYERS:
        return  # a command, or the package's front door
    for module, line in _imports(path):
        if module.startswith("qwen35_jax.") and _layer(module) != layer:
            below = LAYERS[LAYERS.index(layer) + 1 :]
            assert _layer(module) in below, f"{path.name}:{line}: {layer} imports {module}, which is not below it"
            assert (layer, _layer(module)) not in STRANGERS, f"{path.name}:{line}: {layer} imports {module}"


def test_every_import_is_a_requirement():
    try:
        requirements = importlib.metadata.requires("qwen35_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("qwen35_jax is not installed here: pip install -e .")
    core = {_canonical(r) for r in requirements if "extra ==" not in r}
    providers = importlib.metadata.packages_distributions()
    for path in _modules():
        for module, line in _imports(path):
            top = module.split(".")[0]
            if top and top != "qwen35_jax" and top not in sys.stdlib_module_names:
                distributions = {_canonical(d) for d in providers.get(top, [])}
                assert distributions & core, f"{path.name}:{line} imports {top}, which setup.py does not require"


def _canonical(requirement: str) -> str:
    """'Orbax_Checkpoint>=0.12; …' -> 'orbax-checkpoint'."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.\-]+", requirement).group()).lower()
