"""The training loop, read from top to bottom."""

import json
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ssmscan.ahead import Late
from ssmscan.models import SSMForCausalLM
from ssmscan.shapes import error
from ssmscan.tasks import Text
from ssmscan.training import checkpoint
from ssmscan.training.batches import batches
from ssmscan.training.chunks import check_carries
from ssmscan.training.clock import Clock, flops_per_token
from ssmscan.training.config import Target, TrainConfig
from ssmscan.training.errors import RunError, Terminated, UsageError
from ssmscan.training.evaluation import evaluate, means, scored
from ssmscan.training.folder import claimed, replace_text
from ssmscan.training.optim import learning_rate, make_optimizer
from ssmscan.training.ranks import Ranks, joined
from ssmscan.training.report import Log, Report, plot
from ssmscan.training.step import Step, autocast, product_dtype
from ssmscan.training.termination import termination


@dataclass(frozen=True)
class Metrics:
    """The end of a run, as metrics.json holds it.

    ``evaluation`` is the last one, loss and accuracy among it, ``examination`` what the task measures only then.
    """

    evaluation: dict[str, float]
    examination: dict[str, float]
    steps: int
    seconds: float
    target: str | None
    parameters: int
    device: str
    processes: int
    versions: dict[str, str]


def train(config: TrainConfig, resume: bool = False) -> Metrics:
    """Run ``config``, or continue the run in its folder.

    Under torchrun all processes call it, on a folder that they share; the first one tells of the run, and writes what
    is not written by all.

    Args:
        config: the run.
        resume: continue from the newest complete checkpoint in ``config.out``. On the CPU the result is that of a run
            never interrupted, bit for bit.

    Returns:
        the final metrics. The folder ``config.out`` then holds config.yaml, log.jsonl, metrics.json, curves.png,
        checkpoints, a TensorBoard log, and the model as :func:`ssmscan.models.load_pretrained` reads it.

    Raises:
        UsageError: the folder is taken, or its run has another model, the device or the data is missing, or there is no
            such model. Nothing was written.
        RunError: the loss or its gradient is not finite (the update is not made), the target was not reached, or
            another process is gone.
        Terminated: SIGTERM has come. A checkpoint of the last step was written, and the run can be continued.
        OSError: a file could not be written. It is named, and the run can be continued.

    Example:
        >>> from ssmscan.training import TrainConfig, train
        >>> config = TrainConfig(out="runs/first", steps=200)
        >>> metrics = train(config)  # doctest: +SKIP
    """
    with joined(config) as ranks:
        return _train(config, resume, ranks)


def _train(config: TrainConfig, resume: bool, ranks: Ranks) -> Metrics:
    """The run, in each of its processes: all make the same steps, and the first one tells and writes."""
    device = ranks.device
    config, model = _prepare(config)
    task, target = config.task, None if config.target is None else Target.parse(config.target)
    parameters, flops = model.num_parameters(), flops_per_token(model, task.example_length)
    model = ranks.arrange(model.to(device).train(), product_dtype(config.precision, device))
    update = Step(model, make_optimizer(model, config.optim), config, device, ranks)
    with _claimed(config, resume, ranks) as folder:
        step, seconds = checkpoint.load(folder / "checkpoints", update) if resume else (0, 0.0)
        report = Report(folder, config, step) if ranks.first else Log(folder, step)
        with report, termination() as terminated:
            clock = Clock(config, flops, device, seconds, ranks.count)
            last, late = report.newest("eval"), Late()
            for batch in batches(config, step):
                late.put(step + 1, update(batch, learning_rate(step, config.steps, config.optim)))
                step += 1
                clock.tokens += batch.tokens.numel()
                evaluates = step % config.eval_every == 0 or step == config.steps
                due, ends = ranks.either(clock.save_is_due(), terminated())
                saves = step % config.save_every == 0 or due or ends
                for read, numbers in late.take(everything=evaluates or saves):
                    loss, norm, halted = numbers.tolist()
                    if halted:
                        raise RunError(
                            f"train: loss must be finite, got {loss:g} with a gradient of norm {norm:g} at step "
                            f"{read}. The update was not made; try a smaller --optim.lr."
                        )
                    report.advance(read)
                    if read % config.log_every == 0:
                        rate = learning_rate(read - 1, config.steps, config.optim)
                        report.training(read, loss=loss, lr=rate, grad_norm=norm, **clock.read())
                if evaluates:
                    with clock.paused():
                        last = report.evaluation(step, evaluate(model, config, ranks), clock.seconds())
                    if target is not None and target.reached(last):
                        break
                # After the evaluation, whose line the checkpoint then stands for.
                if saves:
                    with clock.paused():
                        checkpoint.save(folder / "checkpoints", step, update, task, clock.seconds(), config.keep)
                        clock.saved()
                if ends:
                    raise Terminated

            if last is None or last["step"] != step:
                last = report.evaluation(step, evaluate(model, config, ranks), clock.seconds())
            whole = ranks.whole(model)
            examined = {}
            if whole is not None:
                with autocast(config.precision, device):
                    examined = task.examine(whole, config.seed)
            metrics = Metrics(
                evaluation={name: value for name, value in last.items() if name not in ("split", "step", "seconds")},
                examination=means(examined),
                steps=step,
                seconds=clock.seconds(),
                target=config.target,
                parameters=parameters,
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                processes=ranks.count,
                versions={"python": platform.python_version()}
                | {package: version(package) for package in ("ssmscan", "torch", "numpy", "transformers")},
            )
            if whole is not None:
                _leave(folder, whole, config, metrics, report.lines)
    if target is not None and not target.reached(metrics.evaluation):
        raise RunError(
            f"train: {target.measure} must reach {target.bound:g}, got {metrics.evaluation[target.measure]:.4f} after "
            f"{step} steps. Train longer (--steps), or see log.jsonl for where it stalled."
        )
    return metrics


@contextmanager
def _claimed(config: TrainConfig, resume: bool, ranks: Ranks) -> Iterator[Path]:
    """The run's folder, once the first process has claimed it; where that is refused, all of them end."""
    folder, refusal = Path(config.out), None
    with ExitStack() as stack:
        try:
            if ranks.first:
                folder = stack.enter_context(claimed(config, resume))
        except UsageError as reason:
            refusal = reason
        (refused,) = ranks.either(refusal is not None)
        if refused:
            rule = "out must be a folder that the first process can have"
            raise refusal or UsageError(error("train", rule, config.out, "See what that process says."))
        yield folder


def _leave(
    folder: Path, model: SSMForCausalLM, config: TrainConfig, metrics: Metrics, lines: list[dict[str, Any]]
) -> None:
    """Write what a finished run leaves, and show an example."""
    checkpoint.save_model(folder, model, config.task)
    target = None if config.target is None else Target.parse(config.target)
    measure = config.task.measures[-1] if target is None else target.measure
    plot(folder / "curves.png", config.task.title, lines, measure, target)
    # The last file, for it marks the run as finished.
    replace_text(folder / "metrics.json", json.dumps(asdict(metrics), indent=2) + "\n")
    print(f"\n{_example(model, config)}\n", flush=True)


def _prepare(config: TrainConfig) -> tuple[TrainConfig, SSMForCausalLM]:
    """The config with its data pinned, and the model as the seed draws it. Nothing is written yet."""
    torch.manual_seed(config.seed)
    task = config.task
    if config.target is not None and Target.parse(config.target).measure not in task.measures:
        rule = f"target must be of what the task {task.name} measures: {', '.join(task.measures)}"
        raise UsageError(error("train", rule, repr(config.target)))
    if config.wandb is not None and find_spec("wandb") is None:
        raise UsageError(error("train", "wandb must be installed", "none", "Run pip install wandb."))
    try:
        config = replace(config, task=task.pinned())
        model = SSMForCausalLM(config.model.build(task.vocab_size))
        if config.chunk is not None:
            check_carries(model, packed=isinstance(task, Text) and task.packing == "documents")
    except (TypeError, ValueError, NotImplementedError) as reason:
        raise UsageError(str(reason)) from None
    if task.foretells and not all(getattr(module, "causal", True) for module in model.modules()):
        raise UsageError(error("train", f"mixers must be causal for the task {task.name}", config.model.mixers))
    return config, model


@torch.no_grad()
def _example(model: SSMForCausalLM, config: TrainConfig) -> str:
    """An example of the evaluation with the model's answer, as a person would read it."""
    example = config.task.batch(1, config.seed, 0, "eval")
    logits, _ = scored(model, example)
    return config.task.render(example.tokens[0], example.targets[0], logits[0].argmax(-1).cpu())
