"""A run that is killed at any moment goes on from where it was, to the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path

from ssmscan.tasks import Text
from ssmscan.training import ModelConfig, TrainConfig, train

folder, data = Path(sys.argv[1]), sys.argv[2]
config = TrainConfig(
    steps=60, batch_size=2, eval_every=7, eval_tokens=64, save_every=5, log_every=1, device="cpu",
    task=Text(data, length=16), model=ModelConfig(mixers=["mamba2", "gated_ssm"], hidden_size=8,
        mixer_options={"mamba2": {"headdim": 4, "d_state": 8}}),
)

def run(out):
    started = (out / "config.yaml").exists()
    train(replace(config, out=str(out)), resume=started)

# Each run in a process of its own, forked before any thread was begun.
def forked(out, seconds=None):
    child = os.fork()
    if child == 0:
        run(out)
        os._exit(0)
    if seconds is None:
        return os.waitpid(child, 0)[1]
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

began = time.perf_counter()
assert forked(folder / "whole") == 0
length = time.perf_counter() - began
moments = random.Random(0)
for _ in range(10):
    if not (folder / "run" / "metrics.json").exists():
        forked(folder / "run", moments.uniform(0.02, 0.6) * length)
if not (folder / "run" / "metrics.json").exists():
    assert forked(folder / "run") == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor SIGKILL")
def test_killed_at_ten_random_moments(tmp_path):
    data = tmp_path / "play.txt"
    data.write_text("KING:\nTo be, or not to be – that is the question.\n" * 20, encoding="utf-8")
    arguments = [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path), str(data)]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stderr
    whole, run = tmp_path / "whole", tmp_path / "run"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert _log(run) == _log(whole)
    assert not list((run / "checkpoints").glob("unfinished_*"))


def _log(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name not in ("seconds", "tokens_per_second")} for line in lines]
