"""Time training steps of whole models on a GPU: how long the device works, and how long the host.

    python benchmarks/models.py mamba2-130m transformer-130m blocks --batch 8 --length 2048

Names are presets, whose step is the one that ``ssmscan train`` makes, under bfloat16 autocast; or ``blocks``, a forward
and backward of 24 times causal_conv1d, ssd, gated_rms_norm and two linear layers, in the sizes of mamba2-130m.

A mode is how the step is launched: by Python (eager), as one CUDA graph, with compiled blocks, or both.

The host's time is that in which it launches a step of one short sequence, so that it never waits for the device; the
device's is about that of a step as a graph.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmscan import causal_conv1d, gated_rms_norm, ssd
from ssmscan.ahead import Recorded
from ssmscan.bench.result import commit, machine, now, replace_rows, versions
from ssmscan.models import SSMForCausalLM, preset
from ssmscan.tasks import Batch
from ssmscan.training import TrainConfig
from ssmscan.training.optim import make_optimizer
from ssmscan.training.step import Step

SHORT = 128
MODES = ("eager", "graph", "compiled", "compiled graph")


class Blocks(nn.Module):
    """The operations of mamba2-130m's layers between two linear ones, 24 times."""

    def __init__(self, layers: int = 24, m: int = 768, d: int = 1536, n: int = 128) -> None:
        super().__init__()
        self.sizes = [d, d + 2 * n, d // 64]
        self.n = n
        self.layers = nn.ModuleList(
            nn.ModuleDict({"inward": nn.Linear(m, sum(self.sizes), bias=False), "outward": nn.Linear(d, m, bias=False)})
            for _ in range(layers)
        )
        self.taps = nn.ParameterList(torch.randn(self.sizes[1], 4) / 4 for _ in range(layers))
        self.A = nn.ParameterList(-torch.rand(self.sizes[2]) for _ in range(layers))
        self.scale = nn.ParameterList(torch.ones(d) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            z, u, dt = layer["inward"](x).split(self.sizes, -1)  # type: ignore[index]
            u, _ = causal_conv1d(u, self.taps[i], activation="silu")
            u, B, C = u.split([self.sizes[0], self.n, self.n], -1)
            heads = u.unflatten(-1, (-1, 64))
            y, _ = ssd(heads, dt, self.A[i], B[:, :, None], C[:, :, None], dt_softplus=True)
            x = x + layer["outward"](gated_rms_norm(y.flatten(-2), self.scale[i], z))  # type: ignore[index]
        return x


def blocks_steps(mode: str) -> Callable[[int, int], Callable[[], object]]:
    """From batch and length to a forward and backward of :class:`Blocks`."""
    model = Blocks().cuda()
    if mode.startswith("compiled"):
        model.compile()

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    launch = Recorded(step, torch.device("cuda")) if mode.endswith("graph") else step

    def step_of(batch: int, length: int) -> Callable[[], object]:
        x = torch.randn(batch, length, 768, device="cuda")
        return lambda: launch(x)

    return step_of


def training_steps(name: str, batch: int, mode: str, checkpointing: bool) -> Callable[[int, int], Callable[[], object]]:
    """From batch and length to what a run does for one batch: forward, backward, clip and AdamW, in bfloat16."""
    model = SSMForCausalLM(preset(name)).train()
    nn.Module.cuda(model)
    config = TrainConfig(
        batch_size=batch,
        precision="bfloat16",
        compile=mode.startswith("compiled"),
        cuda_graph=mode.endswith("graph"),
        gradient_checkpointing=checkpointing,
    )
    update = Step(model, make_optimizer(model, config.optim), config, torch.device("cuda"))

    def step_of(batch: int, length: int) -> Callable[[], object]:
        tokens = torch.randint(model.config.vocab_size, (batch, length + 1))
        return lambda: update(Batch(tokens[:, :-1], tokens[:, 1:]), 1e-4)

    return step_of


def wall_ms(step: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 3 * 1e3)
    return statistics.median(times)


def host_ms(step: Callable[[], object], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure(name: str, batch: int, length: int, mode: str, checkpointing: bool) -> dict[str, object]:
    step_of = blocks_steps(mode) if name == "blocks" else training_steps(name, batch, mode, checkpointing)
    short, step = step_of(1, SHORT), step_of(batch, length)
    for _ in range(6):
        short()
    host = host_ms(short)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(6):
        step()
    whole = wall_ms(step, 7)
    return {
        "model": name,
        "direction": "fwdbwd" if name == "blocks" else "train",
        "batch": batch,
        "length": length,
        "mode": mode,
        "tokens_per_s": round(batch * length / whole * 1e3),
        "step_ms": round(whole, 2),
        "host_ms": round(host, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=MODES, help="(default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument("--out", type=Path, help="folder of <gpu>/models.json, whose rows of these models are replaced")
    parser.add_argument("--commit", help="commit to record; without it, git is asked")
    given = parser.parse_args()
    rows = []
    for name, batch, mode in product(given.models, given.batch, given.mode):
        row = measure(name, batch, given.length, mode, given.checkpointing)
        print(json.dumps(row))
        rows.append({**row, "commit": given.commit or commit(), "torch": versions()[0], "date": now()})
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
    if given.out is not None:
        path = given.out / machine("cuda") / "models.json"
        replace_rows(path, rows, ("model", "direction", "batch", "length", "mode"))


if __name__ == "__main__":
    main()
