"""load_pretrained and export_pretrained: transformers' own models, state-spaces' files, and what is refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from ssmscan.models import SSMForCausalLM, load_pretrained

VOCABULARY = 19
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 5}
GROUPED = {"num_heads": 8, "head_dim": 4, "n_groups": 2, "time_step_limit": (0.01, 0.2), "pad_token_id": 0}
THEIRS = {
    "mamba": (transformers.MambaForCausalLM, transformers.MambaConfig, {}),
    "mamba_biased": (
        transformers.MambaForCausalLM,
        transformers.MambaConfig,
        {"use_bias": True, "use_conv_bias": False, "expand": 3, "conv_kernel": 3, "time_step_rank": 2},
    ),
    "falcon_mamba": (transformers.FalconMambaForCausalLM, transformers.FalconMambaConfig, {"mixer_rms_eps": 1e-4}),
    "mamba2": (transformers.Mamba2ForCausalLM, transformers.Mamba2Config, GROUPED),
    "mamba2_tied": (
        transformers.Mamba2ForCausalLM,
        transformers.Mamba2Config,
        GROUPED | {"n_groups": 1, "use_bias": True, "tie_word_embeddings": True},
    ),
}


def _their_model(name, disturb):
    model_class, config_class, fields = THEIRS[name]
    torch.manual_seed(0)
    return disturb(model_class(config_class(**COMMON, **fields))).eval()


@torch.no_grad()
def _logits(model, tokens, **keywords):
    return model(tokens, **keywords).logits


def _close(ours, theirs):
    """To 1e-5 of the largest logit."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", list(THEIRS))
def test_transformers_models(name, disturb, tokens, tmp_path):
    """The same logits, padded too, and the same tokens; and back again, tensor for tensor."""
    theirs = _their_model(name, disturb)
    if theirs.config.model_type == "mamba2" and theirs.config.n_groups > 1 and not _norms_groups():
        pytest.skip("this transformers takes the norm over the full width")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    assert not ours.training
    _close(_logits(ours, tokens), _logits(theirs, tokens))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    padded = _logits(ours, tokens, attention_mask=mask)
    _close(padded[:1, 4:], _logits(theirs, tokens[:1, 4:]))
    if not theirs.config.use_bias:
        # Theirs lets the bias of padded tokens into the convolution.
        _close(padded[mask.bool()], _logits(theirs, tokens, attention_mask=mask)[mask.bool()])

    ours.export_pretrained(tmp_path / "ours")
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert _material(back.config) == _material(theirs.config)
    for (key, p), (other, q) in zip(theirs.named_parameters(), back.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(p, q), key


def _norms_groups():
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)


def _material(config):
    """What of a config says how to compute; initialisation is ours."""
    immaterial = {"_name_or_path", "initializer_range", "architectures", "transformers_version", "dtype"}
    return {key: value for key, value in config.to_dict().items() if key not in immaterial}


def test_transformers_models_say_the_same(disturb, tokens, tmp_path):
    theirs = _their_model("mamba", disturb)
    theirs.save_pretrained(tmp_path)
    said = [model.generate(tokens, max_new_tokens=4, do_sample=False) for model in (theirs, load_pretrained(tmp_path))]
    assert torch.equal(*said)


def _state_spaces_file(folder, name, disturb):
    """A folder as the papers' code writes it, made from a model of transformers."""
    theirs = _their_model(name, disturb)
    weights = {key.replace("embeddings", "embedding"): p for key, p in theirs.state_dict().items()}
    ssm_cfg = {"d_state": 5}
    if name == "mamba2_tied":
        ssm_cfg |= {"layer": "Mamba2", "headdim": 4, "dt_limit": [0.01, 0.2], "bias": True}
    # 19 tokens, padded to a multiple of 8: the padding's rows are weights like others.
    padding = torch.zeros(5, 16)
    weights["backbone.embedding.weight"] = torch.cat([weights["backbone.embedding.weight"], padding])
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    config = {
        "d_model": 16,
        "n_layer": 2,
        "vocab_size": VOCABULARY,
        "ssm_cfg": ssm_cfg,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


@pytest.mark.parametrize("name", ["mamba", "mamba2_tied"])
def test_state_spaces_models(name, disturb, tokens, tmp_path):
    theirs = _state_spaces_file(tmp_path / "theirs", name, disturb)
    ours = load_pretrained(tmp_path / "theirs")
    assert ours.config.vocab_size == 24
    _close(_logits(ours, tokens)[..., :VOCABULARY], _logits(theirs, tokens))

    ours.export_pretrained(tmp_path / "ours", layout="state-spaces")
    written, read = (
        torch.load(tmp_path / folder / "pytorch_model.bin", weights_only=True) for folder in ("ours", "theirs")
    )
    assert written.keys() == read.keys()
    assert all(torch.equal(written[key], read[key]) for key in read)
    assert torch.equal(_logits(load_pretrained(tmp_path / "ours"), tokens), _logits(ours, tokens))


HYBRID = {
    "d_model": 16,
    "d_intermediate": 100,
    "n_layer": 3,
    "vocab_size": VOCABULARY,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8},
    "attn_layer_idx": [1],
    "attn_cfg": {
        "causal": True,
        "d_conv": 4,
        "head_dim": 12,
        "num_heads": 4,
        "num_heads_kv": 2,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_dim": 6,
    },
    "rms_norm": True,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": False,
}


def _hybrid_weights():
    """By the names and shapes of the papers' code; an MLP is 128 wide where it was asked to be 100."""
    shapes = {"backbone.embedding.weight": (32, 16), "backbone.norm_f.weight": (16,), "lm_head.weight": (32, 16)}
    mamba2 = {
        "in_proj.weight": (2 * 32 + 2 * 4 + 4, 16),
        "conv1d.weight": (32 + 8, 1, 4),
        "conv1d.bias": (32 + 8,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (32,),
        "out_proj.weight": (16, 32),
    }
    attention = {
        "in_proj.weight": (8 * 12, 16),
        "conv1d.weight": (8 * 12, 1, 4),
        "conv1d.bias": (8 * 12,),
        "out_proj.weight": (16, 4 * 12),
    }
    for i, mixer in enumerate((mamba2, attention, mamba2)):
        block = {"norm.weight": (16,), "norm2.weight": (16,), "mlp.fc1.weight": (256, 16), "mlp.fc2.weight": (16, 128)}
        block |= {f"mixer.{name}": shape for name, shape in mixer.items()}
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.empty(shape).normal_(std=0.5, generator=generator) for name, shape in shapes.items()}


def _hybrid_attention(weights, x):
    """The attention layer of the hybrid, one query at a time: (l, m) to (l, m)."""
    w = {
        name.removeprefix("backbone.layers.1.mixer."): tensor for name, tensor in weights.items() if ".1.mixer" in name
    }
    projected = x @ w["in_proj.weight"].T
    padded = F.pad(projected.T, (3, 0))
    taps = w["conv1d.weight"][:, 0]
    convolved = torch.stack([(padded[:, t : t + 4] * taps).sum(1) + w["conv1d.bias"] for t in range(len(x))])
    q, k, v = convolved.unflatten(1, (8, 12)).split([4, 2, 2], 1)

    def turn(part, t):
        """Channel i with channel i + 3, by an angle of t / 10000^(i / 3)."""
        angle = t * 10000.0 ** (-torch.arange(3.0) / 3)
        a, b, rest = part[..., :3], part[..., 3:6], part[..., 6:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), rest], -1)

    rows = []
    for t in range(len(x)):
        heads = []
        for head in range(4):
            query = turn(q[t, head], t)
            scores = torch.stack([query @ turn(k[j, head // 2], j) for j in range(t + 1)]) / math.sqrt(12)
            heads.append(scores.softmax(0) @ v[: t + 1, head // 2])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["out_proj.weight"].T


def test_a_state_spaces_hybrid(tokens, tmp_path):
    weights = _hybrid_weights()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(HYBRID))
    model = load_pretrained(tmp_path)
    assert model.config.mixers == ["mamba2", "attention", "mamba2"]
    assert (model.config.vocab_size, model.config.intermediate_size) == (32, 128)
    x = torch.randn(9, 16)
    with torch.no_grad():
        y = model.backbone.layers[1].mixer(x[None])[0]
        torch.testing.assert_close(y, _hybrid_attention(weights, x), rtol=0, atol=1e-5 * y.abs().max().item())
        value, gate = (x @ weights["backbone.layers.0.mlp.fc1.weight"].T).chunk(2, 1)
        expected = (value * F.silu(gate)) @ weights["backbone.layers.0.mlp.fc2.weight"].T
        torch.testing.assert_close(model.backbone.layers[0].mlp(x), expected, rtol=0, atol=1e-4)

    model.export_pretrained(tmp_path / "again", layout="state-spaces")
    written = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    again = load_pretrained(tmp_path / "again")
    assert torch.equal(_logits(again, tokens), _logits(model, tokens))
    assert again.config.mixer_options["attention"] | {"causal": True} == HYBRID["attn_cfg"] | {
        "rotary_emb_base": 10000.0,
        "causal": True,
    }


def test_our_own(model, tokens, tmp_path):
    """Also by transformers' way, whole and in several files."""
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="2KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    for folder in ("one", "several"):
        for loaded in (load_pretrained(tmp_path / folder), SSMForCausalLM.from_pretrained(tmp_path / folder)):
            assert torch.equal(_logits(loaded, tokens), _logits(model, tokens))
            assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(auto) is SSMForCausalLM


def test_untied(small_model, tokens, tmp_path):
    model = small_model("mamba", tie_word_embeddings=False)
    for save in (model.save_pretrained, model.export_pretrained):
        save(tmp_path)
        loaded = load_pretrained(tmp_path)
        assert loaded.lm_head.weight is not loaded.backbone.embeddings.weight
        assert torch.equal(_logits(loaded, tokens), _logits(model, tokens))
    model.export_pretrained(tmp_path / "state-spaces", layout="state-spaces")
    assert torch.equal(_logits(load_pretrained(tmp_path / "state-spaces"), tokens), _logits(model, tokens))


def test_pytorch_files_in_parts(small_model, tokens, tmp_path):
    model = small_model("mamba")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    parts = dict(list(weights.items())[:5]), dict(list(weights.items())[5:])
    index = {}
    for i, part in enumerate(parts):
        torch.save(part, tmp_path / f"part-{i}.bin")
        index |= dict.fromkeys(part, f"part-{i}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(_logits(load_pretrained(tmp_path), tokens), _logits(model, tokens))
    (tmp_path / "part-1.bin").unlink()
    with pytest.raises(ValueError, match=r"every file that pytorch_model\.bin\.index\.json names must exist"):
        load_pretrained(tmp_path)


def test_dtype_and_fields(small_model, tmp_path):
    small_model("mamba2").save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16, norm_groups=2, pad_token_id=3)
    assert loaded.dtype is torch.bfloat16
    assert loaded.backbone.layers[0].mixer.A_log.dtype is torch.float32
    assert loaded.config.norm_groups == 2
    assert loaded.generation_config.pad_token_id == 3


def test_generation_config(small_model, tmp_path):
    model = small_model("mamba")
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).generation_config.max_new_tokens == 3


def test_from_the_hub(small_model, tokens, tmp_path, monkeypatch):
    """A name that is no folder here is fetched file by file."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    model = small_model("mamba")
    model.save_pretrained(tmp_path)

    def fetch(name, file):
        assert name == "owner/name"
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert torch.equal(_logits(load_pretrained("owner/name"), tokens), _logits(model, tokens))


def test_nothing_but_tensors_is_unpickled(small_model, tmp_path):
    small_model("mamba").export_pretrained(tmp_path, layout="state-spaces")
    torch.save({"lm_head.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_pretrained(tmp_path)


D, HEAD = "backbone.layers.1.mixer.D", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda w: w.pop(D), rf"the tensors must be those of the config, got missing: {D}\.$"),
        (lambda w: w.pop("backbone.embeddings.weight"), r"missing: backbone\.embeddings\.weight, lm_head\.weight\."),
        (lambda w: w.update({D: torch.ones(8)}), rf"of another shape: {D} \(8,\) in place of \(16,\)\."),
        (lambda w: w.update({"backbone.layers.2.norm.weight": torch.ones(8)}), r"left over: backbone\.layers\.2\.norm"),
        (lambda w: w.update({HEAD: torch.ones(19, 8)}), rf"{HEAD} must be equal to backbone\.embeddings\.weight"),
    ],
)
def test_tensors_that_do_not_fit(small_model, tmp_path, change, part):
    small_model("mamba").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"^load_pretrained: .*{part}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "kind", "part"),
    [
        ({"model_type": "gpt2"}, ValueError, r"config\.json must be of ssmscan, .*, got model_type 'gpt2'"),
        ({"hidden": 8}, ValueError, r"config\.json must be of .*, got model_type None"),
        (HYBRID | {"rms_norm": False}, NotImplementedError, "rms_norm must be True, got False"),
        (
            HYBRID | {"ssm_cfg": {"layer": "Mamba3"}},
            NotImplementedError,
            "layer must be of Mamba1, .* got 'Mamba3'",
        ),
        (
            HYBRID | {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}},
            NotImplementedError,
            "D_has_hdim must be False",
        ),
        ({"model_type": "mamba", "hidden_act": "gelu"}, NotImplementedError, "hidden_act must be 'silu', got 'gelu'"),
        ({"model_type": "falcon_mamba", "intermediate_size": 800}, NotImplementedError, "width of the scan must be"),
    ],
)
def test_configs_that_are_not_ours(tmp_path, config, kind, part):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=f"load_pretrained: .*{part}"):
        load_pretrained(tmp_path)


def test_places_without_a_model(small_config, tmp_path):
    with pytest.raises(ValueError, match=r"must hold config\.json, got none"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"path_or_name must be a folder, or a model on the hub .* got 'run'"):
        load_pretrained("run")
    small_config("mamba").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold one of model\.safetensors, .*, got none"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("shape", "fields", "layout", "part"),
    [
        ("hybrid", {}, "transformers", "mixers must be all mamba or all mamba2, got attention, mamba, mamba2"),
        ("hybrid", {}, "state-spaces", "mixers must be mamba or mamba2, with or without attention"),
        ("mamba", {"intermediate_size": 16}, "transformers", "intermediate_size must be 0, got 16"),
        ("mamba", {"intermediate_size": 16}, "state-spaces", "intermediate_size must be a multiple of 128, got 16"),
        ("mamba", {"norm_eps": 1e-6}, "state-spaces", "norm_eps must be 1e-05, got 1e-06"),
        ("mamba2", {"norm_groups": 2}, "state-spaces", "norm_groups must be ngroups = 1, got 2"),
        ("mamba2", {"norm_groups": 2}, "transformers", "norm_groups must be ngroups = 1, got 2"),
        (("gated_ssm",), {}, "transformers", "mixers must be all mamba or all mamba2, got gated_ssm"),
    ],
)
def test_models_that_a_layout_cannot_hold(small_model, tmp_path, shape, fields, layout, part):
    with pytest.raises(NotImplementedError, match=f"^export_pretrained: {part}"):
        small_model(shape, **fields).export_pretrained(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout(small_model, tmp_path):
    with pytest.raises(ValueError, match="layout must be of transformers, state-spaces, got 'onnx'"):
        small_model("mamba").export_pretrained(tmp_path, layout="onnx")
