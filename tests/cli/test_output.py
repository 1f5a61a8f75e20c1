"""An output that takes no more, a pipe that is closed, a full disk: one line, and a run that can be resumed."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter
from transformers import PreTrainedModel

from ssmscan import cli
from ssmscan.training import checkpoint, loop, report


def test_an_ascii_output_costs_no_run(here, monkeypatch):
    """Neither the example at the end nor the name of the folder."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "läufe"]) == 0
    assert cli.main(["info"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert Path("läufe/metrics.json").is_file()
    out = written.getvalue().decode("ascii")
    assert "model     " in out
    assert out.count("are in l\\xe4ufe\n") == 1


def test_what_prints_at_the_end_costs_no_run(here, capsys, monkeypatch):
    """A library's user may have an output that the command has not made safe."""

    class Unwilling(io.StringIO):
        def write(self, text):
            if "answer" in text:
                raise UnicodeEncodeError("ascii", text, 0, 1, "ordinal not in range(128)")
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Unwilling())
    with pytest.raises(UnicodeEncodeError):
        cli.main(["train", "--config", "tiny.yaml", "--out", "run"])
    assert json.loads(Path("run/metrics.json").read_text())["steps"] == 4


@pytest.fixture
def closed_pipe():
    """An output whose reader is gone, as after ``| head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error there")
def test_a_closed_pipe_ends_a_run_that_can_be_resumed(here, capsys, monkeypatch, closed_pipe):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 141
    assert capsys.readouterr().err == (
        "train: the reader of the output is gone. Continue with ssmscan train --resume run.\n"
    )
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main(["train", "--resume", "run"]) == 0


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error there")
def test_a_closed_pipe_ends_what_only_prints_without_a_word(here, capsys, monkeypatch, closed_pipe):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert cli.main(["info"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error there")
def test_a_closed_error_pipe_as_well(here, monkeypatch, closed_pipe):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 141


def _on_a_full_disk(function):
    """``function``, during which no file can grow: what the system does then, but for the error's number."""
    resource = pytest.importorskip("resource")

    def limited(*arguments, **keywords):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            return function(*arguments, **keywords)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.mark.parametrize(
    ("module", "writer", "file"),
    [
        (report, "append_line", "log.jsonl"),
        (PreTrainedModel, "save_pretrained", "checkpoints/unfinished_00000002/model.safetensors"),
        (torch, "save", "checkpoints/unfinished_00000002/training.pt"),
        (checkpoint, "_write_manifest", "checkpoints/unfinished_00000002/manifest.json"),
        (loop, "plot", "curves.png"),
        (loop, "replace_text", "metrics.json"),
    ],
)
def test_a_full_disk_names_the_file_and_how_to_go_on(here, capsys, monkeypatch, module, writer, file):
    with monkeypatch.context() as patch:
        patch.setattr(module, writer, _on_a_full_disk(getattr(module, writer)))
        assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 1
    assert capsys.readouterr().err == (
        f"train: run/{file} must be readable and writable, got File too large. "
        "Continue with ssmscan train --resume run.\n"
    )
    assert cli.main(["train", "--resume", "run"]) == 0


def test_a_full_disk_under_tensorboard(here, capsys, monkeypatch):
    """It writes in a thread of its own, which prints its traceback unless told not to."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 1
    assert capsys.readouterr().err == (
        "train: run/tensorboard must be readable and writable, got No space left on device. "
        "Continue with ssmscan train --resume run.\n"
    )
