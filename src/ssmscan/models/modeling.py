"""SSMForCausalLM: the model with its head, its losses, and what transformers' generate asks of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ssmscan.models.backbone import CACHE, SSMModel, SSMPreTrainedModel
from ssmscan.models.cache import SSMCache
from ssmscan.models.configuration import SSMConfig
from ssmscan.models.initialization import draw
from ssmscan.models.loss import IGNORE, Holders, Vocabulary, linear_cross_entropy
from ssmscan.shapes import error

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class SSMForCausalLM(SSMPreTrainedModel, GenerationMixin):
    """A language model: scores of every next token from the tokens so far.

    Args:
        config: the model's shape.

    It is a transformers model: ``from_pretrained``, ``save_pretrained``, ``generate``, ``Trainer`` and PEFT take it.
    The forward takes

    - input_ids: (b, l), int32 or int64, in 0 … v-1;
    - attention_mask: (b, total), 0 where a sequence is padded; the last l columns are those of the tokens given now;
    - inputs_embeds: (b, l, m), in place of input_ids;
    - labels: (b, l), the tokens themselves, -100 where there is none to be learned; the loss is then the mean over
      all tokens of what is known of each from those before it;
    - shift_labels: (b, l), in place of labels: what is to be foretold at each token, -100 where nothing is;
    - cu_seqlens: bounds of s packed sequences in a batch of one, as in :func:`ssmscan.linear_scan`;
    - cache: what :meth:`make_cache` or an earlier forward returned, read first and overwritten in place, for a single
      token as for a chunk of any length. ``past_key_values`` and ``cache_params`` are transformers' older names;
    - use_cache: make a cache and return it. Default: ``config.use_cache``, but not in training and not when packed;
    - output_hidden_states: return the stream before each block, and after the last norm;
    - logits_to_keep: compute the logits of this many last tokens only, or those that a tensor of indices names;
    - return_logits: False computes the loss of the labels in chunks, and returns no logits, which for a large
      vocabulary are most of a training step's memory. Default True;
    - num_items_in_batch: by how many tokens to divide the sum of the losses. Default: those that are to be foretold;

    and returns ``logits``, (b, l, v), in float32, with ``loss``, ``hidden_states`` and the cache when asked for.

    Raises:
        TypeError: tokens that are not int32 or int64, a cache that is not an :class:`SSMCache`.
        ValueError: a wrong shape; labels and shift_labels, or neither and no logits.
        NotImplementedError: a mask with packed sequences; positions without ``cu_seqlens``.
        RuntimeError: a cache under gradient checkpointing.

    Example:
        >>> import torch
        >>> from ssmscan.models import SSMConfig, SSMForCausalLM
        >>> model = SSMForCausalLM(SSMConfig(vocab_size=11, hidden_size=8, mixers=["mamba2", "attention"],
        ...     mixer_options={"mamba2": {"headdim": 8}, "attention": {"num_heads": 2}}))
        >>> tokens = torch.zeros(2, 5, dtype=torch.int64)
        >>> model(tokens).logits.shape
        torch.Size([2, 5, 11])
        >>> model.eval().generate(tokens, max_new_tokens=3, do_sample=False).shape
        torch.Size([2, 8])
    """

    holders = Holders()
    vocabulary = Vocabulary()
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: SSMConfig) -> None:
        super().__init__(config)
        self.backbone = SSMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def initialize_weights(self) -> None:
        """Draw what was not loaded, as the Mamba papers do."""
        self.backbone.initialize_weights()
        if not self.config.tie_word_embeddings:
            draw(self.lm_head)

    def make_cache(self, batch_size: int, max_length: int | None = None) -> SSMCache:
        """The states of all layers before the first token of ``batch_size`` sequences.

        Only attention takes note of ``max_length``, the number of tokens that it has room for at first. Its room grows
        when it is used up.
        """
        return self.backbone.make_cache(batch_size, max_length)

    def export_pretrained(
        self, path: str | Path, layout: Literal["transformers", "state-spaces"] = "transformers"
    ) -> None:
        """Write the model as others read it; ``save_pretrained`` writes it as we do.

        Args:
            path: a folder, made where it does not exist.
            layout: "transformers" for its ``MambaForCausalLM``, ``Mamba2ForCausalLM`` and ``FalconMambaForCausalLM``,
                in safetensors; "state-spaces" for the code of the Mamba papers, in ``pytorch_model.bin``.

        Raises:
            ValueError: an unknown layout.
            NotImplementedError: a model that the layout has no words for.
        """
        from ssmscan.models.checkpoints.load import export_pretrained

        export_pretrained(self, path, layout)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: transformers' caches hold other states."""
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Begin with our cache, so that a long prompt can be read in chunks."""
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs[CACHE] = self.make_cache(rows)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """A step's arguments. generate reads the names here: which arguments there are, and that others go to forward.

        Tokens that generate adds are never padding, so after the prompt there is no mask.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            *args,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # A chunk of the prompt comes without a length.
        if next_sequence_length == 1 and not is_first_iteration:
            inputs.pop("attention_mask", None)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b l"] | None = None,
        attention_mask: Bool[Tensor, "b total"] | None = None,
        inputs_embeds: Float[Tensor, "b l m"] | None = None,
        labels: Int[Tensor, "b l"] | None = None,
        shift_labels: Int[Tensor, "b l"] | None = None,
        cu_seqlens: Int[Tensor, " s+1"] | None = None,
        cache: SSMCache | None = None,
        past_key_values: SSMCache | None = None,
        cache_params: SSMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast:
        # What transformers' collator of packed sequences says beside, and instead of, positions.
        cu_seqlens = loss_arguments.pop("cu_seq_lens_q", cu_seqlens)
        if loss_arguments.pop("position_ids", None) is not None and cu_seqlens is None:
            raise NotImplementedError(
                error(
                    "SSMForCausalLM",
                    "position_ids must come with cu_seqlens",
                    "positions alone",
                    "Use DataCollatorWithFlattening(return_flash_attn_kwargs=True), or leave them out.",
                )
            )
        outputs = self.backbone(
            input_ids,
            attention_mask,
            inputs_embeds,
            cu_seqlens,
            cache,
            past_key_values,
            cache_params,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        x = outputs.last_hidden_state
        x = x.to(self.lm_head.weight.dtype)
        if labels is not None:
            if shift_labels is not None:
                raise ValueError(error("SSMForCausalLM", "labels or shift_labels must be given", "both"))
            if self.backbone.context.split:
                rule = "shift_labels must be given in place of labels where the sequence is split"
                raise ValueError(error("SSMForCausalLM", rule, "labels", "The last token's next is another process'."))
            if cu_seqlens is not None:
                labels = _without_first(labels, cu_seqlens)
            shift_labels = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].contiguous()
        if shift_labels is not None and loss_arguments.get("num_items_in_batch") is None:
            loss_arguments["num_items_in_batch"] = self.holders.sum((shift_labels != IGNORE).sum())
        logits, loss = None, None
        if return_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(x[:, kept]).float()
            if shift_labels is not None:
                v = self.config.vocab_size
                loss = self.loss_function(logits, None, v, shift_labels=shift_labels.contiguous(), **loss_arguments)
        elif shift_labels is None:
            raise ValueError(error("SSMForCausalLM", "labels must be given without return_logits", "none"))
        else:
            loss = self._chunked_loss(x, shift_labels, **loss_arguments)
        if loss is not None:
            loss = self.holders.sum(loss)
        states: dict[str, Any] = {CACHE: getattr(outputs, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **states)

    def _chunked_loss(self, x: Tensor, targets: Tensor, num_items_in_batch: int | Tensor, **_: Any) -> Tensor:
        x, targets, v = x.flatten(0, 1), targets.flatten(), self.config.vocab_size
        total = linear_cross_entropy(self.lm_head, x, targets, v, self.vocabulary)
        return total / num_items_in_batch


def _without_first(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``labels`` of packed sequences without the first token of each, which nothing before it foretells."""
    # An empty sequence at the end starts behind the last token.
    return F.pad(labels, (0, 1)).index_fill(1, cu_seqlens[:-1].long(), IGNORE)[:, :-1]


AutoConfig.register(SSMConfig.model_type, SSMConfig)
AutoModel.register(SSMConfig, SSMModel)
AutoModelForCausalLM.register(SSMConfig, SSMForCausalLM)
