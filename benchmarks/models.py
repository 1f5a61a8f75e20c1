"""Time a forward and backward of whole models on a GPU: how long the device works, and how long the host.

    python benchmarks/models.py mamba2-130m transformer-130m blocks --batch 8 --length 2048

Names are presets, or ``blocks``: 24 times causal_conv1d, ssd, gated_rms_norm and two linear layers, in the sizes of
mamba2-130m, with nothing around them. Under bfloat16 autocast, with the cross entropy of next tokens, no optimizer.

The device's time is that of a CUDA graph's replay of the step. The host's time is that in which it launches a step of
one short sequence, so that it never waits for the device.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmscan import causal_conv1d, gated_rms_norm, ssd
from ssmscan.bench.result import commit, machine, now, versions

SHORT = 128


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


def make(name: str, checkpointing: bool) -> tuple[nn.Module, Callable[[int, int], Callable[[], Tensor]]]:
    """A model on the GPU, and from batch and length a function of its loss."""
    if name == "blocks":
        model: nn.Module = Blocks().cuda()

        def loss_of(batch: int, length: int) -> Callable[[], Tensor]:
            x = torch.randn(batch, length, 768, device="cuda")
            return lambda: model(x).square().mean()

        return model, loss_of
    from ssmscan.models import SSMForCausalLM, preset

    lm = SSMForCausalLM(preset(name)).train()
    nn.Module.cuda(lm)
    if checkpointing:
        lm.gradient_checkpointing_enable()

    def loss_of_tokens(batch: int, length: int) -> Callable[[], Tensor]:
        tokens = torch.randint(lm.config.vocab_size, (batch, length), device="cuda")

        def loss() -> Tensor:
            logits = lm(tokens, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

        return loss

    return lm, loss_of_tokens


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            value = loss()
        value.backward()

    return step


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


def device_ms(step: Callable[[], None]) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return wall_ms(graph.replay, 5)


def measure(name: str, batch: int, length: int, checkpointing: bool) -> dict[str, object]:
    model, loss_of = make(name, checkpointing)
    short = step_of(model, loss_of(1, SHORT))
    for _ in range(5):
        short()
    host = host_ms(short)
    step = step_of(model, loss_of(batch, length))
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    whole = wall_ms(step, 7)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "model": name,
        "direction": "fwdbwd",
        "batch": batch,
        "length": length,
        "mode": "eager",
        "tokens_per_s": round(batch * length / whole * 1e3),
        "step_ms": round(whole, 2),
        "host_ms": round(host, 2),
        "device_ms": round(device_ms(step), 2),
        "peak_gib": round(peak, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument("--out", type=Path, help="folder of <gpu>/models.json, whose rows of these models are replaced")
    parser.add_argument("--commit", help="commit to record; without it, git is asked")
    given = parser.parse_args()
    rows = []
    for name in given.models:
        row = measure(name, given.batch, given.length, given.checkpointing)
        print(json.dumps(row))
        rows.append({**row, "commit": given.commit or commit(), "torch": versions()[0], "date": now()})
        torch.cuda.empty_cache()
    if given.out is not None:
        path = given.out / machine("cuda") / "models.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        key = ("model", "direction", "batch", "length", "mode")
        new = {tuple(row[name] for name in key) for row in rows}
        kept = [row for row in kept if tuple(row[name] for name in key) not in new]
        path.write_text(json.dumps(kept + rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
