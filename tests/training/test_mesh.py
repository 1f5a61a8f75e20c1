"""How a process finds its place among several, what it refuses, and what it says of the others."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ssmscan import cli
from ssmscan.models import SSMConfig, SSMForCausalLM
from ssmscan.training import MeshConfig, RunError, TrainConfig, UsageError
from ssmscan.training.config import to_yaml
from ssmscan.training.mesh import MeshRanks, joined_mesh
from ssmscan.training.options import train_config, train_parser
from ssmscan.training.ranks import Ranks, device_of, joined

CONFIG = TrainConfig(batch_size=4, device="cpu", mesh=MeshConfig(timeout=20.0))


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        (
            {"mesh": MeshConfig(dp=2)},
            {},
            r"the 1 processes that were started, got 2 · 1 · 1\. Start 2 by .*, or give another --mesh\.",
        ),
        ({"mesh": MeshConfig(cp=3)}, {"WORLD_SIZE": "4"}, "the 4 processes that were started, got 1 · 3 · 1"),
        ({"batch_size": 3}, {"WORLD_SIZE": "2"}, "batch_size must be a multiple of dp = 2, got 3"),
        (
            {"batch_size": 12, "micro_batch_size": 4},
            {"WORLD_SIZE": "2"},
            "micro_batch_size must divide batch_size / dp = 6, got 4",
        ),
        ({"precision": "float16"}, {"WORLD_SIZE": "2"}, "precision must not be float16 on several processes"),
    ],
)
def test_refusals(changes, environment, message, monkeypatch):
    for name, value in ({"RANK": "0"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), joined(replace(CONFIG, **changes)):
        pass


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            MeshConfig(),
            r"where weights are sharded, got true\. Use --mesh\.shard false, where .*, or --cuda_graph false",
        ),
        (MeshConfig(cp=2, shard=False), r"where sequences are split \(cp\), got true"),
    ],
)
def test_what_is_not_recorded(mesh, message):
    config = replace(CONFIG, cuda_graph=True, mesh=mesh)
    with (
        pytest.raises(UsageError, match=f"train: cuda_graph must be false {message}"),
        joined_mesh(config, mesh.sizes(2), torch.device("cuda")),
    ):
        pass


def test_a_model_that_cannot_be_shared(tmp_path):
    """Wrong usage, told in a line, not a failure with its traceback."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        ranks = MeshRanks(torch.device("cpu"), init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
        model = SSMForCausalLM(SSMConfig(vocab_size=5, hidden_size=8, mixers=["s4d"]))
        with pytest.raises(UsageError, match=r'layers must be of GatedSSM, .* on a mesh with "tp", got S4D'):
            ranks.arrange(model, torch.float32)
    finally:
        dist.destroy_process_group()


def test_more_processes_than_devices(monkeypatch):
    """Each process knows of it, the first too."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(CONFIG) == torch.device("cpu")
    with pytest.raises(UsageError, match="processes of a machine must be at most its 2 devices, got 3"):
        device_of(replace(CONFIG, device="cuda"))


def test_a_run_goes_on_with_another_mesh(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(replace(CONFIG, mesh=MeshConfig(dp=2, timeout=7.0))))
    arguments = ["--resume", str(tmp_path), "--mesh.cp", "2", "--mesh.dp", "null"]
    parser = train_parser(arguments)
    config, resume = train_config(arguments, parser.instantiate(parser.parse_args(arguments)))
    assert resume
    assert config == replace(CONFIG, out=str(tmp_path), mesh=MeshConfig(cp=2, timeout=7.0))


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssmscan.training.mesh", None)
    with joined(CONFIG) as ranks:
        assert type(ranks) is Ranks


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[../third_party/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:4321", "one that is gone"),
        ("[gloo/pair.cc:547] Read error [127.0.0.1]:4321: Connection reset by peer", "one that is gone"),
        ("[gloo/pair.cc:331] writev [127.0.0.1]:4321: Broken pipe", "one that is gone"),
        ("NCCL error: unhandled system error, remote process exited or there was a network error", "one that is gone"),
        ("[gloo/unbound_buffer.cc:81] Timed out waiting 20000ms for recv", "one that has not answered for 20 s"),
        (
            "[gloo/device.cc:1] no such interface\nand a trace",
            "one that cannot be reached ([gloo/device.cc:1] no such interface)",
        ),
    ],
)
def test_a_lost_process_is_told_in_words(monkeypatch, said, told):
    """Not in those of the library that has lost it, where they are known."""

    def fail(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(RunError) as raised, joined_mesh(CONFIG, {"dp": 2, "cp": 1, "tp": 1}, torch.device("cpu")):
        pass
    assert str(raised.value).startswith(f"train: all processes must go on, got {told}. Continue with ")


def test_a_failure_of_its_own_is_not_another_process(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with (
        pytest.raises(RuntimeError, match=r"^mat1 and mat2"),
        joined_mesh(CONFIG, {"dp": 2, "cp": 1, "tp": 1}, torch.device("cpu")),
    ):
        pass


@pytest.mark.parametrize(
    ("environment", "tells"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, False),
        # Another machine may lack what the first one has.
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
@pytest.mark.parametrize("arguments", ["--optim.lr fast", "--config absent.yaml", "--mesh.cp 5"])
def test_wrong_usage_is_told_once(monkeypatch, capsys, environment, tells, arguments):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--device", "cpu", *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") == tells
