"""What the tests of the commands begin with: a tiny recipe, and a run on a text."""

from pathlib import Path

import pytest

from ssmscan import cli

SYMBOLS = "{symbols: 3, data_tokens: 2, length: 5}"
TINY = f"""
steps: 4
batch_size: 2
eval_every: 2
eval_tokens: 28
save_every: 2
device: cpu
task: {SYMBOLS}
model: {{mixers: gated_ssm, layers: 1, hidden_size: 4, mixer_options: {{gated_ssm: {{expand: 1}}}}}}
optim: {{warmup: 1}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a tiny recipe."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """A run on a text, hardly trained."""
    here = tmp_path_factory.mktemp("text")
    (here / "verse.txt").write_text("to be or nöt to be\n" * 30, encoding="utf-8")
    (here / "tiny.yaml").write_text(TINY.replace(SYMBOLS, f"{{name: text, data: {here}/verse.txt, length: 5}}"))
    assert cli.main(["train", "--config", f"{here}/tiny.yaml", "--out", f"{here}/run"]) == 0
    return here / "run"
