"""The weights that a model starts from, by every road, and float32 where they have to be."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmscan.models import SSMConfig, SSMForCausalLM

WIDE = ("A_log", "D", "dt_bias", "dt_proj.bias")


def _big(**fields):
    return SSMConfig(
        **(
            {
                "vocab_size": 64,
                "hidden_size": 64,
                "mixers": ["mamba", "mamba2"] * 2,
                "mixer_options": {"mamba2": {"headdim": 16}},
                "intermediate_size": 128,
            }
            | fields
        )
    )


def _check_start(model):
    """Of the model of _big: the rules of the Mamba papers, to what a few thousand draws tell."""
    branches = 8
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for block in model.backbone.layers:
        mixer, mlp = block.mixer, block.mlp
        for linear, scale in (
            (mixer.in_proj, 1),
            (mixer.out_proj, branches**-0.5),
            (mlp.fc1, 1),
            (mlp.fc2, branches**-0.5),
        ):
            # Uniform between ±1/√fan_in, times the scale.
            bound = scale / math.sqrt(linear.in_features)
            assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert mixer.conv1d.weight.abs().max().item() == pytest.approx(0.5, rel=0.02)
        assert (mixer.D == 1).all()
        for norm in (block.norm, block.norm2):
            assert (norm.weight == 1).all()
        if hasattr(mixer, "dt_proj"):
            torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
            steps = mixer.dt_proj.bias
        else:
            assert 1 <= mixer.A_log.exp().min() < mixer.A_log.exp().max() <= 16
            steps = mixer.dt_bias
        steps = torch.nn.functional.softplus(steps)
        assert 0.00099 <= steps.min() < steps.max() <= 0.101


def test_start():
    torch.manual_seed(0)
    _check_start(SSMForCausalLM(_big()))


def test_start_from_the_meta_device():
    with torch.device("meta"):
        model = SSMForCausalLM(_big())
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    _check_start(model)
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_the_same_seed_gives_the_same_model():
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(SSMForCausalLM(_big()).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(m.values() for m in models), strict=True))


def test_loading_draws_what_is_missing_and_nothing_else(small_model, tmp_path):
    """Of a layer, too, from which a file has all but a few parameters."""
    model = small_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = ("backbone.layers.0.mixer.D", "backbone.layers.0.mixer.out_proj.weight", "lm_head.weight")
    for name in missing:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = SSMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(missing)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert (state[missing[0]] == 1).all()
    # Three residual branches.
    bound = 1 / math.sqrt(loaded.backbone.layers[0].mixer.d_inner) / math.sqrt(3)
    assert 0.5 * bound < state[missing[1]].abs().max() <= bound
    assert 0 < state[missing[2]].std() < 1


ROADS = {
    "bfloat16": lambda model, folder: model.bfloat16(),
    "to": lambda model, folder: model.to(torch.bfloat16),
    "half": lambda model, folder: model.half(),
    "from_pretrained": lambda model, folder: SSMForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
    "config": lambda model, folder: SSMForCausalLM._from_config(model.config, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("road", list(ROADS))
def test_rates_stay_float32(small_model, tmp_path, road, tokens):
    model = small_model(("mamba", "mamba2"))
    model.save_pretrained(tmp_path)
    before = model.state_dict()
    narrow = ROADS[road](model, tmp_path)
    dtypes = {name: p.dtype for name, p in narrow.named_parameters()}
    assert all(dtype is torch.float32 for name, dtype in dtypes.items() if name.endswith(WIDE))
    assert all(dtype is torch.float32 for name, dtype in dtypes.items() if "norm" in name)
    rest = {dtype for name, dtype in dtypes.items() if not name.endswith(WIDE) and "norm" not in name}
    assert rest <= {torch.bfloat16, torch.float16}
    if road != "config":
        assert all(torch.equal(p, before[name]) for name, p in narrow.state_dict().items() if name.endswith(WIDE))
    logits = narrow.eval()(tokens).logits
    assert logits.dtype is torch.float32
    assert logits.isfinite().all()


def test_bfloat16_on_disk(small_model, tokens, tmp_path):
    model = small_model().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = SSMForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert p.dtype is q.dtype, name
        assert torch.equal(p, q)
