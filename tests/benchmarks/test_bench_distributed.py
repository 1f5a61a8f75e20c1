"""Operations and models that two processes share, in tiny sizes on the CPU: what is recorded of them."""

import importlib.util
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from ssmscan.bench import measure
from ssmscan.bench.result import read_all

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forkserver")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "distributed.py"
CALLS = (
    "links",
    "scan ssd selective_scan --length 100 --per-rank 40",
    "model mamba2-130m --length 32 --chunk 16 --mesh cp=2",
    "model mamba2-130m --length 16 --batch 2 --mesh dp=2 --checkpointing --weights gathered",
    "model mamba2-130m --length 16 --batch 2 --mesh dp=2 --weights copies",
    "model mamba2-130m --length 16 --batch 2 --mesh tp=2",
)


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _process(rank, folder, ports):
    torch.set_num_threads(1)
    measure.COPY_BYTES, measure.BUDGET, measure.WARM_UP = {"cpu": 2**20, "cuda": 2**20}, 0.001, {"cpu": 0.0}
    spec = importlib.util.spec_from_file_location("distributed", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for call, port in zip(CALLS, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        script.main([*call.split(), "--tiny", "--repeats", "1", "--commit", "abc", "--out", str(folder)])


def test_what_is_recorded(tmp_path):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["ssmscan.cli", "ssmscan.training.mesh", "ssmscan.training.shards"])
    ports = [_free_port() for _ in CALLS]
    started = [server.Process(target=_process, args=(rank, tmp_path, ports), daemon=True) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0, 0]
    path = tmp_path / "cpu" / "distributed.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["experiment"], row["case"], row["mesh"], row["length"], row["gpus"]) for row in rows] == [
        ("links", None, None, None, 2),
        ("scan", "ssd", "cp=2", 100, 2),
        ("scan", "ssd", "cp=2", 80, 2),
        ("scan", "selective_scan", "cp=2", 100, 2),
        ("scan", "selective_scan", "cp=2", 80, 2),
        ("model", "mamba2-130m", "cp=2", 32, 2),
        ("model", "mamba2-130m", "dp=2", 16, 2),
        ("model", "mamba2-130m", "dp=2", 16, 2),
        ("model", "mamba2-130m", "tp=2", 16, 2),
    ]
    assert all(row["commit"] == "abc" and row["torch"] == torch.__version__ for row in rows)
    assert all(row["ms"] > 0 and row["tokens_per_s"] > 0 for row in rows[1:])
    # Once forward and once backward, float32: a state and its decays, and the gradients of two states.
    for row, sent in zip(rows[1:5], 2 * [3 * (2 * 16 * 8) + 2] + 2 * [4 * (32 * 16)], strict=True):
        assert (row["collectives"], row["sent_bytes"]) == (2, 4 * sent)
    # The pages of operations leave the file alone.
    assert read_all(tmp_path) == []
