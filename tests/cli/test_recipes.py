"""The recipes: each can be read, and takes steps."""

import json
from pathlib import Path

import pytest

from ssmscan import cli
from ssmscan.training.options import train_config, train_parser

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe):
    arguments = ["--config", str(recipe)]
    if recipe.stem == "shakespeare":
        arguments += ["--task.data", "shakespeare.txt"]
    parser = train_parser(arguments)
    config, resume = train_config(arguments, parser.instantiate(parser.parse_args(arguments)))
    assert not resume
    assert config.out == f"runs/{recipe.stem}"


# What makes two steps of a recipe short; the rest is as it stands there.
SHORT = {
    "copying": "",
    "demo": "",
    "selective_copying": "--task.length 64",
    "induction_heads": "--task.length 64 --task.test_lengths [64] --task.test_examples 2",
    "induction_heads_paper": "--task.length 64 --task.test_lengths [64] --task.test_examples 2",
    "associative_recall": "",
    "shakespeare": "--task.data verse.txt --task.length 16",
} | dict.fromkeys(
    ("books_mamba", "books_mamba2", "books_hybrid", "books_transformer"),
    "--task.data books --task.length 16 --model.layers 6 --model.hidden_size 48 --precision float32 "
    "--batch_size 4 --micro_batch_size 2",
)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_take_steps(recipe, here, capsys):
    """Two of them, on the CPU, with an evaluation, an examination and a checkpoint."""
    Path("verse.txt").write_text("to be or not to be, that is the question\n" * 40)
    assert cli.main(["tokenize", "--data", "verse.txt", "--vocab", "300", "--out", "books"]) == 0
    options = "--device cpu --steps 2 --batch_size 2 --eval_tokens 1 --target null --out run --cuda_graph false"
    arguments = ["train", "--config", str(recipe), *options.split(), *SHORT[recipe.stem].split()]
    if recipe.stem in ("books_hybrid", "books_transformer"):
        arguments += ["--model.mixer_options.attention", "{num_heads: 4}"]
    if recipe.stem in ("books_mamba2", "books_hybrid"):
        arguments += ["--model.mixer_options.mamba2", "{headdim: 16, d_state: 16}"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert json.loads(Path("run/metrics.json").read_text())["steps"] == 2
