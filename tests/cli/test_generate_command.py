"""``ssmscan generate``: what it continues a text by, and what it refuses."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ssmscan import cli
from ssmscan.models import load_pretrained


def _generated(capsys, *arguments):
    assert cli.main(["generate", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_generates(text_run, capsys):
    """The prompt and what is asked for, or less where the text has ended; the same for the same seed."""
    first, again, other = (
        _generated(capsys, "--model", text_run, "--prompt", "to bö", "--max-new-tokens", 40, "--seed", seed)
        for seed in (0, 0, 1)
    )
    assert first.startswith("to bö")
    assert first.endswith("\n")
    assert 5 + 1 < len(first) <= 5 + 40 + 1
    assert set(first) <= set("to be or nöt\n")
    assert first == again
    assert first != other


@pytest.mark.parametrize("prompt", ["or", "to be"])
def test_generates_the_likeliest(text_run, capsys, prompt):
    greedy, only, unlikely = (
        _generated(capsys, "--model", text_run, "--prompt", prompt, "--max-new-tokens", 12, *options)
        for options in (["--temperature", 0], ["--top-k", 1], ["--top-p", 1e-6])
    )
    model = load_pretrained(text_run)
    # The last is the end of the text.
    characters = [*sorted(set("to be or nöt\n")), ""]
    tokens = torch.tensor([[characters.index(character) for character in prompt]])
    with torch.no_grad():
        for _ in range(12):
            if characters[tokens[0, -1]]:
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert greedy == "".join(characters[token] for token in tokens[0]) + "\n"
    assert only == unlikely == greedy


def test_generates_up_to_a_stop(text_run, capsys):
    """Whatever of it has come before the rest did."""
    options = ["--model", text_run, "--prompt", "to be", "--max-new-tokens", 40]
    whole = _generated(capsys, *options)
    stop = whole[8:11]
    assert _generated(capsys, *options, "--stop", "xyz", stop) == whole[: whole.index(stop, 5)] + "\n"
    assert _generated(capsys, *options, "--stop", "xyz") == whole


@pytest.mark.parametrize("source", ["prompts.txt", "-"])
def test_generates_from_a_file(text_run, here, capsys, monkeypatch, source):
    """A line of JSON for each of its lines, the same as alone, padded or not, and in a smaller batch at the end."""
    prompts = ["to be", "or", "not to"]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(prompts).encode())))
    options = ["--model", text_run, "--max-new-tokens", 9, "--temperature", 0]
    lines = _generated(capsys, *options, "--prompts", source, "--batch-size", 2, "--stop", "xyz").splitlines()
    for line, prompt in zip(map(json.loads, lines), prompts, strict=True):
        assert line["prompt"] == prompt
        assert prompt + line["continuation"] + "\n" == _generated(capsys, *options, "--prompt", prompt)


def test_generates_with_a_draft(text_run, capsys):
    options = ["--model", text_run, "--prompt", "to be", "--max-new-tokens", 12, "--temperature", 0]
    draft = text_run / "checkpoints" / "step_00000002"
    assert _generated(capsys, *options, "--draft", draft) == _generated(capsys, *options)


def test_generates_from_a_checkpoint(text_run, capsys):
    folder = text_run / "checkpoints" / "step_00000004"
    assert _generated(capsys, "--model", folder) == _generated(capsys, "--model", text_run)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--prompt x", "generate: prompt must consist of what the model was trained on, got 'x'."),
        ("--prompt=", "generate: prompt must have at least one token, got ''."),
        ("--max-new-tokens 0", "generate: --max-new-tokens must be at least 1, got 0."),
        ("--temperature -1", "Generator: temperature must be at least 0 and finite, got -1.0."),
        ("--top-k 0", "Generator: top_k must be at least 1, got 0."),
        ("--top-p 1.5", "Generator: top_p must be in (0, 1], got 1.5."),
        ("--top-p much", "ssmscan: top_p must be float or null, got much."),
        ("--seed -1", "generate: --seed must be at least 0, got -1."),
        ("--stop=", "generate: --stop must be texts, got ''."),
        ("--prompts absent.txt", "generate: --prompts must be a file, got absent.txt: No such file"),
        ("--prompts gap.txt", "generate: --prompts must have a prompt in each line, got none in line 2."),
        ("--prompts empty.txt", "generate: --prompts must have a prompt in each line, got no line in empty.txt."),
        ("--prompts latin.txt", "generate: --prompts must be UTF-8, got latin.txt."),
        ("--prompts x.txt --batch-size 0", "generate: --batch-size must be at least 1, got 0."),
        ("--model absent", "load_pretrained: path_or_name must be a folder"),
        ("--model .", "load_pretrained: . must hold config.json, got none."),
        ("--model shapes", "generate: model must have a tokenizer, got shapes, whose tokens are no text."),
    ],
)
def test_generate_refuses(text_run, here, capsys, options, part):
    for name, content in (("gap", b"to\n\nbe\n"), ("empty", b""), ("latin", b"\xe9t\xe9\n")):
        Path(f"{name}.txt").write_bytes(content)
    Path("shapes").mkdir()
    Path("shapes/config.json").write_text("{}")
    assert cli.main(["generate", "--model", str(text_run), *options.split()]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def _refusal(capsys, folder):
    """What generate and eval say of a folder, which is the same."""
    for command in (["generate"], ["eval", "--data", "tiny.yaml"]):
        assert cli.main([*command, "--model", str(folder)]) == 2
        err = capsys.readouterr().err
        found = re.fullmatch(rf"{command[0]}: model must be the folder of a whole model, got {folder}, (.*)\n", err)
        assert found, err
    return found[1]


@pytest.mark.parametrize("at", ["checkpoints", "checkpoints/step_00000004", "checkpoints/step_00000004/shards"])
def test_shards_are_no_model(here, capsys, at):
    """It says what they are, and how to come by a model: from the run once that has ended, and by its end before."""
    run = here / "run"
    (run / "checkpoints" / "step_00000004" / "shards").mkdir(parents=True)
    (run / "checkpoints" / "step_00000004" / "shards" / ".metadata").touch()
    (run / "config.yaml").touch()
    goes_on = f"Continue it by ssmscan train --resume {run}, which leaves a model there."
    assert _refusal(capsys, run) == f"a run that has not ended. {goes_on}"
    shards = "a run's checkpoints, in shards of several processes. "
    assert _refusal(capsys, run / at) == shards + goes_on
    (run / "metrics.json").touch()
    assert _refusal(capsys, run / at) == f"{shards}Give {run}, where the run has left its model."


def test_an_unfinished_run_has_checkpoints(text_run, here, capsys):
    """Those of one process are models."""
    shutil.copytree(text_run / "checkpoints", here / "run" / "checkpoints")
    shutil.copy(text_run / "config.yaml", here / "run")
    newest = here / "run" / "checkpoints" / "step_00000004"
    assert _refusal(capsys, here / "run") == f"a run that has not ended. Give a checkpoint, such as {newest}."
    assert (
        _refusal(capsys, here / "run" / "checkpoints") == f"a run's checkpoints. Give a checkpoint, such as {newest}."
    )
    assert _generated(capsys, "--model", newest) == _generated(capsys, "--model", text_run)


def test_shards_of_no_run(here, capsys):
    """Nor is a folder beside a run's one of its checkpoints."""
    (here / "config.yaml").touch()
    (here / "checkpoints").mkdir()
    (here / "saved").mkdir()
    (here / "saved" / ".metadata").touch()
    advice = "Load them into a model, and export that by save_pretrained."
    assert _refusal(capsys, here / "saved") == f"shards of torch.distributed.checkpoint. {advice}"
