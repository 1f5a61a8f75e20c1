"""SSMModel: embedding, blocks and norm, as a transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from ssmscan.layers import MLP, Block, RMSNorm
from ssmscan.layers.context import Context
from ssmscan.models.cache import SSMCache
from ssmscan.models.configuration import SSMConfig
from ssmscan.models.initialization import draw, wide_patterns
from ssmscan.models.mixers import build_mixer
from ssmscan.shapes import INDEX, check_rank, error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# The cache's name in what a forward is given and returns: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


class SSMBlock(GradientCheckpointingLayer, Block):
    """A block of a model, whose activations transformers can recompute in the backward."""

    def __init__(self, name: str, config: SSMConfig) -> None:
        width, eps = config.hidden_size, config.norm_eps
        mlp = {}
        if config.intermediate_size:
            mlp = {"mlp": MLP(width, config.intermediate_size), "norm2": RMSNorm(width, eps)}
        super().__init__(
            build_mixer(name, config), RMSNorm(width, eps), **mlp, residual_in_fp32=config.residual_in_fp32
        )
        # What ends a residual branch, of which a model has one or two for each layer.
        self._ends = ["mixer.out_proj", "mlp.fc2"] if mlp else ["mixer.out_proj"]
        self._branches = config.num_hidden_layers * len(self._ends)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew; what ends one of n residual branches of the model is smaller by 1/√n."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
        for end in self._ends:
            self.get_parameter(f"{end}.weight").mul_(self._branches**-0.5)


class SSMPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the models, with and without the head."""

    config_class = SSMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SSMBlock"]  # noqa: RUF012
    # The one implementation that attention layers have.
    _supports_sdpa = True
    # A state cannot go back, so generate refuses to let another model draft.
    _is_stateful = True

    def post_init(self) -> None:
        # For from_pretrained, which gives parameters their dtype without asking the layers.
        self._keep_in_fp32_modules_strict = wide_patterns(self)
        super().post_init()


class SSMModel(SSMPreTrainedModel):
    """The model without its head: embedding, blocks, and the last norm.

    Args:
        config: the model's shape.

    The forward takes what that of :class:`SSMForCausalLM` does but labels and logits_to_keep, and returns
    ``last_hidden_state``, (b, l, m), after the last norm.

    Example:
        >>> import torch
        >>> from ssmscan.models import SSMConfig, SSMModel
        >>> model = SSMModel(SSMConfig(vocab_size=11, hidden_size=8, mixers=["mamba"]))
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).last_hidden_state.shape
        torch.Size([2, 5, 8])
    """

    context = Context()

    def __init__(self, config: SSMConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SSMBlock(name, config) for name in config.mixers)
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = cast(nn.Embedding, value)

    @property
    def blocks(self) -> list[SSMBlock]:
        """``layers``, by their type."""
        return cast(list[SSMBlock], list(self.layers))

    def initialize_weights(self) -> None:
        """Draw what was not loaded, as the Mamba papers do: the variance of the stream does not grow with the depth.

        transformers calls this, and its own walk would pass over the blocks, which have no parameter of their own.
        """
        draw(self.embeddings, lambda: nn.init.normal_(self.embeddings.weight, std=self.config.initializer_range))
        for part in (*self.blocks, self.norm_f):
            draw(part)

    def make_cache(self, batch_size: int, max_length: int | None = None) -> SSMCache:
        """The states of all layers before the first token of ``batch_size`` sequences.

        Only attention takes note of ``max_length``, the number of tokens that it has room for at first. Its room grows
        when it is used up.
        """
        return SSMCache([block.mixer for block in self.blocks], batch_size, max_length)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b l"] | None = None,
        attention_mask: Bool[Tensor, "b total"] | None = None,
        inputs_embeds: Float[Tensor, "b l m"] | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        cache: SSMCache | None = None,
        past_key_values: SSMCache | None = None,
        cache_params: SSMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        x = self._embed(input_ids, inputs_embeds)
        mask = _mask(attention_mask, x, cu_seqlens)
        given = next((one for one in (cache, past_key_values, cache_params) if one is not None), None)
        cache = self._cache(given, x.shape[0], cu_seqlens is not None, use_cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        streams: list[Tensor] = []
        if cache is not None:
            tokens = self.context.extent(x.shape[1], x.device).total
            cache.make_room(tokens)
        for i, block in enumerate(self.layers):
            if output_hidden_states:
                streams.append(x)
            x = block(x, None if cache is None else cache.layers[i].state, cu_seqlens, mask)
        if cache is not None:
            cache.advance(tokens)
        x = self.norm_f(x)
        states: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=(*streams, x) if output_hidden_states else None, **states
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(error("SSMModel", "input_ids or inputs_embeds must be given", got))
        if inputs_embeds is not None:
            check_rank("SSMModel", "inputs_embeds", inputs_embeds, "b, l, m")
            return inputs_embeds
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in INDEX:
            given = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise TypeError(error("SSMModel", "input_ids must be an int32 or int64 tensor", given))
        check_rank("SSMModel", "input_ids", input_ids, "b, l")
        return self.embeddings(input_ids)

    def _cache(self, given: object, batch_size: int, packed: bool, use_cache: bool | None) -> SSMCache | None:
        """The cache that this forward reads and overwrites: the given one, or a new one where one is wanted."""
        recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputed and (given is not None or use_cache):
            raise RuntimeError(
                error(
                    "SSMModel",
                    "cache must be None under gradient checkpointing",
                    type(given).__name__ if given is not None else "use_cache=True",
                    "States would advance twice.",
                )
            )
        if given is not None:
            if not isinstance(given, SSMCache):
                advice = "Make it with model.make_cache(batch_size)."
                raise TypeError(error("SSMModel", "cache must be an SSMCache", type(given).__name__, advice))
            return given
        if use_cache is None:
            causal = all(getattr(block.mixer, "causal", True) for block in self.blocks)
            wanted = self.config.use_cache and not self.training and not packed and not self.context.split
            use_cache = wanted and causal
        return self.make_cache(batch_size) if use_cache else None


def _mask(attention_mask: Tensor | None, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """The columns of ``attention_mask`` that are about the tokens of ``x``."""
    if attention_mask is None:
        return None
    if cu_seqlens is not None:
        raise NotImplementedError(
            error("SSMModel", "attention_mask must be None with cu_seqlens", "both", "Pack without padding.")
        )
    rows, length = x.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
        raise ValueError(
            error(
                "SSMModel",
                f"attention_mask must have shape (b, total) with b = {rows} and total of at least {length}",
                tuple(attention_mask.shape),
            )
        )
    return attention_mask[:, attention_mask.shape[1] - length :]
