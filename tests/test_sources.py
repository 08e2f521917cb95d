"""What the sources hold themselves to: imports and includes point down, no code is run or unpickled
from data, floating point is as written, sizes are multiplied where overflow is seen.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports(path: Path, package: str) -> set[str]:
    """Absolute names of the modules that a file imports anywhere; `from . import x` counts as x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                if node.level
                else node.module
            )
            # `from hf_fusion import native` names a module, `from hf_fusion import patch` the
            # package
            children = {f"{base}.{alias.name}" for alias in node.names}
            known = {
                child for child in children if (ROOT / (child.replace(".", "/") + ".py")).exists()
            }
            found |= known or {base}
    return found


def runtime_imports() -> dict[str, set[str]]:
    """Module of hf_fusion's runtime -> what it imports."""
    return {path.stem: imports(path, "hf_fusion") for path in (ROOT / "hf_fusion").glob("*.py")}


def ours(names: set[str]) -> set[str]:
    return {
        name.split(".")[1] if "." in name else ""
        for name in names
        if name.split(".")[0] == "hf_fusion"
    }


def test_spec_report_and_native_stand_on_nothing_above_them():
    modules = runtime_imports()
    allowed = {
        "spec": set(),
        "report": set(),
        "mirror": set(),
        "native": {"mirror", "report"},
        "registry": {"report", "spec"},
    }
    for name, below in allowed.items():
        assert ours(modules[name]) <= below, name
        assert not {found.split(".")[0] for found in modules[name]} & {
            "torch",
            "transformers",
            "numpy",
        }, name


def test_patches_import_the_spec_and_the_registry_only():
    for path in (ROOT / "patches").glob("*.py"):
        names = imports(path, "hf_fusion.patches")
        assert ours(names) <= {"spec", "registry", "report"}, path.name
        assert "torch" not in {name.split(".")[0] for name in names}, path.name


def test_runtime_imports_point_down():
    modules = {
        name: ours(names) & set(runtime_imports()) for name, names in runtime_imports().items()
    }
    for name, names in modules.items():
        assert "cli" not in names, name
        assert name in ("__init__", "cli") or "harness" not in ours(runtime_imports()[name]), name
    order: list[str] = []
    while len(order) < len(modules):
        ready = [
            name for name, names in modules.items() if name not in order and names <= {*order, name}
        ]
        assert ready, f"imports in a circle: {sorted(set(modules) - set(order))}"
        order += ready


def test_csrc_includes_point_down():
    allowed = {
        "abi.cc": r"\"abi_(attend|checks)\.h\"",
        "abi_attend.h": r"\"abi_parts\.h\"",
        "abi_checks.h": r"\"abi_parts\.h\"",
        "abi_parts.h": r"<c\w+>|\"(backend|checked)\.h\"",
        "backend.h": r"<c\w+>|\"include/hf_fusion\.h\"",
        "checked.h": r"<c\w+>|\"include/hf_fusion\.h\"",
        "include/hf_fusion.h": r"<stdint\.h>",
    }
    for path in (ROOT / "csrc").rglob("*.*"):
        name = path.relative_to(ROOT / "csrc").as_posix()
        for included in re.findall(r"^\s*#\s*include\s+(\S+)", path.read_text(), flags=re.M):
            assert not re.search(r"Python\.h|torch|ATen|c10|pybind", included), name
            assert re.fullmatch(allowed.get(name, r".*"), included), f"{name} includes {included}"
            assert not (name.startswith("cpu/") and re.search("abi|cuda", included)), name
            assert not (name.startswith("cuda/") and re.search("abi|cpu/", included)), name
    # what is compiled once per instruction set stands in kernels.cc, each file once and after
    # vec-inl.h
    inner = {f"cpu/{path.name}" for path in (ROOT / "csrc/cpu").glob("*-inl.h")}
    kernels = re.findall(r"#include \"(.*-inl\.h)\"", (ROOT / "csrc/cpu/kernels.cc").read_text())
    assert kernels[0] == "cpu/vec-inl.h" and sorted(kernels) == sorted(inner)
    for name in inner:
        included = re.findall(r"#include (\S+)", (ROOT / "csrc" / name).read_text())
        assert set(included) <= {"<immintrin.h>", "<arm_neon.h>"}, f"{name} includes {included}"
    maths = r"\b(exp|sqrt|tanh|erf|fma|cos|sin|log|pow)f?\s*\("
    for name in ("abi.cc", "abi_attend.h", "abi_checks.h", "abi_parts.h"):
        assert not re.search(maths, (ROOT / "csrc" / name).read_text()), name


def sources(*patterns: str) -> list[Path]:
    skipped = {"build", ".venv", ".git", "tests"}
    found = [path for pattern in patterns for path in ROOT.rglob(pattern)]
    return [path for path in found if not skipped & set(path.relative_to(ROOT).parts)]


def test_no_python_file_runs_or_unpickles_data():
    banned = {"eval", "exec", "compile", "__import__"}
    for path in sources("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in banned, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "os.system"):
                pytest.fail(f"{path}:{node.lineno}: {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "shell":
                assert isinstance(node.value, ast.Constant) and not node.value.value, (
                    f"{path}:{node.value.lineno}"
                )
        package = ".".join(path.relative_to(ROOT).parent.parts) or "hf_fusion"
        assert not imports(path, package) & {
            "pickle",
            "marshal",
            "shelve",
            "dill",
            "cloudpickle",
        }, path


def test_no_build_file_loosens_floating_point():
    for path in sources("CMakeLists.txt", "*.cmake", "*.toml", "Makefile", "*.cc", "*.h"):
        text = re.sub(r"(#|//).*", "", path.read_text())
        loosens = r"-ffast-math|-Ofast|-funsafe-math|float_control|(?<!-fno-)fast-math"
        assert not re.search(loosens, text), path


def test_sizes_are_multiplied_in_checked_h_only():
    """In the checks a product is one of Size values, or an index inside brackets that a check has
    bounded.
    """
    names = "abi_parts.h", "abi_checks.h", "abi_attend.h"
    checks = "".join((ROOT / "csrc" / name).read_text() for name in names)
    text = re.sub(r"//.*|\"(\\.|[^\"\\])*\"", "", checks)
    text = re.sub(r"\[[^\[\]]*\]", "", text)
    products = re.findall(r"[\w)\].]+ \* [\w(.:>-]+", text)
    assert products, "the pattern no longer finds the products it should judge"
    assert [product for product in products if not re.search(r"\* Size\(", product)] == []
    assert not re.search(r"\b(mul|add)_overflow", text)
