"""transformers' own state-space models on our operations compute what they compute on their own."""

import functools
import importlib
import inspect
import itertools

import pytest
import torch
from transformers_models import MODELS, VOCABULARY, build, patched

import ssmscan
from ssmscan.models.patch import apply
from ssmscan.models.patch.replacements import unfused
from ssmscan.testing import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
transformers = pytest.importorskip("transformers")
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
ARCHITECTURES = pytest.mark.parametrize("architecture", MODELS)
UNPACKED = ("mamba", "falcon_mamba", "jamba", "recurrent_gemma")
PACKED = pytest.mark.parametrize("architecture", [name for name in MODELS if name not in UNPACKED])
# One token of its mixer has its own, with multipliers.
STEPPED = [name for name in MODELS if name not in ("falcon_h1", "recurrent_gemma")]
LENGTH = 11


def _ids(batch=2, length=LENGTH):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def _close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert torch.all((actual - expected).abs().max() <= tolerance * expected.abs().max())


def _trained(model, ids, **inputs):
    """The logits and all gradients of a training step."""
    model.zero_grad()
    output = model.train()(input_ids=ids, labels=ids, use_cache=False, **inputs)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _cache(output):
    return output.cache if "cache" in output else output.get("cache_params", output.get("past_key_values"))


def _continued(model, ids, output):
    """The output for one more token after the cache of another."""
    name = next(name for name in ("cache", "cache_params", "past_key_values") if name in output)
    return model(input_ids=ids, use_cache=True, **{name: output[name]})


def _mixer(model):
    """The first layer with a scan, as a module of its own."""
    return next(module for module in model.modules() if hasattr(module, "A_log"))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [*((architecture, {}) for architecture in MODELS), ("mamba2", {"time_step_limit": (0.01, 1.0)})],
)
def test_training(architecture, options):
    model, ids = build(architecture, **options), _ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for inputs in ({}, {"attention_mask": mask}):
        logits, gradients = _trained(model, ids, **inputs)
        with patched():
            patched_logits, patched_gradients = _trained(model, ids, **inputs)
        real = mask.bool() if inputs else torch.ones_like(mask).bool()
        _close(patched_logits[real], logits[real], 1e-5)
        assert gradients.keys() == patched_gradients.keys()
        for name, gradient in gradients.items():
            _close(patched_gradients[name], gradient, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mamba", "falcon_mamba", "jamba", "mamba2", "falcon_h1", "granitemoehybrid"])
def test_steps_are_the_whole(architecture):
    """Of the others transformers' own steps are not, or the cache is hidden; test_generate has them."""
    model, ids = build(architecture), _ids()
    with patched():
        whole = model(input_ids=ids, use_cache=False).logits
        outputs = [model(input_ids=ids[:, :6], use_cache=True)]
        for t in range(6, LENGTH):
            outputs.append(_continued(model, ids[:, t : t + 1], outputs[-1]))
    _close(torch.cat([output.logits for output in outputs], 1), whole, 1e-5)


@torch.no_grad()
@ARCHITECTURES
def test_generate(architecture):
    """The same tokens greedily, from prompts padded on the left, and from beams, whose caches are reordered."""
    if architecture == "falcon_h1" and RELEASE < (5, 24):
        pytest.skip("its own decoding of a batch fails there")
    model, ids = build(architecture), _ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in ({}, {"attention_mask": mask}, {"num_beams": 3}):
        expected = model.generate(ids, max_new_tokens=7, do_sample=False, **inputs)
        with patched():
            assert torch.equal(model.generate(ids, max_new_tokens=7, do_sample=False, **inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 6])
@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_cache(architecture, length):
    """The cache after some steps is the one that transformers would have, where it lay before."""
    model, ids = build(architecture), _ids()

    def run():
        output = model(input_ids=ids[:, :length], use_cache=True)
        layer = _cache(output).layers[0]
        before = layer.conv_states[0], layer.recurrent_states[0]
        for t in range(length, length + 3):
            output = _continued(model, ids[:, t : t + 1], output)
        layer = _cache(output).layers[0]
        assert before[0] is layer.conv_states[0]
        assert before[1] is layer.recurrent_states[0]
        return before

    expected = run()
    with patched():
        for state, theirs in zip(run(), expected, strict=True):
            _close(state, theirs, 1e-5)


def _unstepped(monkeypatch, architecture):
    """Have the mixer's own forward refuse to take one token, as a step is to take it; return the refusal's text."""
    mixer = type(_mixer(build(architecture)))
    forward = mixer.forward

    @functools.wraps(forward)
    def refusing(self, hidden_states, *args, **kwargs):
        assert hidden_states.shape[1] > 1, "one token"
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(mixer, "forward", refusing)
    return "one token"


@torch.no_grad()
@pytest.mark.parametrize("architecture", STEPPED)
def test_one_token_is_a_step(architecture, monkeypatch):
    """Of the whole mixer; what needs more than that goes to the mixer's own forward."""
    refusal = _unstepped(monkeypatch, architecture)
    model, ids = build(architecture), _ids()
    tokens = model.generate(ids, max_new_tokens=1, do_sample=False)
    with patched():
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False)[:, : LENGTH + 1], tokens)
        mixer, cache = _mixer(model), transformers.DynamicCache(config=model.config)
        x = torch.randn(2, LENGTH, mixer.in_proj.in_features)
        # Releases differ in its name.
        named = {name: cache for name in inspect.signature(mixer.forward).parameters if name.startswith("cache")}

        def step(**inputs):
            return mixer(x[:, :1], **named, **inputs)

        def refused(**inputs):
            with pytest.raises(AssertionError, match=refusal):
                step(**inputs)

        with pytest.raises(AssertionError, match=refusal):
            mixer(x[:, :1])
        refused()
        mixer(x, **named)
        step()
        refused(attention_mask=torch.ones(2, 1))
        with torch.enable_grad():
            refused()
        mixer.conv1d._hf_hook = None
        refused()
        del mixer.conv1d._hf_hook
        step()
        cache.layers[mixer.layer_idx].record_past = True
        refused()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_bfloat16_steps(architecture):
    """In bfloat16, weights and all or by autocast, a step is no further from float32 than without the patch."""
    model, ids = build(architecture), _ids(8)

    def continued(model):
        outputs = [model(input_ids=ids[:, :8], use_cache=True)]
        for t in range(8, LENGTH):
            outputs.append(_continued(model, ids[:, t : t + 1], outputs[-1]))
        return torch.cat([output.logits for output in outputs[1:]])

    exact = continued(model)

    def errors():
        with torch.autocast("cpu", torch.bfloat16):
            mixed = continued(model)
        narrow = continued(build(architecture).bfloat16())
        return [((logits.float() - exact).square().mean() ** 0.5).item() for logits in (mixed, narrow)]

    theirs = errors()
    with patched():
        ours = errors()
    assert all(our <= 1.25 * their for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


def test_chunks_are_the_whole():
    """Several tokens onto the cache of Mamba-2."""
    model, ids = build("mamba2"), _ids()
    with patched(), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = _continued(model, ids[:, 5:], first)
    _close(torch.cat([first.logits, second.logits], 1), whole, 1e-5)


@PACKED
def test_packed(architecture):
    """Sequences packed in the rows of a batch, at other places in each row, are as each of them alone."""
    model = build(architecture)
    mixer = _mixer(model)
    x = torch.randn(2, LENGTH, mixer.in_proj.in_features, requires_grad=True)
    cuts = ((0, 4, LENGTH), (0, 1, LENGTH))
    seq_idx = torch.tensor([[0] * 4 + [1] * 7, [7] + [3] * 10], dtype=torch.int32)
    with patched():
        alone = [mixer(x[i : i + 1, a:b]) for i, row in enumerate(cuts) for a, b in itertools.pairwise(row)]
        expected = torch.cat([torch.cat(alone[:2], 1), torch.cat(alone[2:], 1)])
        y = mixer(x, seq_idx=seq_idx)
        weight = torch.randn_like(y)
        of = [x, *mixer.parameters()]
        gradients, expected_gradients = (torch.autograd.grad((out * weight).sum(), of) for out in (y, expected))
        # The whole model tells its layers.
        told = []
        mixer.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["seq_idx"]), with_kwargs=True)
        model(input_ids=_ids(), use_cache=False, seq_idx=seq_idx)
        assert len(told) == 1
        assert told[0] is seq_idx
    _close(y, expected, 1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        _close(gradient, expected_gradient, 1e-4)


def test_packed_model():
    """A whole model, by bounds too; the numbers of the sequences are read anew when they changed."""
    model, ids = build("mamba2"), _ids(1)
    seq_idx = torch.tensor([[0] * 4 + [1] * 7], dtype=torch.int32)
    with patched(), torch.no_grad():
        alone = [model(input_ids=part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:])]
        bounds = torch.tensor([0, 4, LENGTH])
        for inputs in ({"seq_idx": seq_idx}, {"cu_seqlens": bounds}):
            _close(model(input_ids=ids, use_cache=False, **inputs).logits, torch.cat(alone, 1), 1e-5)
        seq_idx.zero_()
        whole = model(input_ids=ids, use_cache=False).logits
        assert same_bits(model(input_ids=ids, use_cache=False, seq_idx=seq_idx).logits, whole)
        with torch.inference_mode():
            assert same_bits(model(input_ids=ids, use_cache=False, seq_idx=seq_idx.clone()).logits, whole)


def test_packed_cache():
    """What is cached of packed sequences is the end of the last one in each row."""
    model, ids = build("mamba2"), _ids()
    seq_idx = torch.tensor([[0] * 4 + [1] * 7, [0] * 2 + [1] * 9])
    with patched(), torch.no_grad():
        output = model(input_ids=ids, use_cache=True, seq_idx=seq_idx)
        y = _continued(model, ids[:, :1], output).logits
        for row, start in enumerate((4, 2)):
            one = ids[row : row + 1]
            alone = _continued(model, one[:, :1], model(input_ids=one[:, start:], use_cache=True)).logits
            _close(y[row : row + 1], alone, 1e-5)
        with pytest.raises(ValueError, match="seq_idx must have shape"):
            model(input_ids=ids, use_cache=False, seq_idx=seq_idx[:, 1:])


@pytest.mark.parametrize("argument", ["seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("architecture", UNPACKED)
def test_packed_refused(architecture, argument):
    """By the models that would run the sequences into one another; unpatched they take the argument for nothing."""
    model, ids = build(architecture), _ids()
    with patched(), pytest.raises(NotImplementedError, match=f"{argument} must be None"):
        model(input_ids=ids, **{argument: torch.zeros_like(ids)})


@pytest.mark.parametrize("architecture", ["mamba", "jamba", "mamba2", "zamba2"])
def test_lora(architecture, monkeypatch):
    """An adapter of in_proj is trained, also where a fused kernel would go around it, and takes part in steps."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        build(architecture), peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False)
    )
    ids = _ids()
    logits, gradients = _trained(model, ids)

    def fused(*args, **kwargs):
        raise AssertionError("the projections were not called")

    file = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    name = "mamba2_split_conv1d_scan_combined" if architecture in ("mamba2", "zamba2") else "mamba_inner_fn"
    monkeypatch.setattr(file, name, fused)

    def stepped():
        with torch.no_grad():
            return _continued(model.eval(), ids[:, :1], model(input_ids=ids, use_cache=True)).logits

    expected = stepped()
    with patched():
        patched_logits, patched_gradients = _trained(model, ids)
        _close(stepped(), expected, 1e-5)
    _close(patched_logits, logits, 1e-5)
    assert any("lora_A" in name and gradient.abs().sum() > 0 for name, gradient in patched_gradients.items())
    for name, gradient in gradients.items():
        _close(patched_gradients[name], gradient, 1e-4)


@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_checkpointing(architecture):
    """Activations recomputed in the backward, of packed sequences where those can be."""
    model, ids = build(architecture), _ids()
    inputs = {} if architecture in UNPACKED else {"seq_idx": (torch.arange(LENGTH) // 4).expand(2, -1)}
    with patched():
        _, gradients = _trained(model, ids, **inputs)
        model.gradient_checkpointing_enable()
        _, recomputed = _trained(model, ids, **inputs)
    assert all(same_bits(recomputed[name], gradient) for name, gradient in gradients.items())


@pytest.mark.gpu
@ARCHITECTURES
def test_on_gpu(architecture):
    """As transformers computes it there, up to the rounding of the GPU's matrix products; and its own tokens."""
    model, ids = build(architecture).cuda(), _ids().cuda()
    logits, gradients = _trained(model, ids)
    with patched():
        patched_logits, patched_gradients = _trained(model, ids)
        with torch.no_grad():
            whole = model.eval()(input_ids=ids, use_cache=False).logits
            tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
            again = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
    _close(patched_logits, logits, 1e-3)
    _close(whole, logits, 1e-3)
    for name, gradient in gradients.items():
        _close(patched_gradients[name], gradient, 1e-2)
    assert torch.equal(tokens[:, LENGTH:], again[:, LENGTH - 1 : -1])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mamba", "mamba2", "falcon_h1", "recurrent_gemma"])
def test_bfloat16(architecture):
    """In bfloat16, weights and all or by autocast, no further from float32 than without the patch."""
    model, ids = build(architecture), _ids()
    exact = model(input_ids=ids, use_cache=False).logits

    def errors():
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(input_ids=ids, use_cache=False).logits
        narrow = build(architecture).bfloat16()(input_ids=ids, use_cache=False).logits
        assert narrow.isfinite().all()
        return [((logits.float() - exact).square().mean() ** 0.5).item() for logits in (mixed, narrow)]

    theirs = errors()
    with patched():
        ours = errors()
    assert all(our <= 1.25 * their for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_compiled(architecture):
    model, ids = build(architecture), _ids()
    with patched(), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        _close(compiled(input_ids=ids, use_cache=False).logits, expected, 1e-5)


def _places():
    """Everything in the model files that a patch could change: functions, classes and their methods."""
    found = {}
    for architecture in apply.REPLACEMENTS:
        file = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
        for name, value in vars(file).items():
            found[architecture, name] = value
            if isinstance(value, type) and value.__module__ == file.__name__:
                found.update({(architecture, name, method): its for method, its in vars(value).items()})
    return found


def test_unpatch():
    """What was there is there again, the very same, also after a second patch."""
    before = _places()
    with patched():
        ssmscan.patch_transformers()
        changed = {place for place, value in _places().items() if value is not before[place]}
    missing = {("nemotron_h", "Zamba2RMSNormGated"), ("nemotron_h", "NemotronHRMSNormGated")}
    expected = {
        (architecture, *path.split(".")) for architecture, paths in apply.REPLACEMENTS.items() for path in paths
    }
    assert {place for place in changed ^ expected if place[:2] not in missing} == set()
    after = _places()
    assert after.keys() == before.keys()
    assert all(value is before[place] for place, value in after.items())
    ssmscan.unpatch_transformers()


def test_one_architecture():
    mamba, mamba2 = (
        importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in ("mamba", "mamba2")
    )
    with patched("mamba"):
        assert mamba.mamba_inner_fn is unfused
        assert mamba2.mamba2_split_conv1d_scan_combined is not unfused
        ssmscan.patch_transformers("mamba2")
        assert mamba2.mamba2_split_conv1d_scan_combined is unfused
    assert unfused not in (mamba.mamba_inner_fn, mamba2.mamba2_split_conv1d_scan_combined)


def test_models_made_under_the_patch():
    ids = _ids()
    with patched():
        model = build("mamba2")
        inside = model(input_ids=ids, use_cache=False).logits
    _close(model(input_ids=ids, use_cache=False).logits, inside, 1e-5)
    assert not same_bits(model(input_ids=ids, use_cache=False).logits, inside), "it was not patched"


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"must be one of mamba, .*, got 'rwkv'"):
        ssmscan.patch_transformers("mamba", "rwkv")
    assert not apply._replaced
    for version in ("5.16.2", "5.25.0.dev0", "6.0.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        with pytest.raises(NotImplementedError, match=rf"5\.17 to 5\.24, got {version}"):
            ssmscan.patch_transformers()
    with pytest.raises(AttributeError, match="no attribute 'patch'"):
        _ = ssmscan.patch
