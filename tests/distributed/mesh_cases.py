"""What the tests of `parallelize` compute, in one process and on a mesh alike: layers, and models in training."""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ssmscan.distributed import full_state_dict, parallelize
from ssmscan.distributed.gathering import gathered
from ssmscan.layers import RGLRU, S4D, Attention, Block, GatedSSM, Hydra, Mamba, Mamba2, MatrixSSM, RMSNorm, state
from ssmscan.models import SSMConfig, SSMForCausalLM

B, L, M = 2, 23, 8
LAYERS = {
    "gated_ssm": partial(GatedSSM, M, expand=2),
    "matrix_ssm": partial(MatrixSSM, M, d_state=3, headdim=2),
    "s4d": partial(S4D, M, d_state=6),
    "mamba": partial(Mamba, M, d_state=3, bias=True, bcdt_rms_eps=1e-6),
    "mamba2": partial(Mamba2, M, d_state=3, headdim=2, ngroups=1, bias=True),
    "mamba2_groups": partial(Mamba2, M, d_state=3, headdim=4, ngroups=4, norm_before_gate=True),
    "mamba2_pairs": partial(Mamba2, M, d_state=3, headdim=4, ngroups=2),
    "mamba2_both": partial(Mamba2, M, d_state=3, headdim=2, ngroups=2, causal=False),
    "hydra": partial(Hydra, M, d_state=3, headdim=4),
    "rg_lru": partial(RGLRU, M, num_heads=4),
    "attention": partial(Attention, M, num_heads=4, num_heads_kv=1, out_proj_bias=True),
    "attention_rich": partial(Attention, M, 4, 2, 6, rotary_emb_dim=4, window=5, d_conv=3, qkv_proj_bias=True),
    "attention_both": partial(Attention, M, num_heads=4, causal=False),
}
BOTH_SIDES = ("mamba2_both", "hydra", "attention_both")
# Of these lengths are the stretches of a sequence of L tokens.
STRETCHES = {1: (L,), 2: (9, 14), 4: (0, 11, 1, 11)}
SETTINGS = ("plain", "packed", "padded", "state")


class Part(NamedTuple):
    """What a rank has of a batch."""

    rows: slice = slice(None)
    tokens: slice = slice(None)


def part_of(mesh, rows):
    """What this rank has of a batch of so many rows, and a batch's tensors put together from those of all ranks."""
    names = mesh.mesh_dim_names
    place = dict(zip(names, mesh.get_coordinate(), strict=True))
    dp = mesh["dp"].size() if "dp" in names else 1
    lengths = STRETCHES[mesh["cp"].size() if "cp" in names else 1]
    first = sum(lengths[: place.get("cp", 0)])
    size = rows // dp
    row = place.get("dp", 0) * size
    return Part(slice(row, row + size), slice(first, first + lengths[place.get("cp", 0)]))


def tokens_of(mesh, count):
    """This rank's stretch of so many tokens: all of them for the last rank."""
    if mesh is None or "cp" not in mesh.mesh_dim_names:
        return slice(count)
    return slice(count) if mesh.get_local_rank("cp") == mesh["cp"].size() - 1 else slice(0)


def whole(tensor, part, shape):
    """A tensor of the whole batch from this rank's part of it; the ranks that have the same part agree to the bit."""
    if not dist.is_initialized():
        return tensor.detach()
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (part, tensor.detach()))
    out = tensor.new_full(shape, torch.nan)
    for (rows, tokens), piece in found:
        before = out[rows, tokens]
        assert before.isnan().all() or torch.allclose(before, piece, rtol=0, atol=1e-10)
        out[rows, tokens] = piece
    return out


def run_layer(name, setting, mesh=None):
    """The outputs of a block with a layer, the layer's state afterwards and all gradients."""
    torch.manual_seed(0)
    layer = Block(LAYERS[name](dtype=torch.float64), RMSNorm(M, dtype=torch.float64))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    packed = setting == "packed"
    b = 1 if packed else B
    x, weight = torch.randn(2, b, L, M, dtype=torch.float64)
    bounds = torch.tensor([0, 5, 5, 18, 19, L]) if packed else None
    mask = torch.arange(L) >= torch.tensor([[3], [12]]) if setting == "padded" else None
    if mask is not None:
        weight = weight * mask.unsqueeze(-1)
    before = torch.randn(b, 4, M, dtype=torch.float64)
    part = Part()
    if mesh is not None:
        part = part_of(mesh, b)
        parallelize(layer, mesh)
    held = layer.init_state(b, max_length=2 * L) if setting == "state" else None
    if held is not None:
        layer(before[:, tokens_of(mesh, 4)], held)
    x = x[part].clone().requires_grad_()
    y = layer(x, held, bounds, None if mask is None else mask[part])
    (y * weight[part]).sum().backward()
    results = {"y": whole(y * weight[part].ne(0), part, weight.shape), "dx": whole(x.grad, part, weight.shape)}
    results |= {f"d {name}": gradient for name, gradient in gathered(layer, lambda p: p.grad).items()}
    if held is not None:
        # Ranks of tp have each a part of a state, which the next tokens show.
        if mesh is None or "tp" not in mesh.mesh_dim_names:
            results |= {f"state {i}": tensor.clone() for i, tensor in enumerate(state.tensors(held))}
        last = tokens_of(mesh, 4)
        with torch.no_grad():
            results["y after"] = whole(layer(before[:, last], held), Part(part.rows, last), before.shape)
    return results


def layer_rows():
    for name in LAYERS:
        for setting in SETTINGS:
            if not (setting == "state" and name in BOTH_SIDES):
                yield name, setting


MIXERS = ["mamba", "rg_lru", "mamba2", "attention"]
OPTIONS = {
    "mamba": {"d_state": 3},
    "mamba2": {"d_state": 3, "headdim": 4},
    "matrix_ssm": {"d_state": 3, "headdim": 4},
    "rg_lru": {"num_heads": 2},
    "attention": {"num_heads": 2, "num_heads_kv": 1},
}


def build_model(mixers, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    options = {name: OPTIONS[name] for name in set(mixers) & set(OPTIONS)}
    config = SSMConfig(vocab_size=12, hidden_size=M, mixers=mixers, mixer_options=options, **fields)
    return SSMForCausalLM(config).to(dtype).train()


def run_training(mixers, dtype, mesh=None, **fields):
    """20 steps: their losses, the norms of the gradients, and the parameters at the end."""
    model = build_model(mixers, dtype, intermediate_size=12, **fields)
    tokens = torch.randint(0, 12, (4, L + 1))
    part = Part()
    if mesh is not None:
        part = part_of(mesh, 4)
        parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :10] = -100
    losses, norms = [], []
    for step in range(20):
        optimizer.zero_grad()
        # The logits that a model returns are float32.
        logits = dtype is torch.float32 and step % 2 == 0
        loss = model(inputs[part], shift_labels=targets[part], return_logits=logits).loss
        loss.backward()
        norms.append(whole_norm(model))
        optimizer.step()
        losses.append(loss.detach())
    # What is rounding at first is more in the gradients of later steps.
    counted = norms if dtype is torch.float64 else norms[:1]
    return {"losses": torch.stack(losses), "norms": torch.stack(counted)} | full_state_dict(model)


def whole_norm(model):
    """The norm of the gradient, which is clipped."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
