"""Everything that a run can be told, typed, checked, and written down beside its results."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any, Literal, cast

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
class MeshConfig:
    """How the processes that torchrun starts share a run, dp · cp · tp of them.

    Args:
        dp: each has sequences of its own; null is all processes that the others leave.
        cp: each has a stretch of the same sequences.
        tp: each has a part of every layer.
        shard: whether those of dp and cp have a share each of weights, gradients and AdamW's moments. If not, each has
            all, 16 bytes a parameter, and gradients are summed once a step.
        reshard: whether with shard a process gives up the weights of others as soon as a layer is done with them, and
            sums gradients after every backward. If not, both travel once a step, however many micro-batches and chunks
            it has, for which each process holds all of them meanwhile: 6 bytes a parameter under bfloat16.
        timeout: a process that does not answer for so long is given up, and the run ends (seconds).
    """

    dp: int | None = None
    cp: int = 1
    tp: int = 1
    shard: bool = True
    reshard: bool = True
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("dp", "cp", "tp"):
            if getattr(self, name) is not None:
                check_integer("mesh", name, getattr(self, name), 1)
        _require(0 < self.timeout < math.inf, "mesh", "timeout must be positive and finite", self.timeout)

    def sizes(self, processes: int) -> dict[str, int]:
        """The ranks along each dimension for so many processes; ValueError where they do not fit."""
        others = self.cp * self.tp
        dp = max(processes // others, 1) if self.dp is None else self.dp
        rule = f"dp · cp · tp must be the {processes} processes that were started"
        command = f"torchrun --nproc-per-node {dp * others} -m ssmscan train …"
        advice = f"Start {dp * others} by {command}, or give another --mesh."
        if dp * others != processes:
            raise ValueError(error("mesh", rule, f"{dp} · {self.cp} · {self.tp}", advice))
        return {"dp": dp, "cp": self.cp, "tp": self.tp}


@dataclass(frozen=True)
class Target:
    """What a run is to reach, as in "accuracy >= 0.99" or "loss <= 1.5".

    Args:
        measure: name of what the task measures.
        direction: ">=" or "<=".
        bound: the value to reach, in the measure's unit.
    """

    measure: str
    direction: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """The target that ``text`` states; ValueError where it states none."""
        found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\S+)\s*", text)
        try:
            target = None if found is None else cls(found[1], found[2], float(found[3]))
        except ValueError:
            target = None
        _require(
            target is not None and math.isfinite(target.bound),
            "train",
            "target must be a measure, >= or <=, and a number, as in accuracy >= 0.99",
            repr(text),
        )
        return cast(Target, target)

    def reached(self, measures: Mapping[str, float]) -> bool:
        value = measures[self.measure]
        return value >= self.bound if self.direction == ">=" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.measure} {self.direction} {self.bound:g}"


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Args:
        out: folder for everything that the run leaves.
        overwrite: replace a run that is already in that folder.
        steps: length of the run (steps).
        batch_size: of a step, which makes one update, over all processes (examples).
        micro_batch_size: how many of them go through the model at once in a process, their gradients added up; null is
            all (examples).
        chunk: tokens of a sequence that go through the model at once, over all processes of cp; the states are carried
            from chunk to chunk and the gradients back, so that memory no longer grows with the length; null is all
            (tokens).
        truncate: let no gradient pass from one chunk to the one before, which is a quarter faster.
        seed: of the weights and of the data.
        target: stop once an evaluation reaches it, and fail if none does, as in "accuracy >= 0.99"; null runs all
            steps.
        eval_every: between two evaluations (steps).
        eval_tokens: in an evaluation, which takes the same examples each time: as many whole ones as have so many
            tokens, one at least, and no more than the task holds out (tokens).
        log_every: between two lines of the log (steps).
        save_every: between two checkpoints (steps).
        save_minutes: after so long there is a checkpoint whatever save_every says; null is never (minutes).
        keep: how many checkpoints stay (checkpoints).
        device: where to run; auto is CUDA when there is a device.
        precision: of the matrix products, by autocast; float16 scales the loss against underflow; auto is bfloat16 on
            a CUDA device that has it, float32 elsewhere.
        compile: compile each block by torch.compile; the first steps take a minute longer.
        cuda_graph: record a whole step on the device once and replay it, which frees a small step from the host.
        gradient_checkpointing: compute each block again in the backward, which saves most of the memory of activations.
        mesh: how several processes share the run.
        wandb: project of Weights & Biases that gets what TensorBoard gets; null is none.
        task: what is learned.
        model: the shape of the model.
        optim: the optimizer and its schedule.
    """

    out: str = "runs/train"
    overwrite: bool = False
    steps: int = 2000
    batch_size: int = 64
    micro_batch_size: int | None = None
    chunk: int | None = None
    truncate: bool = False
    seed: int = 0
    target: str | None = None
    eval_every: int = 100
    eval_tokens: int = 65536
    log_every: int = 10
    save_every: int = 500
    save_minutes: float | None = None
    keep: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False
    cuda_graph: bool = False
    gradient_checkpointing: bool = False
    mesh: MeshConfig = field(default_factory=MeshConfig)
    wandb: str | None = None
    task: Task = field(default_factory=SelectiveCopying)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        _require(self.out != "", "train", "out must name a folder", repr(self.out))
        for name in ("steps", "batch_size", "eval_every", "eval_tokens", "log_every", "save_every", "keep"):
            check_integer("train", name, getattr(self, name), 1)
        check_integer("train", "seed", self.seed, 0)
        _require(self.seed < 2**63, "train", "seed must be 0 to 2^63 - 1", self.seed)
        if self.micro_batch_size is not None:
            check_integer("train", "micro_batch_size", self.micro_batch_size, 1)
            rule = f"micro_batch_size must divide batch_size = {self.batch_size}"
            _require(self.batch_size % self.micro_batch_size == 0, "train", rule, self.micro_batch_size)
        if self.chunk is not None:
            check_integer("train", "chunk", self.chunk, 1)
            # A compiled block saves the state that it then overwrites.
            for name in ("gradient_checkpointing", "cuda_graph", "compile"):
                _require(not getattr(self, name), "train", f"{name} must be false with chunk", "true")
        _require(self.chunk is not None or not self.truncate, "train", "truncate must be false without chunk", "true")
        if self.save_minutes is not None:
            _require(self.save_minutes > 0, "train", "save_minutes must be positive", self.save_minutes)
        if self.target is not None:
            Target.parse(self.target)

    @property
    def at_once(self) -> int:
        """Examples that go through the model at once in a process, or as many as it has."""
        return self.micro_batch_size or self.batch_size


def plain(config: TrainConfig) -> dict[str, Any]:
    """``config`` in dictionaries, lists, numbers and strings."""
    # Through JSON, which turns tuples into the lists that YAML knows.
    fields = json.loads(json.dumps(asdict(config)))
    return fields | {"task": {"name": config.task.name, **fields["task"]}}


def to_yaml(config: TrainConfig) -> str:
    """``config`` as a YAML file that ``ssmscan train --config`` reads back."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False)
