"""The layout that docs/architecture.md promises: which folders are packages, and who imports whom."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import optc

ROOT = Path(optc.__file__).parent
OUTSIDE = {"tests", "examples", "docs", "benchmarks", "build"}

# What the modules under each prefix may import of optc. The longest prefix counts.
ALLOWED = {
    "runtime": ("runtime", "errors"),
    "passes": (
        "passes",
        "runtime.ops",
        "runtime.manifest",
        "runtime.record",
        "runtime.scheme",
        "runtime.program",
        "runtime.artifact",
        "errors",
    ),
    "optimizer": ("optimizer", "passes", "runtime", "errors"),
    "errors": (),
    "cli": ("optimizer.cli", "runtime.cli", "errors"),
    "": ("optimizer.compile", "runtime"),
}
# Third-party packages that only these modules may import.
ONLY_IN = {
    "transformers": ("optimizer.checkpoint", "optimizer.names", "optimizer.capture", "optimizer.intercept"),
    "huggingface_hub": ("optimizer.checkpoint",),
    "peft": (),
    "triton": ("runtime.ops",),
    "llguidance": ("runtime.grammar", "runtime.grammar_worker"),
    "fastapi": ("runtime.server",),
    "uvicorn": ("runtime.server",),
    "onnx": ("optimizer.lowering",),
    "lm_eval": ("optimizer.lm_eval",),
    "pickle": (),
}


@functools.cache  # the tree holds the environment too
def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name inside it; "" is the package itself."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in OUTSIDE and not parts[0].startswith("."):
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """What a module imports, at its top or inside functions: `.x` of optc, `x` of others. Type hints do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            base = [part for part in package if part][: len([p for p in package if p]) - node.level + 1]
            inside = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{inside}.{alias.name}".strip(".") for alias in node.names]
            found |= {f".{name if name in sources() else inside}" for name in names}
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_the_package_list_is_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {name for name, path in sources().items() if path.name == "__init__.py"}
    assert sorted(settings["packages"]) == sorted(f"optc.{name}".rstrip(".") for name in packages)
    for name in packages - {""}:
        folder = ROOT / name.replace(".", "/")
        kinds = {path.suffix for path in folder.glob("*/*") if not (path.parent / "__init__.py").exists()}
        assert kinds <= {".cpp", ".h", ".pyc"}, f"{folder} holds files that no package carries"


def test_every_folder_of_modules_is_a_package() -> None:
    assert {path.parent for path in sources().values() if not (path.parent / "__init__.py").exists()} == set()


@pytest.mark.parametrize("module", sorted(sources()))
def test_who_imports_whom(module: str) -> None:
    prefix = max((prefix for prefix in ALLOWED if within(module, (prefix,)) or not prefix), key=len)
    for name in imports(module, sources()[module]):
        if name.startswith("."):
            assert within(name[1:], ALLOWED[prefix]) or name == ".", f"{module} imports optc{name}"
        elif name.split(".")[0] in ONLY_IN:
            assert within(module, ONLY_IN[name.split(".")[0]]), f"{module} imports {name}"
        assert not name.startswith("optc"), f"{module} imports {name}; inside the package imports are relative"


def loaded_by(statement: str) -> set[str]:
    """The modules in a fresh process after a statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_runtime_is_lean() -> None:
    heavy = {
        "transformers",
        "onnx",
        "fastapi",
        "uvicorn",
        "sympy",
        "peft",
        "triton",
        "torch._inductor",
        "torch._dynamo",
    }
    loaded = loaded_by("import optc.runtime")
    assert loaded & heavy == set()
    assert not [name for name in loaded if within(name, ("optc.optimizer", "optc.passes"))]


def test_the_package_is_lazy() -> None:
    loaded = loaded_by("import optc; assert optc.__version__")
    assert "torch" not in loaded
    assert not [name for name in loaded if name.startswith("optc.")]


def test_the_face() -> None:
    for name in optc.__all__:
        assert getattr(optc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = optc.nothing


def test_openmp_threads_wait_passively_unless_told_otherwise() -> None:
    code = "import os, optc; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
