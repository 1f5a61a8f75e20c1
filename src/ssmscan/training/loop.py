"""The training loop, read from top to bottom."""

import json
import math
import platform
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import torch
from torch import nn

from ssmscan.models import SSMForCausalLM
from ssmscan.shapes import error
from ssmscan.tasks import cross_entropy
from ssmscan.training import checkpoint
from ssmscan.training.config import TrainConfig
from ssmscan.training.errors import RunError, UsageError
from ssmscan.training.folder import claimed, replace_text
from ssmscan.training.optim import learning_rate, make_optimizer
from ssmscan.training.report import Report, plot


@dataclass(frozen=True)
class Metrics:
    """The end of a run, as metrics.json holds it; ``evaluation`` is the last one, loss and accuracy among it."""

    evaluation: dict[str, float]
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
        checkpoints, a TensorBoard log, and the model as :func:`ssmscan.models.load_pretrained` reads it.

    Raises:
        UsageError: the folder is taken, the device or the data missing, or there is no such model. Nothing was written.
        RunError: the loss or its gradient is not finite (the update is not made), or the target was not reached.
        OSError: a file could not be written. It is named, and the run can be continued.

    Example:
        >>> from ssmscan.training import TrainConfig, train
        >>> config = TrainConfig(out="runs/first", steps=200)
        >>> metrics = train(config)  # doctest: +SKIP
    """
    device = _device(config)
    config, model = _prepare(config)
    model.to(device).train()
    task, optimizer = config.task, make_optimizer(model, config.optim)
    with claimed(config, resume) as folder:
        step, seconds = checkpoint.load(folder / "checkpoints", model, optimizer) if resume else (0, 0.0)
        with Report(folder, config, step) as report:
            began = time.perf_counter() - seconds
            last = report.newest("eval")
            busy, seen = 0.0, 0
            while step < config.steps:
                started = time.perf_counter()
                tokens, targets, _ = (
                    part if part is None else part.to(device)
                    for part in task.batch(config.batch_size, config.seed, step, "train")
                )
                rate = learning_rate(step, config.steps, config.optim)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with _autocast(config, device):
                    loss = cross_entropy(model(tokens).logits, targets)
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
                    last = report.evaluation(step, evaluate(model, config, step, device), time.perf_counter() - began)
                    if config.target_accuracy is not None and last["accuracy"] >= config.target_accuracy:
                        break
                if step % config.save_every == 0:
                    checkpoint.save(
                        folder / "checkpoints", step, model, task, optimizer, time.perf_counter() - began, config.keep
                    )

            if last is None or last["step"] != step:
                last = report.evaluation(step, evaluate(model, config, step, device), time.perf_counter() - began)
            metrics = Metrics(
                evaluation={name: value for name, value in last.items() if name not in ("split", "step", "seconds")},
                steps=step,
                seconds=time.perf_counter() - began,
                target_accuracy=config.target_accuracy,
                parameters=model.num_parameters(),
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                versions={"python": platform.python_version()}
                | {package: version(package) for package in ("ssmscan", "torch", "numpy", "transformers")},
            )
            checkpoint.save_model(folder, model, task)
            plot(folder / "curves.png", task.title, report.lines, config.target_accuracy)
            # The last file, for it marks the run as finished.
            replace_text(folder / "metrics.json", json.dumps(asdict(metrics), indent=2) + "\n")
            print(f"\n{_example(model, config, device)}\n", flush=True)
    if config.target_accuracy is not None and metrics.evaluation["accuracy"] < config.target_accuracy:
        raise RunError(
            f"train: accuracy must reach {config.target_accuracy:g}, got {metrics.evaluation['accuracy']:.4f} after "
            f"{step} steps. Train longer (--steps), or see log.jsonl for where it stalled."
        )
    return metrics


def _prepare(config: TrainConfig) -> tuple[TrainConfig, SSMForCausalLM]:
    """The config with its data pinned, and the model as the seed draws it. Nothing is written yet."""
    torch.manual_seed(config.seed)
    try:
        config = replace(config, task=config.task.pinned())
        model = SSMForCausalLM(config.model.build(config.task.vocab_size))
    except (TypeError, ValueError, NotImplementedError) as reason:
        raise UsageError(str(reason)) from None
    if config.task.foretells and not all(getattr(module, "causal", True) for module in model.modules()):
        raise UsageError(error("train", f"mixers must be causal for the task {config.task.name}", config.model.mixers))
    return config, model


@torch.no_grad()
def evaluate(model: SSMForCausalLM, config: TrainConfig, step: int, device: torch.device) -> dict[str, float]:
    """What the task measures, over ``config.eval_examples`` examples that no other evaluation of the run uses."""
    model.eval()
    examples = config.eval_examples
    sizes = [min(config.batch_size, examples - first) for first in range(0, examples, config.batch_size)]
    totals: defaultdict[str, float] = defaultdict(float)
    answers: defaultdict[str, int] = defaultdict(int)
    for i, size in enumerate(sizes):
        tokens, targets, _ = (
            part if part is None else part.to(device)
            for part in config.task.batch(size, config.seed, step * len(sizes) + i, "eval")
        )
        with _autocast(config, device):
            logits = model(tokens, use_cache=False).logits
        for name, measure in config.task.measure(logits, targets).items():
            totals[name] += measure.total.item()
            answers[name] += int(measure.answers.item())
    model.train()
    return {name: totals[name] / answers[name] for name in totals}


def _device(config: TrainConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UsageError(error("train", "device must be one of this machine", "cuda", "Use --device cpu."))
    return torch.device("cuda" if config.device != "cpu" and available else "cpu")


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported()
    wanted = auto if config.precision == "auto" else config.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


@torch.no_grad()
def _example(model: SSMForCausalLM, config: TrainConfig, device: torch.device) -> str:
    """A fresh example with the model's answer, as a person would read it."""
    # An index that no evaluation reaches.
    tokens, targets, _ = (
        part if part is None else part.to(device) for part in config.task.batch(1, config.seed, 2**63, "eval")
    )
    predictions = model(tokens, use_cache=False).logits.argmax(-1)
    return config.task.render(tokens[0].cpu(), targets[0].cpu(), predictions[0].cpu())
