"""What a benchmark run records, and where it comes from."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

HEADLINE = "headline"
SWEEP = "length sweep"
STEP = "decode step, graph replay"
DIRECTIONS = ("fwd", "fwdbwd")
# Files beside those of the operations: of whole models, the papers' figures, transformers' models, other libraries.
BESIDE = ("models", "figures", "others", "transformers")


@dataclass(frozen=True)
class Row:
    """One measured call. ``floor_ms`` is the least time that the machine's copy limit, or the arithmetic, allows."""

    op: str
    shape: Mapping[str, int]
    dtype: str
    direction: str
    backend: str
    variant: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float
    ratio_to_floor: float
    peak_mib: float | None


@dataclass(frozen=True)
class Result:
    """One operation on one machine: the file ``<gpu>/<op>.json``."""

    gpu: str
    commit: str
    torch: str
    triton: str | None
    date: str
    copy_gbps: float
    # Host time of a tiny call, forward without gradients ("fwd") and forward and backward ("fwdbwd"), and those of
    # scaled_dot_product_attention in the same run ("sdpa fwd", "sdpa fwdbwd").
    host_us: Mapping[str, float] | None
    rows: tuple[Row, ...]

    @property
    def op(self) -> str:
        return self.rows[0].op

    def write(self, folder: Path) -> Path:
        path = folder / self.gpu / f"{self.op}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> "Result":
        record = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**record, "rows": tuple(Row(**row) for row in record["rows"])})


def read_all(folder: Path) -> list[Result]:
    """Every result under ``folder``, ordered by machine and operation."""
    return [Result.read(path) for path in sorted(folder.glob("*/*.json")) if path.stem not in BESIDE]


def read_rows(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each machine's ``<name>.json`` under ``folder``."""
    paths = sorted(folder.glob(f"*/{name}.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def machine(device: str) -> str:
    """The machine's name in a path: "h200" of an NVIDIA H200, "h100" of an NVIDIA H100 80GB HBM3, or "cpu"."""
    return _short(torch.cuda.get_device_name()) if device == "cuda" else "cpu"


def _short(name: str) -> str:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return "-".join(word for word in words if not re.fullmatch(r"nvidia|geforce|\d+gb|hbm\w*|", word))


def versions() -> tuple[str, str | None]:
    """Of PyTorch and, where it is installed, Triton."""
    try:
        return torch.__version__, version("triton")
    except PackageNotFoundError:
        return torch.__version__, None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
    """The commit of the package's sources, "-dirty" when they differ from it; "unknown" of an installed package."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if _git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    package = Path(__file__).parents[1]
    return subprocess.run(
        ["git", "-C", str(package), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def replace_rows(path: Path, rows: Sequence[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """Write ``rows`` into a file of rows, in place of those with the same values of ``key``; all that it then holds.

    Several processes, each with a GPU of its own, may write into one file.
    """
    # Of the extra `train`, as are the models whose rows these are.
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(Path(gettempdir()) / f"ssmscan-{path.parent.name}-{path.stem}.lock"):
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        new = {tuple(row[name] for name in key) for row in rows}
        rows = [row for row in kept if tuple(row[name] for name in key) not in new] + [*rows]
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows
