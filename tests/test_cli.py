"""The command: exit statuses, one line on stderr, nothing written by what is refused."""

import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tensorboard.summary.writer.record_writer import RecordWriter
from transformers import PreTrainedModel

import ssmscan_main
from ssmscan import cli
from ssmscan.models import load_pretrained
from ssmscan.tasks import TASKS
from ssmscan.training import checkpoint, loop, report
from ssmscan.training.options import train_config, train_parser

RECIPES = Path(__file__).parent.parent / "recipes"
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


def test_trains(here, capsys):
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run", "--optim.lr", "1e-3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "answer    " in out
    assert re.search(r"\nloss \d\.\d{4}, accuracy 0\.\d{4}; held out, after 4 steps", out)
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] == 4
    assert "lr: 0.001\n" in Path("run/config.yaml").read_text()


def test_resumes(here, capsys, monkeypatch):
    save = checkpoint.save

    def interrupted(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 130
    assert capsys.readouterr().err == "train: interrupted. Continue with ssmscan train --resume run.\n"
    Path("run").rename("moved")
    assert cli.main(["train", "--resume", "moved"]) == 0
    assert json.loads(Path("moved/metrics.json").read_text())["steps"] == 4
    assert not Path("run").exists()


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


def test_one_run_in_a_folder(here, capsys):
    """Neither a new run nor the same one resumed enters a folder in which a run is going on."""
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run"]) == 0
    Path("run/metrics.json").unlink()
    before = sorted(Path("run").rglob("*"))
    capsys.readouterr()
    with FileLock("run/.lock"):
        for arguments in ("--resume run", "--config tiny.yaml --out run --overwrite true"):
            assert cli.main(["train", *arguments.split()]) == 2
            assert capsys.readouterr().err == (
                "train: out must be a folder of its own, got run, where a run is going on. Wait for it.\n"
            )
    assert sorted(Path("run").rglob("*")) == before
    assert cli.main(["train", "--resume", "run"]) == 0


@pytest.mark.filterwarnings("default")
def test_warns_of_a_broken_checkpoint_on_one_line(here, capsys):
    cli.main(["train", "--config", "tiny.yaml", "--out", "run"])
    Path("run/metrics.json").unlink()
    Path("run/checkpoints/step_00000004/manifest.json").write_text("{")
    capsys.readouterr()
    assert cli.main(["train", "--resume", "run"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: checkpoint run/checkpoints/step_00000004 is broken")
    assert err.count("\n") == 1


def test_a_failed_run(here, capsys):
    assert cli.main(["train", "--config", "tiny.yaml", "--out", "run", "--target", "accuracy >= 1.0"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("train: accuracy must reach 1, got 0.")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", 'expected "subcommand" to be one of {train,generate,eval,tokenize,bench, ...}'),
        ("tarin", "invalid choice: 'tarin'"),
        ("train --optim.lr fast", "optim.lr must be float, got fast"),
        ("train --optim.lr -1", "optim: lr must be positive and finite, got -1.0"),
        ("train --optim.rate 1", "unrecognized arguments: --optim.rate"),
        ("train --steps 1.5", "steps must be int, got 1.5"),
        (
            "train --target high",
            "train: target must be a measure, >= or <=, and a number, as in accuracy >= 0.99, got 'high'",
        ),
        (
            "train --target skill>=1",
            "train: target must be of what the task selective_copying measures: loss, accuracy, got",
        ),
        ("train --wandb mine", "train: wandb must be installed, got none."),
        ("train --model.layers 1.5", "model.layers must be int or null, got 1.5."),
        ("train --model.mixers mambo", "SSMConfig: mixers must be of gated_ssm,"),
        ("train --model.mixers mamba2 --model.hidden_size 8", "Mamba2: "),
        ("train --task.name text", "task.data"),
        (
            "train --task.name text --task.data absent.txt",
            "text: data must name files, got absent.txt, which matches none.",
        ),
        ("train --task.name sorting", f"train: task.name must be one of {', '.join(TASKS)}, got sorting."),
        ("train --task.length 4", "selective_copying: data_tokens must be 1 to length = 4, got 8"),
        ("train --config absent.yaml", "train: --config must name a YAML file, got absent.yaml: No such file"),
        ("train --config=absent.yaml", "train: --config must name a YAML file, got absent.yaml: No such file"),
        ("train --config .", "train: --config must name a YAML file, got .: Is a directory."),
        (
            "train --config empty.yaml",
            "train: --config must hold options, as in steps: 100, got nothing in empty.yaml.",
        ),
        ("train --config list.yaml", "train: --config must hold options, as in steps: 100, got [3] in list.yaml."),
        ("train --config latin1.yaml", "train: --config must be UTF-8, got latin1.yaml."),
        ("train --config wrong_key.yaml", "does not accept option 'stepz'"),
        ("train --config wrong_value.yaml", "steps must be int, got many"),
        ("train --config wrong_yaml.yaml", "train: --config must be YAML, got wrong_yaml.yaml: while parsing"),
        ("train --resume absent", "train: --resume must name a run's folder, got absent"),
        (
            "train --resume absent --steps 3",
            "train: --resume must be the only option, or come with --mesh, got --steps.",
        ),
        (
            "train --resume absent --steps 2000",
            "train: --resume must be the only option, or come with --mesh, got --steps.",
        ),
        (
            "train --optim.lr 2e-3 --resume=absent",
            "train: --resume must be the only option, or come with --mesh, got --optim.lr.",
        ),
        ("train --res absent", "unrecognized arguments: --res"),
        ("train --out tiny.yaml", "train: out must be a folder, got the file tiny.yaml"),
        ("train --out .", "train: out must be an empty folder or a run's"),
        ("train --out tiny.yaml/run", "train: out must be a folder that can be written, got tiny.yaml/run"),
    ],
)
def test_wrong_usage(here, capsys, arguments, part):
    Path("wrong_key.yaml").write_text("stepz: 3")
    Path("wrong_value.yaml").write_text("steps: many")
    Path("wrong_yaml.yaml").write_text("optim: {lr: [")
    Path("empty.yaml").write_text("")
    Path("list.yaml").write_text("[3]")
    Path("latin1.yaml").write_bytes("# für\nsteps: 3".encode("latin-1"))
    before = sorted(here.rglob("*"))
    assert cli.main(shlex.split(arguments)) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the CUDA device that is to be missing")
def test_a_missing_device(here, capsys):
    assert cli.main(["train", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "train: device must be one of this machine, got cuda. Use --device cpu.\n"
    assert not Path("runs").exists()


def test_a_graph_without_cuda(here, capsys):
    assert cli.main(["train", "--device", "cpu", "--cuda_graph", "true"]) == 2
    assert capsys.readouterr().err == "train: cuda_graph must be false without CUDA, got true.\n"
    assert not Path("runs").exists()


def test_help_tells_defaults_and_units(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["train", "--help"])
    assert status.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "between two evaluations (steps). (type: int, default: 100)" in out
    assert "--optim.lr LR peak learning rate. (type: float, default: 0.002)" in out


@pytest.mark.parametrize("task", TASKS)
def test_groups_of_the_help_are_named_in_words(capsys, task):
    with pytest.raises(SystemExit):
        cli.main(["train", "--task.name", task, "--help"])
    headings = re.findall(r"^(\S.*):$", capsys.readouterr().out, re.MULTILINE)
    assert len(headings) == 6
    assert all(re.fullmatch(r"[A-Za-z ,:]+", heading) for heading in headings), headings
    assert "the shape of the model" in headings


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run on a text, hardly trained."""
    here = tmp_path_factory.mktemp("text")
    (here / "verse.txt").write_text("to be or nöt to be\n" * 30, encoding="utf-8")
    (here / "tiny.yaml").write_text(TINY.replace(SYMBOLS, f"{{name: text, data: {here}/verse.txt, length: 5}}"))
    assert cli.main(["train", "--config", f"{here}/tiny.yaml", "--out", f"{here}/run"]) == 0
    return here / "run"


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
        ("--model .", "generate: model must have a tokenizer, got ., whose tokens are no text."),
    ],
)
def test_generate_refuses(text_run, here, capsys, options, part):
    for name, content in (("gap", b"to\n\nbe\n"), ("empty", b""), ("latin", b"\xe9t\xe9\n")):
        Path(f"{name}.txt").write_bytes(content)
    assert cli.main(["generate", "--model", str(text_run), *options.split()]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


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


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "linear_scan" in out


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("rich", "matplotlib") else name)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == (
        "ssmscan: matplotlib, rich must be installed, got none. Run pip install 'ssmscan[train]'.\n"
    )


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


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_interrupted_by_the_keyboard(here, capsys):
    """A signal in the midst of training: exit status 130, one line, and a run that can be resumed."""
    command = [sys.executable, "-m", "ssmscan.cli", "train", "--config", "tiny.yaml", "--out", "run"]
    with subprocess.Popen(
        [*command, "--steps", "1000000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not list(here.glob("run/checkpoints/step_*")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            assert cli.main(["train", "--resume", "run"]) == 2
            assert "where a run is going on" in capsys.readouterr().err
        finally:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == "train: interrupted. Continue with ssmscan train --resume run.\n"
    assert not list(here.glob("run/checkpoints/unfinished_*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_interrupted_while_importing():
    code = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
import ssmscan_main
sys.exit(ssmscan_main.main())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 130
    assert result.stderr == "ssmscan: interrupted.\n"


def test_the_entry_point_runs_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssmscan", "tarin"])
    assert ssmscan_main.main() == 2
    assert "invalid choice: 'tarin'" in capsys.readouterr().err


def test_bench_refuses_on_one_line(here, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "no_such_op"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "OP must be one of" in err
    assert not list(here.glob("benchmarks"))


def test_eval_refuses_tokens_of_another_tokenizer(text_run, here, capsys):
    """As many of them or fewer, they would be measured as other text."""
    Path("other.txt").write_text("ab" * 50, encoding="utf-8")
    assert cli.main(["tokenize", "--data", "other.txt", "--tokenizer", "characters", "--out", "tokens"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--model", str(text_run), "--data", "tokens"]) == 2
    assert capsys.readouterr().err.startswith("eval: data must be tokens of the model's tokenizer, got tokens.")
