"""What is kept of the CPU's compiled kernels: it goes stale with its sources, and no call depends on it."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssmscan

compiled = pytest.importorskip("ssmscan.ops._numba.compiled")
ROOT = Path(ssmscan.__file__).parent
KERNEL = """
from ssmscan.ops._numba.compiled import compiled
from {package}.parts import FACTOR, add

@compiled
def kernel(x):
    return FACTOR * add(x)
"""
PARTS = """
from ssmscan.ops._numba.compiled import compiled
from {package} import constants

FACTOR = {factor}
TERM = constants.TERM

@compiled
def add(x):
    return x {sign} TERM
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package of kernels, and imports its main one as a new process would."""
    monkeypatch.syspath_prepend(tmp_path)
    # Python's own cache goes by the size and the second of a file.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "kernels_of_a_test"
    folder.mkdir()

    def load(factor=2, term=10, sign="+", more=""):
        for name in [name for name in sys.modules if name.startswith(folder.name)]:
            del sys.modules[name]
        compiled._hash.cache_clear()
        (folder / "__init__.py").touch()
        (folder / "constants.py").write_text(f"TERM = {term}")
        (folder / "parts.py").write_text(PARTS.format(package=folder.name, factor=factor, sign=sign))
        (folder / "kernel.py").write_text(KERNEL.format(package=folder.name) + more)
        importlib.invalidate_caches()
        return importlib.import_module(f"{folder.name}.kernel").kernel

    return load


def _hits(kernel, x, value):
    """Whether a first call gives ``value`` by what a process before this one compiled."""
    assert kernel(x) == value
    hits, misses = sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())
    assert hits + misses == 1
    return hits == 1


def test_kept(package):
    assert not _hits(package(), 1, 22)
    assert _hits(package(), 1, 22)


@pytest.mark.parametrize(
    ("change", "value"),
    [({"factor": 3}, 33), ({"term": 11}, 24), ({"sign": "-"}, -18), ({"more": "# A comment."}, 22)],
    ids=str,
)
def test_a_change_of_what_a_kernel_is_made_of(package, change, value):
    """Of a constant or a function, its own or another file's; each would otherwise be that of the first call."""
    _hits(package(), 1, 22)
    assert not _hits(package(**change), 1, value)


def test_disk_that_is_full(package, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled.IndexDataCacheFile, "save", fail)
    assert not _hits(package(), 1, 22)
    monkeypatch.setattr(compiled.IndexDataCacheFile, "load", fail)
    assert not _hits(package(), 1, 22)


def test_nowhere_to_write(tmp_path):
    """A package and a home that cannot be written to: each process compiles for itself.

    A file stands where the folder would be made, which stops an administrator too.
    """
    shutil.copytree(ROOT, tmp_path / "ssmscan", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / "ssmscan" / "ops").rglob("__init__.py"):
        (path.parent / "__pycache__").touch()
    (tmp_path / "home").touch()
    code = """
import importlib, pathlib, torch, ssmscan

assert pathlib.Path(ssmscan.__file__).parts[:-2] == pathlib.Path.cwd().parts
for path in sorted(pathlib.Path("ssmscan/ops").rglob("cpu.py")):
    importlib.import_module(".".join(path.with_suffix("").parts))
from ssmscan.ops.linear_scan import cpu
from numba.core.caching import NullCache
assert isinstance(cpu._forward._cache, NullCache)
x = torch.ones(1, 3, 1)
print(ssmscan.linear_scan(x, x / 2, backend="cpu")[0].flatten().tolist())
"""
    home = {name: str(tmp_path / "home") for name in ("HOME", "XDG_CACHE_HOME")}
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= home | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[1.0, 1.5, 1.75]\n"
