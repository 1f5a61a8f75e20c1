"""What goes between processes for a step of several micro-batches and chunks."""

from datetime import timedelta

import mesh_cases as cases
import pytest
import torch
import torch.distributed as dist
from ranks import Calls, start
from torch.distributed.device_mesh import init_device_mesh

from ssmscan.tasks import Batch
from ssmscan.training import MeshConfig, TrainConfig
from ssmscan.training.mesh import MeshRanks
from ssmscan.training.optim import make_optimizer
from ssmscan.training.step import Step

LAYERS = 3
# How parameters are held, by a name.
HELD = {"shares": {}, "kept": {"reshard": False}, "whole": {"shard": False}}


def _collectives(calls, name):
    """How often one with such a name was called."""
    return sum(n for function, n in calls.counts.items() if function.namespace == "c10d" and name in str(function))


def _worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    device = torch.device("cpu")
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    tokens = torch.randint(12, (4, 13), generator=torch.manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    counted = {}
    for held, options in HELD.items():
        for micro, chunk in ((2, None), (1, None), (1, 6)):
            setting = held, micro, chunk
            config = TrainConfig(batch_size=4, micro_batch_size=micro, chunk=chunk, precision="bfloat16", device="cpu")
            group = MeshRanks(device, mesh, MeshConfig(**options))
            model = group.arrange(cases.build_model(["mamba2"] * LAYERS, torch.float32), torch.bfloat16)
            step = Step(model, make_optimizer(model, config.optim), config, device, group)
            # The first step makes what later ones have.
            step(batch, 1e-3)
            with torch.autograd.set_multithreading_enabled(False), Calls() as calls:
                step(batch, 1e-3)
            names = ("allgather", "reduce_scatter", "allreduce")
            counted[setting] = {name: _collectives(calls, name) for name in names}
    torch.save(counted, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    start(_worker, 2, folder)
    return torch.load(folder / "0.pt")


# Micro-batches and chunks, and how many forwards with a loss they are; each loss is summed over the ranks.
PARTS = [(2, None, 1), (1, None, 2), (1, 6, 4)]


@pytest.mark.parametrize(("micro", "chunk", "losses"), PARTS)
def test_without_resharding_all_travels_once_a_step(counted, micro, chunk, losses):
    """The weights of each block and of the rest, and their gradients, whose norm is summed."""
    once = {"allgather": LAYERS + 1, "reduce_scatter": LAYERS + 1}
    assert counted["kept", micro, chunk] == once | {"allreduce": losses + 1}


@pytest.mark.parametrize(("micro", "chunk", "losses"), PARTS)
def test_without_shards_gradients_alone_travel_once_a_step(counted, micro, chunk, losses):
    assert counted["whole", micro, chunk] == {"allgather": 0, "reduce_scatter": 0, "allreduce": losses + 1}


@pytest.mark.parametrize(("micro", "chunk", "passes", "backwards"), [(2, None, 2, 1), (1, None, 4, 2), (1, 6, 10, 4)])
def test_with_resharding_all_travels_for_every_pass(counted, micro, chunk, passes, backwards):
    """Forward and backward; the rest is given up after a backward only."""
    found = counted["shares", micro, chunk]
    assert found["reduce_scatter"] == backwards * (LAYERS + 1)
    assert found["allgather"] == passes * LAYERS + backwards
