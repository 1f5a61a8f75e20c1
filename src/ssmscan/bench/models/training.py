"""Training steps of whole models: how long the device works, and how long the host.

A preset's step is the one that ``ssmscan train`` makes, under bfloat16 autocast on a GPU. ``blocks`` is a forward and
backward of 24 times causal_conv1d, ssd, gated_rms_norm and two linear layers, in the sizes of mamba2-130m.

A mode is how the step is launched: by Python (eager), as one CUDA graph, with compiled blocks, or both. The host's time
is that in which it launches a step of one short sequence, so that it never waits for the device; the device's is about
that of a step as a graph.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from ssmscan import causal_conv1d, gated_rms_norm, ssd
from ssmscan.ahead import Recorded
from ssmscan.bench.models.experiment import Planned, Row, Settings
from ssmscan.bench.models.timing import forget_peak, host_ms, peak_gib, step_ms
from ssmscan.models import SSMForCausalLM, preset
from ssmscan.tasks import Batch
from ssmscan.training import TrainConfig
from ssmscan.training.optim import make_optimizer
from ssmscan.training.step import Step, autocast

# Tokens of the sequence by which the host is timed.
SHORT = 128
MODES = ("eager", "graph", "compiled", "compiled graph")
BLOCKS = "blocks"

StepOf = Callable[[int, int], Callable[[], object]]


class Blocks(nn.Module):
    """The operations of mamba2-130m's layers between two linear ones, 24 times."""

    def __init__(self, layers: int = 24, m: int = 768, d: int = 1536, n: int = 128) -> None:
        super().__init__()
        self.m, self.n = m, n
        self.sizes = [d, d + 2 * n, d // 64]
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


def build(name: str, device: str) -> SSMForCausalLM:
    """A preset's model with weights drawn on the device."""
    with torch.device(device):
        return SSMForCausalLM(preset(name))


def blocks_steps(mode: str, device: torch.device) -> StepOf:
    """From batch and length to a forward and backward of :class:`Blocks`."""
    with device:
        model = Blocks()
    if mode.startswith("compiled"):
        model.compile()

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        with autocast("auto", device):
            loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    launch = Recorded(step, device) if mode.endswith("graph") else step

    def step_of(batch: int, length: int) -> Callable[[], object]:
        x = torch.randn(batch, length, model.m, device=device)
        return lambda: launch(x)

    return step_of


def training_steps(name: str, batch: int, mode: str, checkpointing: bool, device: torch.device) -> StepOf:
    """From batch and length to what a run does for one batch: forward, backward, clip and AdamW."""
    model = build(name, device.type).train()
    config = TrainConfig(
        batch_size=batch,
        compile=mode.startswith("compiled"),
        cuda_graph=mode.endswith("graph"),
        gradient_checkpointing=checkpointing,
    )
    update = Step(model, make_optimizer(model, config.optim), config, device)

    def step_of(batch: int, length: int) -> Callable[[], object]:
        tokens = torch.randint(model.config.vocab_size, (batch, length + 1))
        return lambda: update(Batch(tokens[:, :-1], tokens[:, 1:]), 1e-4)

    return step_of


def forward_steps(name: str, device: torch.device) -> StepOf:
    """From batch and length to the forward of a training step, with its loss, and with all that a backward needs."""
    model = build(name, device.type).train()

    def step_of(batch: int, length: int) -> Callable[[], object]:
        tokens = torch.randint(model.config.vocab_size, (batch, length + 1), device=device)

        def forward() -> None:
            with autocast("auto", device):
                model(tokens[:, :-1], shift_labels=tokens[:, 1:], return_logits=False)

        return forward

    return step_of


def measure(steps: Callable[[], StepOf], batch: int, length: int, device: str) -> Row:
    """The rate of a step, the time that the host takes to launch one, and the memory."""
    step_of = steps()
    host = host_ms(step_of(1, min(SHORT, length)), device)
    forget_peak(device)
    whole = step_ms(step_of(batch, length), device)
    return {
        "tokens_per_s": round(batch * length / whole * 1e3),
        "step_ms": round(whole, 2),
        "host_ms": round(host, 2),
        "peak_gib": peak_gib(device),
    }


def _steps_of(name: str, batch: int, mode: str, settings: Settings) -> Callable[[], StepOf]:
    device = torch.device(settings.device)
    if name == BLOCKS:
        return partial(blocks_steps, mode, device)
    return partial(training_steps, name, batch, mode, settings.checkpointing, device)


def train(settings: Settings) -> Iterator[Planned]:
    """Training steps of every model, batch, length and mode."""
    for name, batch, length, mode in product(settings.models, settings.batches, settings.lengths, settings.modes):
        direction = "fwdbwd" if name == BLOCKS else "train"
        about = {"model": name, "direction": direction, "batch": batch, "length": length, "mode": mode}
        steps = _steps_of(name, batch, mode, settings)
        yield about, partial(measure, steps, batch, length, settings.device)


def train_length(settings: Settings) -> Iterator[Planned]:
    """Training steps of as many tokens at every length as a batch of the longest has."""
    for name, mode in product(settings.models, settings.modes):
        tokens = max(settings.batches) * max(settings.lengths)
        for length in sorted(settings.lengths):
            batch = tokens // length
            line = name if mode == "eager" else f"{name} ({mode})"
            about = {"figure": "train_length", "line": line, "direction": "train", "batch": batch, "length": length}
            steps = _steps_of(name, batch, mode, settings)
            yield {**about, "mode": mode}, partial(measure, steps, batch, length, settings.device)
