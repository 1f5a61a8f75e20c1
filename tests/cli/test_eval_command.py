"""``ssmscan eval``: what it measures, and what it refuses."""

import json
import re
from pathlib import Path

import pytest

from ssmscan import cli


def test_evaluates(text_run, here, capsys):
    """Files and folders of tokens; in words and as JSON."""
    Path("verse.txt").write_text("to be or nöt to be\n" * 9, encoding="utf-8")
    arguments = ["eval", "--model", str(text_run), "--length", "16"]
    assert cli.main([*arguments, "--data", "verse.txt", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["tokens"] == 9 * 19
    assert cli.main([*arguments, "--data", "verse.txt", "--stride", "8"]) == 0
    names = ("loss", "perplexity", "bits per byte", "accuracy")
    told = "   ".join([*(rf"{name} \d+\.\d{{4}}" for name in names), "171 tokens", r"[\d,]+ tokens/s\n"])
    assert re.fullmatch(told, capsys.readouterr().out)
    tokenized = ["tokenize", "--data", "verse.txt", "--tokenizer", str(text_run), "--out", "tokens"]
    assert cli.main(tokenized) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--data", "tokens", "--part", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(measured["loss"], rel=0.1)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("", "eval: one of --data and --harness must be given, got none."),
        ("--data absent.txt", "text: --data must"),
        ("--data verse.txt --stride 0", "eval: stride must be at least 1, got 0."),
        ("--harness arc_easy", "eval: lm-eval must be installed for --harness, got none. Run pip install lm-eval."),
    ],
)
def test_eval_refuses(text_run, here, capsys, options, part):
    Path("verse.txt").write_text("to be", encoding="utf-8")
    assert cli.main(["eval", "--model", str(text_run), *options.split()]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def test_eval_refuses_tokens_of_another_tokenizer(text_run, here, capsys):
    """As many of them or fewer, they would be measured as other text."""
    Path("other.txt").write_text("ab" * 50, encoding="utf-8")
    assert cli.main(["tokenize", "--data", "other.txt", "--tokenizer", "characters", "--out", "tokens"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--model", str(text_run), "--data", "tokens"]) == 2
    assert capsys.readouterr().err.startswith("eval: data must be tokens of the model's tokenizer, got tokens.")
