"""Time operations and models that several GPUs share, each GPU a process of torchrun.

    torchrun --nproc-per-node 4 benchmarks/distributed.py links
    torchrun --nproc-per-node 4 benchmarks/distributed.py scan ssd selective_scan --per-rank 65536 524288
    torchrun --nproc-per-node 4 benchmarks/distributed.py scan ssd --length 1048576
    torchrun --nproc-per-node 4 benchmarks/distributed.py model mamba2-130m --length 1048576 --chunk 262144 --mesh cp=4
    torchrun --nproc-per-node 4 benchmarks/distributed.py model mamba2-1.3b --length 2048 --batch 32 --mesh dp=4

``links`` is the copy rate of a GPU and the rate of an all-reduce, ``scan`` a forward and backward of one operation in
the sizes of a 130M model, ``model`` what ``ssmscan train`` does for one batch. A time is that of the slowest process,
and bytes are what each process gives to collectives. Every call is short, and its row is written as soon as it is
measured; on one process it is what one GPU does, which the others are compared with.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ssmscan import selective_scan, ssd
from ssmscan.bench.measure import COPY_BYTES, copy_gbps
from ssmscan.bench.models.timing import WARM_UP, forget_peak, peak_gib, settle
from ssmscan.bench.result import commit, machine, now, replace_rows, versions
from ssmscan.bench.sent import Sent
from ssmscan.distributed import context_parallel
from ssmscan.models import SSMForCausalLM, preset
from ssmscan.tasks import Batch
from ssmscan.training import MeshConfig, TrainConfig
from ssmscan.training.clock import flops_per_token
from ssmscan.training.mesh import MeshRanks
from ssmscan.training.optim import make_optimizer
from ssmscan.training.ranks import Ranks
from ssmscan.training.step import Step, product_dtype

# What tells one row from another.
KEY = ("experiment", "case", "gpus", "mesh", "batch", "length", "chunk", "checkpointing", "weights", "graph")
# A model that a CPU can try, in place of the named one.
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "vocab_size": 64,
    "mixers": ["mamba2"] * 2,
    "mixer_options": {"mamba2": {"headdim": 16}},
}


def slowest_ms(step: Callable[[], object], repeats: int, device: torch.device, warm_up: int = 2) -> float:
    """The median of ``repeats`` calls that all processes begin together, in the process that takes longest."""
    times = []
    for i in range(warm_up + repeats):
        # On the CPU, by gloo.
        dist.all_reduce(torch.zeros(1))
        settle(device.type)
        start = time.perf_counter()
        step()
        settle(device.type)
        if i >= warm_up:
            times.append(1e3 * (time.perf_counter() - start))
    slowest = torch.tensor(times, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def links(device: torch.device, size: int) -> dict[str, Any]:
    """The copy rate within a device, and of an all-reduce between all: its rate on a ring's links, and its latency."""
    ranks, data = dist.get_world_size(), torch.ones(size // 4, device=device)
    small = torch.ones(1024, device=device)
    whole = slowest_ms(lambda: dist.all_reduce(data), 5, device)
    tiny = slowest_ms(lambda: dist.all_reduce(small), 5, device)
    return {
        "copy_gbps": round(copy_gbps(device.type)),
        "all_reduce_ms": round(whole, 3),
        "all_reduce_gbps": round(2 * (ranks - 1) / ranks * size / whole / 1e6, 1),
        "all_reduce_4k_ms": round(tiny, 4),
    }


def scan_inputs(name: str, l: int, device: torch.device, tiny: bool) -> tuple[Any, dict[str, Any]]:
    """An operation and arguments for ``l`` tokens, as a layer of its 130M model makes them."""
    d, n, p = (32, 8, 16) if tiny else (1536, 128, 64)
    bf16 = torch.float32 if tiny else torch.bfloat16

    def draw(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    if name == "ssd":
        h = d // p
        A = (-torch.rand(h, device=device) - 1).requires_grad_()
        given = {"x": draw(1, l, h, p), "dt": draw(1, l, h), "A": A, "B": draw(1, l, 1, n), "C": draw(1, l, 1, n)}
        return ssd, given
    A = (-torch.rand(d, 16, device=device) - 1).requires_grad_()
    given = {"x": draw(1, l, d), "dt": draw(1, l, d), "A": A, "B": draw(1, l, 16), "C": draw(1, l, 16)}
    return selective_scan, given


def scan(name: str, length: int, device: torch.device, repeats: int, tiny: bool) -> dict[str, Any]:
    """A forward and backward over ``length`` tokens, of which each process has its part."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    own = (rank + 1) * length // ranks - rank * length // ranks
    operation, tensors = scan_inputs(name, own, device, tiny)
    options: dict[str, Any] = {"dt_softplus": True, "dt_bias": torch.full(tensors["dt"].shape[2:], -4.0, device=device)}
    dy = torch.randn_like(tensors["x"])

    def step() -> None:
        if ranks == 1:
            y, _ = operation(**tensors, **options)
        else:
            y, _ = context_parallel(operation, **tensors, **options)
        torch.autograd.grad(y, list(tensors.values()), dy)

    return measured(step, repeats, device, length)


def measured(
    step: Callable[[], object], repeats: int, device: torch.device, tokens: int, warm_up: int = 2
) -> dict[str, Any]:
    """Time, tokens in a second, memory and what goes between the processes of a step over so many tokens."""
    forget_peak(device.type)
    ms = slowest_ms(step, repeats, device, warm_up)
    peak = peak_gib(device.type)
    # In one thread, the modes of which a backward has too.
    with torch.autograd.set_multithreading_enabled(False), Sent() as sent:
        step()
    row = {"ms": round(ms, 3), "tokens_per_s": round(tokens / ms * 1e3)}
    row |= {"collectives": len(sent.bytes), "sent_bytes": sum(sent.bytes)}
    return row if peak is None else {**row, "peak_gib": peak}


def model(
    name: str, length: int, sizes: dict[str, int], given: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """The step of a training run: forward, backward, clip and AdamW, under bfloat16 autocast on a GPU."""
    config = TrainConfig(
        batch_size=given.batch,
        micro_batch_size=given.micro_batch,
        chunk=given.chunk,
        gradient_checkpointing=given.checkpointing,
        cuda_graph=given.graph,
        precision="auto",
    )
    torch.manual_seed(0)
    with torch.device(device):
        made = SSMForCausalLM(preset(name, **(TINY if given.tiny else {}))).train()
    flops = flops_per_token(made, length)
    parameters = made.num_parameters()
    mesh = {name: size for name, size in sizes.items() if size > 1}
    ranks: Ranks = Ranks(device)
    if mesh:
        joined = init_device_mesh(device.type, tuple(mesh.values()), mesh_dim_names=tuple(mesh))
        ranks = MeshRanks(
            device, joined, MeshConfig(shard=given.weights != "copies", reshard=given.weights == "shares")
        )
    made = ranks.arrange(made, product_dtype(config.precision, device))
    update = Step(made, make_optimizer(made, config.optim), config, device, ranks)
    tokens = torch.randint(made.config.vocab_size, (given.batch, length + 1), generator=torch.manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    warm_up = WARM_UP if given.graph else 2
    row = measured(lambda: update(batch, 1e-5), given.repeats, device, given.batch * length, warm_up)
    if given.graph:
        # Nobody sees what a graph sends.
        del row["collectives"], row["sent_bytes"]
    row["tflops_per_gpu"] = round(row["tokens_per_s"] * flops / dist.get_world_size() / 1e12, 1)
    return {**row, "parameters": parameters}


def sizes_of(text: str, processes: int) -> dict[str, int]:
    """The ranks along each dimension, as in "dp=2,cp=2"."""
    named = dict(part.split("=") for part in text.split(",")) if text else {}
    sizes = {name: int(named.pop(name, 1)) for name in ("dp", "cp", "tp")}
    if named or sizes["dp"] * sizes["cp"] * sizes["tp"] != processes:
        raise SystemExit(f"distributed: --mesh must name dp, cp and tp for the {processes} processes, got {text!r}.")
    return sizes


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("links", "scan", "model"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="ssd and selective_scan; of models, presets")
    parser.add_argument("--length", type=int, nargs="+", default=[], help="of a sequence (tokens)")
    parser.add_argument("--per-rank", type=int, nargs="+", default=[], help="and for each process (tokens)")
    parser.add_argument("--batch", type=int, default=1, help="of a model's step (sequences; default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, help="at once in a process (sequences; default: all)")
    parser.add_argument("--mesh", default="", help="of a model, as in dp=2,cp=2 (default: one process)")
    parser.add_argument("--chunk", type=int, help="of a sequence at once in all processes (tokens; default: all)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument(
        "--weights",
        choices=("shares", "gathered", "copies"),
        default="shares",
        help="each process keeps a share of them, the same and all of them for a step, or all (default: %(default)s)",
    )
    parser.add_argument("--graph", action="store_true", help="launch a step as one CUDA graph")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of <gpu>x<count>/distributed.json, whose row is replaced")
    parser.add_argument("--commit", help="commit to record; without it, git is asked")
    parser.add_argument("--tiny", action="store_true", help="sizes for a try on the CPU, which is then taken")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    on_gpu = torch.cuda.is_available() and not given.tiny
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=300))
    if given.experiment == "links":
        record(given, {}, links(device, 2**20 if given.tiny else COPY_BYTES["cuda"]))
    lengths = [*given.length, *(length * dist.get_world_size() for length in given.per_rank)]
    for name, length in product(given.names, lengths):
        if given.experiment == "scan":
            case = {"case": name, "mesh": f"cp={dist.get_world_size()}", "batch": 1, "length": length}
            row = scan(name, length, device, given.repeats, given.tiny)
        else:
            sizes = sizes_of(given.mesh, dist.get_world_size())
            case = {"case": name, "mesh": given.mesh, "batch": given.batch, "length": length}
            case |= {"chunk": given.chunk, "checkpointing": given.checkpointing}
            case |= {"weights": given.weights, "graph": given.graph}
            row = model(name, length, sizes, given, device)
        record(given, case, row)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def record(given: argparse.Namespace, case: dict[str, Any], row: dict[str, Any]) -> None:
    """Print a row and write it down, in the first process."""
    if dist.get_rank() > 0:
        return
    source = {"commit": given.commit or commit(), "torch": versions()[0], "date": now()}
    everything = {"experiment": given.experiment, "gpus": dist.get_world_size(), **case, **row, **source}
    whole = {**dict.fromkeys(KEY), **everything}
    print(json.dumps(whole), flush=True)
    if given.out is not None:
        gpu = torch.cuda.is_available() and not given.tiny
        folder = f"{machine('cuda')}x{torch.cuda.device_count()}" if gpu else machine("cpu")
        replace_rows(given.out / folder / "distributed.json", [whole], KEY)


if __name__ == "__main__":
    main()
