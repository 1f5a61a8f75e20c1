"""transformers' own state-space models, small, for the tests of the patch."""

from contextlib import contextmanager

import torch

import ssmscan

VOCABULARY = 23
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_chunk_size": 4,
}
# Of each architecture, the class of its models by the first part of its name, and a config.
MODELS = {
    "mamba": ("Mamba", {"state_size": 5}),
    "falcon_mamba": ("FalconMamba", {"state_size": 5}),
    "jamba": (
        "Jamba",
        {**_ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 5},
    ),
    "mamba2": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 4, "n_groups": 2, "state_size": 5, "chunk_size": 4},
    ),
    "bamba": ("Bamba", {**_ATTENTION, **_MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": (
        "FalconH1",
        {**_ATTENTION, **_MAMBA2, "mamba_d_ssm": 32, "mamba_rms_norm": True, "mamba_norm_before_gate": True},
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **_ATTENTION,
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "n_groups": 2,
            "ssm_state_size": 5,
            "chunk_size": 4,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **_ATTENTION,
            "num_key_value_heads": 2,
            "layers_block_type": ["mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 5,
            "chunk_size": 4,
            "adapter_rank": 4,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **_ATTENTION,
            **_MAMBA2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "shared_intermediate_size": 16,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            **_ATTENTION,
            "num_hidden_layers": 3,
            "lru_width": 16,
            "attention_window_size": 8,
        },
    ),
}


@torch.no_grad()
def build(architecture, **options):
    """A model whose weights are far from their start, so that no part of it could be left out unseen."""
    import transformers

    torch.manual_seed(0)
    name, fields = MODELS[architecture]
    config = getattr(transformers, f"{name}Config")(**_COMMON | fields | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for path, p in model.named_parameters():
        last = path.rsplit(".", 1)[-1]
        if last in ("A_log", "dt_bias", "recurrent_param") or "dt_proj" in path:
            continue
        noise = torch.empty(p.shape).uniform_(-1, 1, generator=generator)
        p.copy_(1 + 0.5 * noise if "norm" in path or last == "D" else 0.4 * noise)
    return model.eval()


@contextmanager
def patched(*architectures):
    """transformers on our operations."""
    ssmscan.patch_transformers(*architectures)
    try:
        yield
    finally:
        ssmscan.unpatch_transformers()
