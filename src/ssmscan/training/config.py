"""Everything that a run can be told, typed, checked, and written down beside its results."""

import json
import math
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

from ssmscan.models import SSMConfig
from ssmscan.shapes import check_integer, error
from ssmscan.tasks import SelectiveCopying, Task


def _require(holds: bool, section: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(error(section, rule, got))


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model, a :class:`ssmscan.models.SSMForCausalLM`.

    Args:
        mixers: the mixer of each layer, first to last: gated_ssm, matrix_ssm, s4d, mamba, mamba2, hydra, rg_lru or
            attention.
        layers: number of layers, through which the names in mixers, one or several, are repeated; null is one layer
            for each name.
        hidden_size: width m of the residual stream (channels).
        mixer_options: arguments of a mixer's class, by its name, as in {mamba2: {d_state: 64}}.
        intermediate_size: width of the gated MLP behind each mixer; 0 is no MLP (channels).
        norm_eps: added to the mean square in every norm.
        tie_word_embeddings: the head's weight is the embedding's.
        initializer_range: standard deviation of the embedding at the start.
    """

    mixers: str | list[str] = field(default_factory=lambda: ["gated_ssm", "gated_ssm"])
    layers: int | None = None
    hidden_size: int = 64
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    intermediate_size: int = 0
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.layers is not None:
            named = 1 if isinstance(self.mixers, str) else len(self.mixers)
            check_integer("model", "layers", self.layers, named)
        self.build(vocab_size=1)

    def build(self, vocab_size: int) -> SSMConfig:
        """The model's config for a task of ``vocab_size`` tokens."""
        mixers = [self.mixers] if isinstance(self.mixers, str) else self.mixers
        fields = asdict(self)
        del fields["layers"]
        fields["mixers"] = mixers if self.layers is None else list(islice(cycle(mixers), self.layers))
        return SSMConfig(vocab_size=vocab_size, **fields)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warmup and a cosine decay.

    Args:
        lr: peak learning rate.
        min_lr: learning rate at the last step, where the cosine ends.
        warmup: linear warmup (steps).
        weight_decay: decoupled weight decay of matrices and embeddings; biases, norms and rates of decay have none.
        betas: decay of Adam's first and second moments (per step).
        clip: largest norm of the gradient; a longer one is scaled down.
    """

    lr: float = 2e-3
    min_lr: float = 1e-5
    warmup: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim", "lr must be positive and finite", self.lr)
        _require(0 <= self.min_lr <= self.lr, "optim", f"min_lr must be 0 to lr = {self.lr}", self.min_lr)
        check_integer("optim", "warmup", self.warmup, 0)
        _require(0 <= self.weight_decay < math.inf, "optim", "weight_decay must be at least 0", self.weight_decay)
        _require(all(0 <= beta < 1 for beta in self.betas), "optim", "betas must be in [0, 1)", self.betas)
        _require(self.clip > 0, "optim", "clip must be positive", self.clip)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Args:
        out: folder for everything that the run leaves.
        overwrite: replace a run that is already in that folder.
        steps: length of the run (steps).
        batch_size: examples in a batch (examples).
        seed: of the weights and of the data.
        target_accuracy: stop once an evaluation reaches it, and fail if none does (fraction of the answer tokens);
            null runs all steps.
        eval_every: between two evaluations (steps).
        eval_examples: in an evaluation, always fresh ones (examples).
        log_every: between two lines of the log (steps).
        save_every: between two checkpoints (steps).
        keep: how many checkpoints stay (checkpoints).
        device: where to run; auto is CUDA when there is a device.
        precision: of the matrix products; auto is bfloat16 autocast on a CUDA device that has it, float32 elsewhere.
        task: what is learned.
        model: its shape.
        optim: the optimizer and its schedule.
    """

    out: str = "runs/train"
    overwrite: bool = False
    steps: int = 2000
    batch_size: int = 64
    seed: int = 0
    target_accuracy: float | None = None
    eval_every: int = 100
    eval_examples: int = 1024
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    task: Task = field(default_factory=SelectiveCopying)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        _require(self.out != "", "train", "out must name a folder", repr(self.out))
        for name in ("steps", "batch_size", "eval_every", "eval_examples", "log_every", "save_every", "keep"):
            check_integer("train", name, getattr(self, name), 1)
        check_integer("train", "seed", self.seed, 0)
        _require(self.seed < 2**63, "train", "seed must be 0 to 2^63 - 1", self.seed)
        if self.target_accuracy is not None:
            _require(0 < self.target_accuracy <= 1, "train", "target_accuracy must be in (0, 1]", self.target_accuracy)


def to_yaml(config: TrainConfig) -> str:
    """``config`` as a YAML file that ``ssmscan train --config`` reads back."""
    import yaml

    # Through JSON, which turns tuples into the lists that YAML knows.
    plain = json.loads(json.dumps(asdict(config)))
    plain["task"] = {"name": config.task.name, **plain["task"]}
    return yaml.safe_dump(plain, sort_keys=False)
