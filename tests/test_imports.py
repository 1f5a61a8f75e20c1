"""What imports what, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ssmscan

ROOT = Path(ssmscan.__file__).parent
# Each row imports from itself and from those after it.
ROWS = (
    ("__main__", "cli"),
    ("training", "tasks", "generation", "distributed"),
    ("models",),
    ("layers",),
    ("ops",),
    ("backend", "shapes", "ahead"),
)
ROW = {name: number for number, names in enumerate(ROWS) for name in names}
# What tests and times the operations sees all of them; of the rest, only an operation's case and the command see it.
TOOLS = ("testing", "bench")


def _modules():
    return sorted(path for path in ROOT.rglob("*.py"))


def _parts(path):
    """ops/linear_scan/op.py as ("ops", "linear_scan", "op"), a folder's own module as the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(path):
    """The package's own modules that a file imports, as parts, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides what is imported"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "ssmscan":
                yield tuple(name.split(".")[1:])


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    """Never from a layer to one above; no operation imports another one's internals."""
    here = _parts(path)
    if not here or here[0] in TOOLS:
        return
    assert here[0] in ROW, f"{here[0]} has no place in the import rule"
    for there in _imports(path):
        if there and there[0] in ROW:
            assert ROW[there[0]] >= ROW[here[0]], f"{'.'.join(here)} imports {'.'.join(there)}"
        if there and there[0] in TOOLS:
            assert here[0] == "cli" or here[-1] == "case", f"{'.'.join(here)} imports {'.'.join(there)}"
        if here[0] == "ops" and len(here) == 3 and there[:1] == ("ops",) and (ROOT / "ops" / there[1]).is_dir():
            inside = there[1] == here[1] or there[1].startswith("_")
            assert inside, f"{'.'.join(here)} imports another operation's {'.'.join(there)}"


def test_every_import_is_seen(tmp_path):
    """Also one inside of a function."""
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from ssmscan.models import g\n    import ssmscan.ops.h, torch\n")
    assert list(_imports(module)) == [("models", "g"), ("ops", "h")]


def _python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_little():
    """Beside PyTorch no package but ours, and of that the operations: what is heavy is imported at its first use."""
    code = """
import sys, torch
before = set(sys.modules)
import ssmscan
print(*sorted(set(sys.modules) - before))
"""
    modules = [name.split(".") for name in _python(code).split()]
    assert {name[0] for name in modules} - sys.stdlib_module_names == {"ssmscan"}
    assert {name[1] for name in modules if name[0] == "ssmscan" and len(name) > 1} == {"backend", "ops", "shapes"}
    # The kernels need Triton or Numba.
    assert not [name for name in modules if name[-1].startswith(("kernel", "cpu", "configs"))]


def test_without_triton_and_numba():
    """Every operation still runs, by the torch backend."""
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "numba"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from ssmscan import backend
from ssmscan.ops.cases import CASES
from ssmscan.testing import assert_close, assert_same_bits

assert not backend.TRITON and not backend.NUMBA
assert backend.choose("f", "auto", "cpu", torch.float32) == "torch"
for case in CASES:
    for option in case.options:
        call = case.call(option, case.sizes[0])
        values = call.differentiate("auto")
        assert_same_bits(values, call.differentiate("torch"))
        assert_close(values, call.differentiate("reference"), torch.float64)
        for name in ("triton", "cpu"):
            try:
                call.run(name)
            except RuntimeError as error:
                assert "none installed" in str(error)
            else:
                raise AssertionError(name)
print(len(CASES), "triton" in sys.modules, "numba" in sys.modules)
"""
    count, *loaded = _python(code).split()
    assert int(count) >= 1
    assert loaded == ["False", "False"]
