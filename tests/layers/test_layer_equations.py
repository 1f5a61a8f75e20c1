"""Every layer is what its docstring says, as a loop over time; and what the papers prove of them."""

import pytest
import torch
import torch.nn.functional as F
from layer_table import LAYERS, B, L, build

from ssmscan import s4d, selective_scan
from ssmscan.layers import MLP, RMSNorm


def loop(decay, drive):
    """h_t = decay_t · h_{t-1} + drive_t for (b, l, ...), all states."""
    h, states = torch.zeros_like(drive[:, 0]), []
    for t in range(drive.shape[1]):
        h = decay[:, t] * h + drive[:, t]
        states.append(h)
    return torch.stack(states, 1)


def convolve(conv, x):
    """By PyTorch, with the padding of a causal or of a centred kernel."""
    w = conv.kernel_size[0]
    before = w // 2 if conv.centred else w - 1
    y = F.conv1d(F.pad(x.mT, (before, w - 1 - before)), conv.weight, conv.bias, groups=conv.groups).mT
    return F.silu(y) if conv.activation == "silu" else y


def rms(x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gated_ssm(layer, x):
    v, i, o, r = layer.in_proj(x).chunk(4, -1)
    a, b = torch.sigmoid(r + layer.decay_bias), torch.sigmoid(i + layer.input_bias)
    return layer.out_proj(F.silu(o) * loop(a, b * v))


def matrix_ssm(layer, x):
    h, p, n = layer.nheads, layer.headdim, layer.d_state
    z, v, k, q, r = layer.in_proj(x).split([h * p, h * p, h * n, h * n, h * n], -1)
    v, (k, q, r) = v.unflatten(-1, (h, p)), (part.unflatten(-1, (h, n)) for part in (k, q, r))
    a = torch.sigmoid(r + layer.decay_bias)
    H = loop(a.unsqueeze(-1), torch.einsum("blhn,blhp->blhnp", (1 - a**2).sqrt() * k, v))
    y = torch.einsum("blhn,blhnp->blhp", q, H).flatten(-2) / n**0.5
    y = rms((y * F.silu(z)).unflatten(-1, (h, p)), 1e-5).flatten(-2)
    return layer.out_proj(y * layer.norm.weight)


def s4d_layer(layer, x):
    A = -layer.A_log.exp()
    C = layer.C.squeeze(-1)
    if layer.A_imag is not None:
        A, C = A + 1j * layer.A_imag, torch.view_as_complex(layer.C)
    decay = (A * layer.log_dt.exp().unsqueeze(-1)).exp()
    h = loop(decay.expand(*x.shape, -1), (decay - 1) / A * x.unsqueeze(-1))
    y = (C * h).sum(-1)
    y = (2 * y.real if y.is_complex() else y) + layer.D * x
    v, g = layer.out_proj(F.gelu(y)).chunk(2, -1)
    return v * torch.sigmoid(g)


def mamba(layer, x):
    u, z = layer.in_proj(x).chunk(2, -1)
    u = convolve(layer.conv1d, u)
    parts = layer.x_proj(u).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    if layer.bcdt_rms_eps is not None:
        parts = [rms(part, layer.bcdt_rms_eps) for part in parts]
    dt, B_, C = parts
    dt = F.softplus(dt @ layer.dt_proj.weight.T + layer.dt_proj.bias).unsqueeze(-1)
    h = loop((-dt * layer.A_log.exp()).exp(), dt * B_.unsqueeze(-2) * u.unsqueeze(-1))
    y = (h * C.unsqueeze(-2)).sum(-1) + layer.D * u
    return layer.out_proj(y * F.silu(z))


def step_sizes(layer, dt):
    return F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)


def ssd(layer, u, dt, B_, C):
    """Mamba-2's scan without D, (b, l, h, p)."""
    B_, C = (part.repeat_interleave(layer.nheads // layer.ngroups, 2) for part in (B_, C))
    decay = (-dt * layer.A_log.exp())[..., None, None].exp()
    h = loop(decay, dt[..., None, None] * torch.einsum("blhp,blhn->blhpn", u, B_))
    return torch.einsum("blhpn,blhn->blhp", h, C)


def pairs(layer, parts):
    return [part.unflatten(-1, (layer.ngroups, layer.d_state)) for part in parts]


def mamba2(layer, x):
    d, g, h = layer.d_inner, layer.ngroups * layer.d_state, layer.nheads
    z, u, dt = layer.in_proj(x).split([d, d + 2 * g, h], -1)
    u, *parts = convolve(layer.conv1d, u).split([d, g, g], -1)
    u, dt = u.unflatten(-1, (h, -1)), step_sizes(layer, dt)
    tokens = (u, dt, *pairs(layer, parts))
    y = ssd(layer, *tokens) + layer.D.unsqueeze(-1) * u
    if not layer.causal:
        y = y + ssd(layer, *(part.flip(1) for part in tokens)).flip(1)
    y = y.flatten(-2) * F.silu(z)
    groups = y.shape[-1] // layer.norm.group_size
    return layer.out_proj(rms(y.unflatten(-1, (groups, -1)), 1e-5).flatten(-2) * layer.norm.weight)


def hydra(layer, x):
    d, g, h = layer.d_inner, layer.ngroups * layer.d_state, layer.nheads
    z, u, dt, dt_rev = layer.in_proj(x).split([d, d + 4 * g, h, h], -1)
    u, B_, C, B_rev, C_rev = convolve(layer.conv1d, u).split([d, g, g, g, g], -1)
    heads = u.unflatten(-1, (h, -1))
    left = (heads, step_sizes(layer, dt), *pairs(layer, (B_, C)))
    right = (heads, step_sizes(layer, dt_rev), *pairs(layer, (B_rev, C_rev)))

    def shift(y):
        return F.pad(y, (0, 0, 0, 0, 1, 0))[:, :-1]

    y = shift(ssd(layer, *left)) + shift(ssd(layer, *(part.flip(1) for part in right))).flip(1)
    y = y + (layer.D + u @ layer.fc_D.weight.T).unsqueeze(-1) * heads
    y = rms(y.flatten(-2).unflatten(-1, (layer.ngroups, -1)), 1e-5).flatten(-2) * layer.norm.weight
    return layer.out_proj(y * F.silu(z))


def rg_lru(layer, x):
    u, g = layer.in_proj(x).chunk(2, -1)
    u = convolve(layer.conv1d, u)

    def gate(part):
        return torch.sigmoid(u @ torch.block_diag(*part.weight) + part.bias.flatten())

    log_a = -8 * gate(layer.recurrence_gate) * F.softplus(layer.a_param)
    h = loop(log_a.exp(), (1 - (2 * log_a).exp()).sqrt() * gate(layer.input_gate) * u)
    return layer.out_proj(F.gelu(g, approximate="tanh") * h)


def attention(layer, x):
    """Each head and pair of tokens by itself; the rotation as a complex number."""
    qkv = layer.in_proj(x)
    if layer.conv1d is not None:
        qkv = convolve(layer.conv1d, qkv)
    p, r = layer.head_dim, layer.rotary_emb_dim
    q, k, v = (part.unflatten(-1, (-1, p)) for part in qkv.split([h * p for h in layer_heads(layer)], -1))
    angle = torch.arange(L).view(L, 1, 1) * 10000.0 ** (-torch.arange(0, r, 2) / r)

    def rotate(t):
        turned = torch.complex(*t[..., :r].chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle).to(torch.cdouble)
        return torch.cat([turned.real, turned.imag, t[..., r:]], -1)

    q, k = rotate(q), rotate(k)
    y = torch.zeros(B, L, layer.num_heads, p, dtype=x.dtype)
    for head in range(layer.num_heads):
        group = head // (layer.num_heads // layer.num_heads_kv)
        for t in range(L):
            near = range(max(0, t - (layer.window or L) + 1), t + 1)
            if not layer.causal:
                near = range(near.start, min(L, t + (layer.window or L)))
            scores = torch.stack([(q[:, t, head] * k[:, j, group]).sum(-1) for j in near], -1) / p**0.5
            weights = scores.softmax(-1)
            y[:, t, head] = sum(weights[:, i, None] * v[:, j, group] for i, j in enumerate(near))
    return layer.out_proj(y.flatten(-2))


def layer_heads(layer):
    return layer.num_heads, layer.num_heads_kv, layer.num_heads_kv


EQUATIONS = {
    "gated_ssm": gated_ssm,
    "matrix_ssm": matrix_ssm,
    "s4d": s4d_layer,
    "s4d_real": s4d_layer,
    "mamba": mamba,
    "mamba_falcon": mamba,
    "mamba2": mamba2,
    "mamba2_limited": mamba2,
    "mamba2_both": mamba2,
    "hydra": hydra,
    "rg_lru": rg_lru,
    "attention": attention,
    "attention_rich": attention,
    "attention_both": attention,
}


@pytest.mark.parametrize("name", LAYERS)
def test_equations(name, x):
    layer = build(name)
    # Angles are float32 numbers in the check of attention.
    atol = 1e-6 if name.startswith("attention") else 1e-10
    torch.testing.assert_close(layer(x), EQUATIONS[name](layer, x), rtol=0, atol=atol)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_mlp(activation):
    mlp, x = MLP(4, 6, activation, bias=True), torch.randn(3, 4)
    value, gate = mlp.fc1(x).chunk(2, -1)
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    torch.testing.assert_close(mlp(x), mlp.fc2(value * act(gate)))
    assert mlp.fc1.weight.shape == (12, 4)


def test_rms_norm():
    """Statistics and scale are in float32; the output has the module's dtype, whatever the residual stream has."""
    x = torch.randn(3, 4)
    norm = RMSNorm(4, eps=1e-6).bfloat16()
    assert norm.weight.dtype is torch.float32
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype is norm(x.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, rtol=4e-3, atol=0)
    torch.testing.assert_close(RMSNorm(4)(torch.full((1, 4), 300.0).half()), torch.ones(1, 4))


@pytest.mark.parametrize("name", ["s4d", "s4d_real"])
def test_s4d_as_convolution_and_as_recurrence(name, x):
    """The two forms of section 2 of S4, of the layer's own system; and its steps are the recurrence."""
    layer = build(name)
    convolution, end = s4d(x, **layer.system(), mode="conv")
    recurrence, same_end = s4d(x, **layer.system(), mode="recurrent")
    torch.testing.assert_close(convolution, recurrence, rtol=0, atol=1e-10)
    torch.testing.assert_close(end, same_end, rtol=0, atol=1e-10)
    state = layer.init_state(B)
    with torch.no_grad():
        for t in range(L):
            layer(x[:, t : t + 1], state)
    torch.testing.assert_close(state.scan, end, rtol=0, atol=1e-10)


def test_gates_of_an_rnn_are_a_selective_scan():
    """Theorem 1 of Mamba: n = 1, A = -1, B = 1 and Δ = softplus(z) make h = (1 - g) h + g x with g = σ(z).

    That holds where B is discretised exactly, by (1 - e^-Δ) rather than by Δ.
    """
    x, z = torch.randn(2, B, 50, 3, dtype=torch.float64)
    dt, g = F.softplus(z), torch.sigmoid(z)
    one = torch.ones(B, 50, 1, dtype=torch.float64)
    exact = x * -torch.expm1(-dt) / dt
    y, _ = selective_scan(exact, z, -torch.ones(3, 1, dtype=torch.float64), one, one, dt_softplus=True)
    torch.testing.assert_close(y, loop(1 - g, g * x), rtol=0, atol=1e-12)
