"""A run that takes a second, and what of its log does not depend on the clock."""

import json

from ssmscan.tasks import SelectiveCopying
from ssmscan.training import ModelConfig, OptimConfig, TrainConfig

TINY = TrainConfig(
    steps=20,
    batch_size=4,
    eval_every=10,
    eval_tokens=42,
    log_every=1,
    save_every=10,
    device="cpu",
    task=SelectiveCopying(symbols=3, data_tokens=2, length=5),
    model=ModelConfig(mixers="gated_ssm", layers=2, hidden_size=8, mixer_options={"gated_ssm": {"expand": 2}}),
    optim=OptimConfig(warmup=5),
)


def log_of(folder):
    """The lines of a run's log, without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "mfu", "peak_gib")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]
