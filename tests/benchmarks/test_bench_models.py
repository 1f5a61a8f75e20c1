"""``ssmscan bench models`` on tiny models: what it records, what it leaves out, and what it refuses to time."""

import json

import pytest
import torch
import torch.nn.functional as F

from ssmscan import models
from ssmscan.bench import __main__ as bench
from ssmscan.bench import gate, measure
from ssmscan.bench.models import command, experiment, generating, operations, timing, training
from ssmscan.bench.models.experiment import Experiment, LeftOutError, Settings
from ssmscan.generation import Generator

TINY = {
    "mamba": {},
    "mamba2": {"mixer_options": {"mamba2": {"headdim": 16, "d_state": 8}}},
    "transformer": {"mixer_options": {"attention": {"num_heads": 2}}, "intermediate_size": 32},
}
STEP = {"tokens_per_s", "step_ms", "host_ms", "peak_gib"}
CONTINUATION = STEP | {"call_tokens_per_s", "prefill_ms"}
ORIGIN = {"commit", "torch", "date"}


def _tiny(name):
    mixer = models.preset(name).mixers[0]
    return models.SSMConfig(vocab_size=32, hidden_size=32, mixers=[mixer], **TINY[name.split("-")[0]])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    # Where the cores are busy, threads wait for each other longer than they compute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(training, "preset", _tiny)
    monkeypatch.setattr(measure, "BUDGET", 0.001)
    monkeypatch.setattr(measure, "WARM_UP", {"cuda": 0.0, "cpu": 0.0})
    monkeypatch.setattr(gate, "SMALL", {"b": 1, "l": 16, "d": 4})
    monkeypatch.setattr(generating, "BUDGET", 0.001)
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(timing, "REPEATS", (1, 1))
    yield
    torch.set_num_threads(threads)


def _run(folder, *arguments):
    """Exit status and rows of ``ssmscan bench models`` with these arguments."""
    status = bench.main(["models", *arguments, "--device", "cpu", "--out", str(folder), "--commit", "abc"])
    return status, [row for path in folder.glob("cpu/*.json") for row in json.loads(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("name", "sizes", "rows", "measured"),
    [
        ("train", ["--batch", "2", "--lengths", "12"], [("train", 2, 12)], STEP),
        ("prefill", ["--batch", "2", "--lengths", "12"], [("prefill", 2, 12), ("forward", 2, 12)], STEP),
        (
            "generate",
            ["--batch", "2", "1", "--lengths", "12", "--new-tokens", "5"],
            [("generate", 1, 12), ("generate", 2, 12)],
            CONTINUATION,
        ),
    ],
)
def test_models(name, sizes, rows, measured, tmp_path, capsys):
    status, recorded = _run(tmp_path, name, "--models", "mamba-130m", "transformer-130m", *sizes)
    assert status == 0
    assert [path.name for path in tmp_path.glob("cpu/*")] == ["models.json"]
    assert [(row["model"], row["direction"], row["batch"], row["length"]) for row in recorded] == [
        (model, *row) for model in ("mamba-130m", "transformer-130m") for row in rows
    ]
    about = {"model", "direction", "batch", "length", "mode"} | ({"new_tokens"} if name == "generate" else set())
    for row in recorded:
        assert set(row) == about | measured | ORIGIN
        assert row["commit"] == "abc"
        assert row["mode"] == "eager"
        assert row["tokens_per_s"] > 0
        assert row["peak_gib"] is None
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{key: value for key, value in row.items() if key not in ORIGIN} for row in recorded]


def test_a_tiny_peak_is_not_rounded_away(monkeypatch):
    """Neither that of a model nor that of an operation; a large one has as many digits."""
    operation = operations.Operation(lambda *_: operations.Work(torch.exp, (torch.ones(1),)))
    for nbytes, gib in ((1000, 9.313e-07), (3 * 2**20, 0.00293), (12_345_678_901, 11.5)):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda nbytes=nbytes: nbytes)
        monkeypatch.setattr(operations, "peak_mib", lambda *_, nbytes=nbytes: nbytes / 2**20)
        assert timing.peak_gib("cuda") == gib
        assert operations.Line(operation, "fwd", 2.0, "cpu").measure(1, 1)["peak_gib"] == gib
    assert timing.peak_gib("cpu") is None


def test_rates_of_a_continuation(tmp_path, monkeypatch):
    """Of the tokens after the first in the time after the first, and of all in all of it."""
    monkeypatch.setattr(generating.Reader, "_call", lambda *_: (0.5, 0.25))
    _, (row,) = _run(tmp_path, "generate", "--models", "mamba-130m", "--batch", "3", "--lengths", "4", "--new", "11")
    assert row["tokens_per_s"] == 3 * 10 / 0.25
    assert row["call_tokens_per_s"] == 3 * 11 / 0.75
    assert (row["prefill_ms"], row["step_ms"]) == (500, 25)


def test_lengths_of_the_same_tokens(tmp_path):
    status, rows = _run(tmp_path, "train_length", "--models", "mamba-130m", "--batch", "1", "--lengths", "16", "4")
    assert status == 0
    assert [(row["figure"], row["line"], row["batch"], row["length"]) for row in rows] == [
        ("train_length", "mamba-130m", 4, 4),
        ("train_length", "mamba-130m", 1, 16),
    ]


def test_operations_over_the_length(tmp_path):
    names = ["convolution", "attention", "selective_scan"]
    status, rows = _run(tmp_path, "scan_length", "--models", *names, "--lengths", "8", "4")
    assert status == 0
    assert [(row["line"], row["direction"], row["length"]) for row in rows] == [
        (name, direction, length) for name in names for direction in ("fwd", "fwdbwd") for length in (4, 8)
    ]
    assert all(row["figure"] == "scan_length" and row["ms"] > 0 for row in rows)


def test_every_operation_of_the_figures_is_measured():
    """And again, from the same draw of inputs."""
    for lines in operations.OPERATIONS.values():
        for name, operation in lines.items():
            if name == "ssd":
                # Whose products take Numba a minute to compile.
                continue
            for direction in ("fwdbwd", "fwd"):
                work = operation.work(1, 4, "cpu")
                assert not any(tensor.requires_grad for tensor in work.inputs), name
                operations._call(work, direction)()


def test_convolution_and_attention():
    """The baselines compute what they stand for."""
    x, k = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    y = F.conv1d(F.pad(x, (6, 0)), k.flip(-1)[:, None], groups=3)
    torch.testing.assert_close(operations.convolution(x, k), y, rtol=1e-5, atol=1e-5)
    q, keys, v = torch.randn(3, 1, 2, 5, 4)
    scores = (q @ keys.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(operations.attention(q, keys, v), scores.softmax(-1) @ v)


def test_a_call_that_would_take_long_is_left_out(monkeypatch):
    monkeypatch.setattr(operations, "call_ms", lambda *_: 100.0)
    operation = operations.Operation(lambda batch, length, device: operations.Work(torch.exp, (torch.ones(1),)), 2)
    line = operations.Line(operation, "fwd", 2.0, "cpu")
    assert line.measure(1, 10)["ms"] == 100.0
    assert line.measure(1, 40)["ms"] == 100.0
    # 0.1 s times the square of 5.
    with pytest.raises(LeftOutError, match=r"a call would take 2\.5 s"):
        line.measure(1, 200)


def _experiment(*measures):
    def rows(settings):
        for place, measured in enumerate(measures):
            yield {"place": place}, measured

    return Experiment(rows, Settings(), (), "figures", ("place",))


def _raise(error):
    raise error


def test_a_row_that_fails_does_not_cost_the_others(tmp_path, capsys):
    rows = _experiment(
        lambda: _raise(torch.OutOfMemoryError("no room")),
        lambda: _raise(LeftOutError("long")),
        lambda: {"ms": 1},
    )
    assert experiment.run(rows, Settings(), tmp_path, "abc")
    failing = _experiment(lambda: _raise(RuntimeError("a\nb")), lambda: {"ms": 1})
    assert not experiment.run(failing, Settings(), None, "abc")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("left_out") for row in printed] == ["out of memory", "long", None, "RuntimeError: a b", None]
    recorded = json.loads((tmp_path / "cpu" / "figures.json").read_text(encoding="utf-8"))
    assert [row.get("ms") for row in recorded] == [None, None, 1]


def test_each_row_is_written_before_the_next(tmp_path):
    path = tmp_path / "cpu" / "figures.json"
    rows = _experiment(
        lambda: {"before": path.exists()}, lambda: {"before": len(json.loads(path.read_text(encoding="utf-8")))}
    )
    experiment.run(rows, Settings(), tmp_path, "abc")
    assert [row["before"] for row in json.loads(path.read_text(encoding="utf-8"))] == [False, 1]


def test_no_row_begins_after_the_time(tmp_path, capsys, monkeypatch):
    clock = iter([1.0, 3.0])
    monkeypatch.setattr(experiment.time, "monotonic", lambda: next(clock))
    assert experiment.run(_experiment(dict, dict, dict), Settings(), None, "abc", end=2.0)
    out, err = capsys.readouterr()
    assert out == '{"place": 0}\n'
    assert err == 'bench: the time is over before {"place": 1}\n'


def test_batches_beyond_one_that_did_not_fit_are_not_tried(monkeypatch):
    tried = []

    def generate(reader, batch, length, new_tokens):
        tried.append(batch)
        return {} if batch < 4 else _raise(torch.OutOfMemoryError())

    monkeypatch.setattr(generating.Reader, "_generate", generate)
    settings = Settings(("mamba-130m",), (8, 1, 4), (16,), device="cpu")
    found = [experiment._attempt(measured) for _, measured in generating.inference_batch(settings)]
    assert tried == [1, 4]
    reasons = ["out of memory", "out of memory, as was a batch of 4"]
    assert found == [({}, False), *(({"left_out": reason}, False) for reason in reasons)]


def test_wrong_tokens_are_not_timed(tmp_path, monkeypatch):
    right = Generator.__call__
    monkeypatch.setattr(Generator, "__call__", lambda *given, **named: (right(*given, **named) + 1) % 32)
    status, (row,) = _run(tmp_path, "generate", "--models", "mamba-130m", "--batch", "1", "--lengths", "4")
    assert status == 1
    assert row["left_out"] == "AssertionError: Generator and generate differ in 56 of 56 tokens"


def test_blocks(monkeypatch):
    monkeypatch.setattr(training, "Blocks", lambda: training_blocks(1, 16, 64, 8))
    ((about, measured),) = training.train(Settings((training.BLOCKS,), (1,), (8,), device="cpu"))
    assert about["direction"] == "fwdbwd"
    assert measured()["step_ms"] > 0


training_blocks = training.Blocks


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["naive", "--models", "torch", "--lengths", "4", "--batch", "1", "--images", str(tmp_path / "images")]
    assert _run(tmp_path, *arguments)[0] == 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["naive-cpu.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such"], "EXPERIMENT must be of train, generate, "),
        (
            ["naive", "--models", "mamba-130m"],
            "--models of naive must be of loop, torch, selective_scan, got mamba-130m.",
        ),
        (["train", "--mode", "graph"], "--mode must be eager or compiled on a CPU, got graph."),
        (["train", "--batch", "0"], "a number of at least 1, got 0"),
        (["generate", "--new-tokens", "1"], "a number of at least 2, got 1"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(["models", *arguments, "--device", "cpu"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_transformers(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        bench.main(["models", "naive"])
    assert exit_.value.code == 1
    assert "transformers must be installed, got none. Run pip install 'ssmscan[train]'." in capsys.readouterr().err


def test_defaults_are_what_can_be_measured():
    for name, each in command.EXPERIMENTS.items():
        assert set(each.defaults.models) <= set(each.known), name
        assert each.defaults.batches, name
        assert each.defaults.lengths, name


@pytest.mark.gpu
def test_on_a_device(tmp_path):
    for name, sizes in (("train", ["--mode", "graph"]), ("generate", ["--new-tokens", "9"]), ("prefill", [])):
        arguments = [name, "--models", "mamba2-130m", "transformer-130m", "--batch", "2", "--lengths", "32", *sizes]
        assert bench.main(["models", *arguments, "--device", "cuda", "--out", str(tmp_path), "--commit", "abc"]) == 0
    arguments = ["scan_length", "naive", "--lengths", "64", "128", "--out", str(tmp_path), "--commit", "abc"]
    assert bench.main(["models", *arguments, "--device", "cuda"]) == 0
    rows = [row for path in tmp_path.glob("*/*.json") for row in json.loads(path.read_text(encoding="utf-8"))]
    assert {row["mode"] for row in rows if row.get("direction") == "generate"} == {"graph"}
    assert all(row["peak_gib"] > 0 for row in rows)
