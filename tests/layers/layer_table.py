"""The layers that the tests of this folder run over, small."""

from functools import partial

import torch

from ssmscan.layers import RGLRU, S4D, Attention, GatedSSM, Hydra, Mamba, Mamba2, MatrixSSM

B, L, M = 2, 7, 8

LAYERS = {
    "gated_ssm": partial(GatedSSM, M, expand=2),
    "matrix_ssm": partial(MatrixSSM, M, d_state=3, headdim=4),
    "s4d": partial(S4D, M, d_state=6),
    "s4d_real": partial(S4D, M, d_state=3, poles="real"),
    "mamba": partial(Mamba, M, d_state=3),
    "mamba_falcon": partial(Mamba, M, d_state=3, bias=True, dt_rank=2, bcdt_rms_eps=1e-6),
    "mamba2": partial(Mamba2, M, d_state=3, headdim=4, ngroups=2),
    "mamba2_limited": partial(Mamba2, M, d_state=3, headdim=4, norm_groups=2, bias=True, dt_limit=(0.01, 0.05)),
    "mamba2_both": partial(Mamba2, M, d_state=3, headdim=4, ngroups=2, causal=False),
    "hydra": partial(Hydra, M, d_state=3, headdim=4, ngroups=2),
    "rg_lru": partial(RGLRU, M, lru_width=6, num_heads=2),
    "attention": partial(Attention, M, num_heads=4, num_heads_kv=2),
    "attention_rich": partial(Attention, M, 2, 1, 6, rotary_emb_dim=4, window=3, d_conv=3, qkv_proj_bias=True),
    "attention_both": partial(Attention, M, num_heads=2, window=3, causal=False),
}
BOTH_SIDES = ("mamba2_both", "hydra", "attention_both")
CAUSAL = [name for name in LAYERS if name not in BOTH_SIDES]
# s4d takes no packed sequences.
PACKED = [name for name in LAYERS if not name.startswith("s4d")]


def build(name, dtype=torch.float64):
    """A layer none of whose parameters is where it starts: a bias of zero would hide an error."""
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


# One of each class, for what takes long.
KINDS = ("gated_ssm", "matrix_ssm", "s4d", "mamba", "mamba2", "hydra", "rg_lru", "attention")
