"""SIGTERM: the run ends in order, and goes on to the same bits."""

import os
import signal
import threading
from pathlib import Path

import pytest

from ssmscan import cli
from ssmscan.training import loop
from ssmscan.training.termination import termination

RECIPE = """
{steps: 9, batch_size: 2, eval_tokens: 16, log_every: 1, save_every: 100, device: cpu, optim: {warmup: 1},
task: {name: copying, symbols: 3, data_tokens: 2, length: 6, shortest: 2},
model: {mixers: gated_ssm, layers: 1, hidden_size: 4, mixer_options: {gated_ssm: {expand: 1}}}}
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_a_terminated_run_saves_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(RECIPE)
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "whole"]) == 0
    learning_rate, handler = loop.learning_rate, signal.getsignal(signal.SIGTERM)

    def terminating(step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(step, *rest)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "learning_rate", terminating)
        assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 143
    assert capsys.readouterr().err == (
        "train: terminated, after a checkpoint. Continue with ssmscan train --resume run.\n"
    )
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_00000005"]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert cli.main(["train", "--resume", "run"]) == 0
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_another_thread_leaves_signals_alone():
    handler, told = signal.getsignal(signal.SIGTERM), []

    def enter():
        with termination() as terminated:
            told.append((terminated(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert told == [(False, handler)]
