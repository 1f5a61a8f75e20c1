"""One update of the weights, which waits for nothing that the device computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmscan.ahead import Recorded
from ssmscan.models import SSMForCausalLM
from ssmscan.tasks import IGNORE, Batch
from ssmscan.training.chunks import chunked_backward
from ssmscan.training.config import TrainConfig
from ssmscan.training.ranks import Ranks


class Step:
    """Forward, loss, backward, clip and AdamW of one batch, queued on the device.

    A loss or gradient that is not finite makes no update, nor does any step after it: the device itself skips them,
    for the host reads the loss later. With float16 an infinite gradient is what tells the scale of the loss to shrink,
    and only one at a scale of 1 or less ends the run.

    Args:
        model, optimizer: what is trained, and :func:`ssmscan.training.optim.make_optimizer` of it.
        config: batch, precision, compilation and the rest.
        device: that of the model.
        ranks: the processes that share the step; None is this one.
    """

    def __init__(
        self,
        model: SSMForCausalLM,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.device = model, optimizer, config, device
        self.ranks = ranks or Ranks(device)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=product_dtype(config.precision, device) == torch.float16
        )
        # Those of the optimizer: behind a forward the model may have others in their place, that of several processes.
        self.named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        # A tensor, so that a recorded step can be told another rate.
        self.rate = torch.zeros((), device=device)
        self.set_rate()
        self.halted = torch.zeros((), dtype=torch.bool, device=device)
        self.one = torch.ones((), device=device)
        if config.gradient_checkpointing:
            # Its name from transformers 5.24 on, and the one before.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
            # The models draw nothing, and PyTorch before 2.10 cannot record the reading of a generator's state.
            enable({"use_reentrant": False, "preserve_rng_state": False})
        if config.compile:
            for block in model.backbone.blocks:
                block.compile()
        self._run = Recorded(self._update, device) if config.cuda_graph else self._update

    def set_rate(self) -> None:
        """Have the optimizer read the rate of a step, whatever it has restored."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.set_rate()

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Queue the update for ``batch``, that of all processes, at the learning rate ``rate``.

        Returns the loss, the norm of the gradient before it was clipped, and 1 where the run is halted: (3,), float32,
        on the device.
        """
        self.rate.fill_(rate)
        # One at least: documents of a token each may ask for nothing.
        asked = int((batch.targets != IGNORE).sum())
        answers = torch.full((), float(max(asked, 1)), device=self.device)
        own = self.ranks.rows(batch, self.ranks.share(batch.tokens.shape[0]))
        size = self.config.at_once
        parts = [own.rows(i, size).inputs(self.device) for i in range(0, own.tokens.shape[0], size)]
        return self._run(answers, *parts)

    def _update(self, answers: Tensor, *parts: dict[str, Any]) -> Tensor:
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        scale = self.scaler.scale(self.one)
        for inputs in parts:
            loss += self._backward(inputs, answers, scale, last=inputs is parts[-1])
        self.ranks.after_backwards(self.model)
        self.scaler.unscale_(self.optimizer)
        norm = self.ranks.clip(list(self.named.values()), self.config.optim.clip)
        infinite = ~norm.isfinite()
        self.halted |= ~loss.isfinite() | (infinite & (scale <= 1))
        # What a GradScaler sets, and fused optimizers read on the device.
        self.optimizer.found_inf = (self.halted | infinite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        return torch.stack([loss, norm, self.halted.float()])

    def _backward(self, inputs: dict[str, Any], answers: Tensor, scale: Tensor, last: bool) -> Tensor:
        """Add the gradients of a part of the batch, the ``last`` or not, times ``scale``; its part of the loss."""
        config = self.config

        def before_backward(last_chunk: bool) -> None:
            self.ranks.before_backward(self.model, last and last_chunk)

        with autocast(config.precision, self.device):
            if config.chunk is not None:
                return chunked_backward(
                    self.model,
                    chunk=config.chunk,
                    **inputs,
                    truncate=config.truncate,
                    num_items_in_batch=answers,
                    scale=scale,
                    stretch=self.ranks.stretch,
                    before_backward=before_backward,
                )
            inputs = self.ranks.stretch(inputs)
            loss = self.model(**inputs, num_items_in_batch=answers, return_logits=False).loss
        before_backward(True)
        (loss * scale).backward()
        return loss.detach()


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products under a ``precision`` as :class:`ssmscan.training.TrainConfig` has it."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a model computes under a ``precision``."""
    dtype = product_dtype(precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
