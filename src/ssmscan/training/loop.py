"""The training loop, read from top to bottom."""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from ssmscan.models import LanguageModel
from ssmscan.shapes import error
from ssmscan.tasks import IGNORE, Task, accuracy
from ssmscan.training import checkpoint
from ssmscan.training.config import TrainConfig
from ssmscan.training.errors import RunError, UsageError
from ssmscan.training.folder import claimed, naming, replace_text
from ssmscan.training.optim import learning_rate, make_optimizer
from ssmscan.training.report import Report, plot


@dataclass(frozen=True)
class Metrics:
    """The end of a run, as metrics.json holds it; ``accuracy`` and ``loss`` are of the last evaluation."""

    accuracy: float
    loss: float
    steps: int
    seconds: float
    target_accuracy: float | None
    parameters: int
    device: str
    versions: dict[str, str]


def train(config: TrainConfig, resume: bool = False) -> Metrics:
    """Run ``config``, or continue the run in its folder.

    Args:
        config: the run.
        resume: continue from the newest complete checkpoint in ``config.out``. On the CPU the result is that of a run
            never interrupted, bit for bit.

    Returns:
        the final metrics. The folder ``config.out`` then holds config.yaml, log.jsonl, metrics.json, curves.png,
        model.safetensors, checkpoints and a TensorBoard log.

    Raises:
        UsageError: the folder is taken or the device missing. Nothing was written.
        RunError: the loss or its gradient is not finite (the update is not made), or the target was not reached.

    Example:
        >>> from ssmscan.training import TrainConfig, train
        >>> config = TrainConfig(out="runs/first", steps=200)
        >>> metrics = train(config)  # doctest: +SKIP
    """
    device = _device(config)
    task = config.task.build()
    torch.manual_seed(config.seed)
    model = LanguageModel(task.vocab_size, config.model).to(device)
    optimizer = make_optimizer(model, config.optim)
    with claimed(config, resume) as folder:
        step, seconds = checkpoint.load(folder / "checkpoints", model, optimizer) if resume else (0, 0.0)
        with Report(folder, config, step) as report:
            began = time.perf_counter() - seconds
            last = report.newest("eval")
            busy, seen = 0.0, 0
            while step < config.steps:
                started = time.perf_counter()
                tokens, targets = task.batch(config.batch_size, config.seed, step, "train").to(device)
                rate = learning_rate(step, config.steps, config.optim)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with _autocast(config, device):
                    loss = _loss(model(tokens), targets)
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip).item()
                if not math.isfinite(loss.item()) or not math.isfinite(norm):
                    raise RunError(
                        f"train: loss must be finite, got {loss.item():g} with a gradient of norm {norm:g} at step "
                        f"{step + 1}. The update was not made; try a smaller --optim.lr."
                    )
                optimizer.step()
                step += 1
                busy += time.perf_counter() - started
                seen += tokens.numel()

                report.advance(step)
                if step % config.log_every == 0:
                    report.training(
                        step,
                        loss=loss.item(),
                        lr=rate,
                        grad_norm=norm,
                        tokens_per_second=seen / busy,
                        seconds=time.perf_counter() - began,
                    )
                    busy, seen = 0.0, 0
                if step % config.eval_every == 0:
                    last = report.evaluation(
                        step, *evaluate(model, task, config, step, device), time.perf_counter() - began
                    )
                    if config.target_accuracy is not None and last["accuracy"] >= config.target_accuracy:
                        break
                if step % config.save_every == 0:
                    checkpoint.save(
                        folder / "checkpoints", step, model, optimizer, time.perf_counter() - began, config.keep
                    )

            if last is None or last["step"] != step:
                last = report.evaluation(
                    step, *evaluate(model, task, config, step, device), time.perf_counter() - began
                )
            metrics = Metrics(
                accuracy=last["accuracy"],
                loss=last["loss"],
                steps=step,
                seconds=time.perf_counter() - began,
                target_accuracy=config.target_accuracy,
                parameters=sum(p.numel() for p in model.parameters()),
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                versions={"python": platform.python_version()}
                | {package: version(package) for package in ("ssmscan", "torch", "numpy")},
            )
            with naming(folder / "model.safetensors"):
                save_model(model, str(folder / "model.safetensors"))
            plot(folder / "curves.png", _title(config), report.lines, config.target_accuracy)
            # The last file, for it marks the run as finished.
            replace_text(folder / "metrics.json", json.dumps(asdict(metrics), indent=2) + "\n")
            print(f"\n{_example(model, task, config, device)}\n", flush=True)
    if config.target_accuracy is not None and metrics.accuracy < config.target_accuracy:
        raise RunError(
            f"train: accuracy must reach {config.target_accuracy:g}, got {metrics.accuracy:.4f} after {step} steps. "
            "Train longer (--steps), or see log.jsonl for where it stalled."
        )
    return metrics


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, config: TrainConfig, step: int, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy over ``config.eval_examples`` examples that no other evaluation of the run uses."""
    model.eval()
    examples = config.eval_examples
    sizes = [min(config.batch_size, examples - first) for first in range(0, examples, config.batch_size)]
    loss, right = 0.0, 0.0
    for i, size in enumerate(sizes):
        tokens, targets = task.batch(size, config.seed, step * len(sizes) + i, "eval").to(device)
        with _autocast(config, device):
            logits = model(tokens)
        loss += size * _loss(logits, targets).item()
        right += size * accuracy(logits, targets).item()
    model.train()
    return loss / examples, right / examples


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def _device(config: TrainConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UsageError(error("train", "device must be one of this machine", "cuda", "Use --device cpu."))
    return torch.device("cuda" if config.device != "cpu" and available else "cpu")


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported()
    wanted = auto if config.precision == "auto" else config.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def _title(config: TrainConfig) -> str:
    task = config.task
    return f"{task.name.replace('_', ' ')}: {task.data_tokens} data tokens of {task.symbols} symbols in {task.length}"


@torch.no_grad()
def _example(model: nn.Module, task: Task, config: TrainConfig, device: torch.device) -> str:
    """A fresh example with the model's answer, as a person would read it."""
    # An index that no evaluation reaches.
    tokens, targets = task.batch(1, config.seed, 2**63, "eval").to(device)
    predictions = model(tokens).argmax(-1)
    return task.render(tokens[0].cpu(), targets[0].cpu(), predictions[0].cpu())
