"""Models on a mesh against one process, on the CPU with gloo: outputs, states, gradients and 20 steps of training."""

import gc
import warnings
import weakref
from datetime import timedelta

import mesh_cases as cases
import pytest
import torch
import torch.distributed as dist
from ranks import Calls, start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ssmscan.distributed import full_state_dict, parallelize, sharding, sum_gradients
from ssmscan.distributed.sequence import SplitContext
from ssmscan.layers import S4D, Attention, GatedSSM, decay_groups

# Two ranks have a group of its norm each, and of four ranks two have one together.
PAIRS = "mamba2_pairs"
ALL = tuple(name for name in cases.LAYERS if name != PAIRS)
FEW = ("mamba2", "mamba2_groups", "attention", "attention_rich")
SPLIT = tuple(name for name in ALL if name not in ("s4d", "hydra"))
HYBRID, SMALL = cases.MIXERS, ["mamba2", "attention"]
# By the number of ranks and the mesh: layers with the settings in which they run, and the mixers of models to train.
MESHES = {
    (2, "cp2"): [(ALL, ("plain",))],
    (2, "tp2"): [(SPLIT, ("packed", "state"))],
    (4, "cp4"): [(ALL, cases.SETTINGS)],
    (4, "tp4"): [((*FEW, PAIRS), ("state",))],
    (4, "cp2,tp2"): [(("mamba", *FEW), ("packed",))],
}
RUNS = {
    (2, "dp2"): {torch.float64: HYBRID, torch.float32: SMALL},
    (2, "cp2"): {torch.float64: HYBRID, torch.float32: SMALL},
    (2, "tp2"): {torch.float64: HYBRID, torch.float32: SMALL},
    (4, "dp2,cp2"): {torch.float64: SMALL},
    (4, "cp2,tp2"): {torch.float64: SMALL, torch.float32: SMALL},
}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def _rows(ranks):
    """What a start of so many ranks computes: a name, the mesh, the function and its arguments."""
    for (number, mesh), groups in MESHES.items():
        if number == ranks:
            for names, settings in groups:
                for name in names:
                    for setting in settings:
                        if not (setting == "state" and name in cases.BOTH_SIDES):
                            yield f"{mesh} {name} {setting}", mesh, cases.run_layer, (name, setting)
    for (number, mesh), runs in RUNS.items():
        if number == ranks:
            for dtype, mixers in runs.items():
                yield f"{mesh} training {dtype}", mesh, cases.run_training, (mixers, dtype)


def _mesh(dims):
    """ "cp2,tp2" as a mesh."""
    names, sizes = zip(*((dim[:2], int(dim[2:])) for dim in dims.split(",")), strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _worker(rank, ranks, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    meshes = {}
    results = {}
    for name, dims, function, arguments in _rows(ranks):
        if dims not in meshes:
            meshes[dims] = _mesh(dims)
        results[name] = function(*arguments, meshes[dims])
    if ranks == 2:
        for check in (
            _meets_seldom,
            _is_compiled,
            _repeats,
            _recomputes,
            _gathers_narrow,
            _has_the_weights_it_keeps,
            _averages,
            _sums_in_buckets,
            _reads_a_prompt,
            _keeps_the_weights,
            _refuses_what_does_not_divide,
        ):
            check(meshes)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _meets_seldom(meshes):
    """Attention over ranks: lengths, keys and values together, and the gradients of both."""
    layer, x = Attention(cases.M, num_heads=4, num_heads_kv=2), torch.randn(1, 6, cases.M)
    layer.context = SplitContext(meshes["cp2"].get_group("cp"))
    with Calls() as calls:
        layer(x).sum().backward()
    assert sum(count for function, count in calls.counts.items() if function.namespace == "c10d") == 3


def _is_compiled(meshes):
    """A compiled layer, with all that crosses ranks: its outputs and gradients."""
    x = torch.randn(2, cases.L, cases.M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    part = cases.part_of(meshes["cp2"], 2)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = parallelize(cases.LAYERS["attention_rich"](dtype=torch.float64), meshes["cp2"])
        with warnings.catch_warnings():
            # The compiler's own, as of the gradients it looks at.
            warnings.simplefilter("ignore")
            y = (torch.compile(layer, backend="aot_eager") if compiled else layer)(x[part])
        y.sin().sum().backward()
        results.append({"y": y.detach()} | cases.gathered(layer, lambda p: p.grad))
    assert all(torch.allclose(results[1][name], value, rtol=0, atol=1e-12) for name, value in results[0].items())


def _repeats(meshes):
    """The same bits from run to run."""
    first, second = (cases.run_layer("mamba2", "packed", meshes["cp2"]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _recomputes(meshes):
    """Gradients under activation checkpointing, whose forward runs again in the backward, collectives and all."""
    tokens = torch.randint(0, 12, (2, cases.L))
    gradients = []
    for again in (False, True):
        model = cases.build_model(["mamba2", "attention"])
        if again:
            # Its name from transformers 5.24 on, and the one before.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": False, "preserve_rng_state": False})
        parallelize(model, meshes["cp2"])
        part = cases.part_of(meshes["cp2"], 2)
        model(tokens[part], shift_labels=tokens[part]).loss.backward()
        gradients.append(cases.gathered(model, lambda p: p.grad))
    assert gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def _gathers_narrow(meshes):
    """Matrices come in bfloat16 and rates of decay in float32; the gradients are those of float32 parameters."""
    tokens = torch.randint(0, 12, (2, cases.L), generator=torch.Generator().manual_seed(1))
    losses, gradients, seen = [], [], {}
    for mesh in (None, meshes["cp2"]):
        model = cases.build_model(["mamba", "mamba2"], torch.float32)
        part = cases.Part() if mesh is None else cases.part_of(mesh, 2)
        if mesh is not None:
            parallelize(model, mesh, param_dtype=torch.bfloat16)
        for block in model.backbone.blocks:
            for name in ("in_proj.weight", "conv1d.weight", "A_log", "D"):
                owner = block.mixer.get_submodule(name.rpartition(".")[0])
                owner.register_forward_hook(
                    lambda owner, *_, name=name: seen.update({name: getattr(owner, name.rpartition(".")[2]).dtype})
                )
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(tokens[part], shift_labels=tokens[part]).loss)
        losses[-1].backward()
        gradients.append(cases.gathered(model, lambda p: p.grad))
    narrow = dict.fromkeys(("in_proj.weight", "conv1d.weight"), torch.bfloat16)
    assert seen == narrow | dict.fromkeys(("A_log", "D"), torch.float32)
    assert abs(losses[1] - losses[0]) < 1e-3
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert found.dtype is torch.float32
        assert torch.allclose(found, expected, rtol=0, atol=0.06 * expected.abs().max().item()), name


def _has_the_weights_it_keeps(meshes):
    """After a forward alone, which leaves gathered matrices in bfloat16, they are those before it to the bit."""
    model = cases.build_model(["mamba2"], torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parallelize(model, meshes["cp2"], param_dtype=torch.bfloat16, reshard_after_forward=False)
    tokens = torch.randint(0, 12, (2, cases.L), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens[cases.part_of(meshes["cp2"], 2)])
    found = full_state_dict(model)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def _averages(meshes):
    """Plain DDP: the mean of the ranks' gradients is that of the batch, where they have as many tokens each."""
    tokens = torch.randint(0, 12, (4, cases.L), generator=torch.Generator().manual_seed(1))
    alone, model = (cases.build_model(cases.MIXERS) for _ in range(2))
    alone(tokens, labels=tokens, return_logits=False).loss.backward()
    own = tokens.tensor_split(2)[dist.get_rank()]
    wrapped = DistributedDataParallel(model)
    wrapped(own, labels=own, return_logits=False).loss.backward()
    for expected, found in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-10, atol=1e-10)


def _sums_in_buckets(meshes):
    """Gradients of parameters that are whole: those of the batch, in whatever pieces and dtypes they are summed."""
    tokens = torch.randint(0, 12, (4, cases.L), generator=torch.Generator().manual_seed(1))
    alone = cases.build_model(cases.MIXERS)
    alone.backbone.norm_f.float()
    alone(tokens, labels=tokens).loss.backward()
    own = tokens.tensor_split(2)[dist.get_rank()]
    for size in (1, 50, 10**6):
        model = parallelize(cases.build_model(cases.MIXERS), meshes["dp2"], shard=False)
        model.backbone.norm_f.float()
        model(own, labels=own).loss.backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "_BUCKET", size)
            sum_gradients(model, meshes["dp2"])
        for (name, expected), found in zip(alone.named_parameters(), model.parameters(), strict=True):
            bound = 1e-6 if expected.dtype == torch.float32 else 1e-10
            assert torch.allclose(found.grad, expected.grad, rtol=0, atol=bound), (size, name)
    # Each rank has used one of two layers.
    model = parallelize(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)]), meshes["dp2"], shard=False)
    model[dist.get_rank()](torch.ones(1, 4)).sum().backward()
    sum_gradients(model, meshes["dp2"])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    with pytest.raises(ValueError, match="sum_gradients: mesh must have dimensions named dp, cp, tp"):
        sum_gradients(model, init_device_mesh("cpu", (2,)))
    shared = parallelize(cases.build_model(cases.MIXERS), meshes["dp2"])
    shared(own, labels=own).loss.backward()
    with pytest.raises(ValueError, match=r"sum_gradients: parameters must be whole on .*'dp'.*, got .* sharded"):
        sum_gradients(shared, meshes["dp2"])


@torch.no_grad()
def _reads_a_prompt(meshes):
    """A cache after a prompt that the ranks share is that of the whole prompt: the next token's scores show it."""
    tokens = torch.randint(0, 12, (2, 80), generator=torch.Generator().manual_seed(1))
    model = cases.build_model(["mamba", "attention"]).eval()
    expected = model(tokens).logits[:, -1]
    parallelize(model, meshes["cp2"])
    rank = dist.get_rank()
    # More than there is room for at first.
    assert model(tokens, use_cache=None).cache is None
    cache = model.make_cache(2)
    model(tokens[:, :79].tensor_split(2, 1)[rank], cache=cache)
    assert cache.get_seq_length() == 79
    logits = model(tokens[:, 79:] if rank == 1 else tokens[:, 80:], cache=cache).logits
    assert rank == 0 or torch.allclose(logits[:, -1], expected, rtol=0, atol=1e-6)


def _keeps_the_weights(meshes):
    """Weights go into pieces and come back, with their groups of decay; a head shares its embedding's as before."""
    for mesh in meshes.values():
        for tied in (True, False):
            model = cases.build_model(["mamba", "mamba2", "rg_lru"], tie_word_embeddings=tied)
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            sizes = [sum(p.numel() for p in group) for group in decay_groups(model)]
            first = weakref.ref(model.backbone.embeddings.weight)
            with torch.no_grad():
                parallelize(model, mesh)
            gc.collect()
            assert first() is None, "a whole parameter is still in memory"
            assert all(p.requires_grad for p in model.parameters())
            after = full_state_dict(model)
            assert sorted(after) == sorted(before)
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert [sum(p.numel() for p in group) for group in decay_groups(model)] == sizes


def _refuses_what_does_not_divide(meshes):
    for layer, got in (
        (Attention(6, num_heads=3), "heads of Attention"),
        (GatedSSM(3, expand=1), "rows or columns of weight"),
    ):
        with pytest.raises(ValueError, match=rf"parallelize: the {got}.* must be a multiple of the 2 ranks of tp"):
            parallelize(layer, meshes["tp2"])
    for name in ("shard", "reshard_after_forward"):
        with pytest.raises(TypeError, match=f"parallelize: {name} must be True or False, got 'no'"):
            parallelize(GatedSSM(4), meshes["dp2"], **{name: "no"})
    for mesh in (meshes["dp2"], meshes["tp2"]):
        with pytest.raises(ValueError, match="parallelize: model must be whole, got one that is on a mesh already"):
            parallelize(parallelize(GatedSSM(4), mesh), meshes["tp2"])
    # The layers before the one that is refused are as they were.
    _refused(nn.ModuleList([Attention(4, num_heads=2), Attention(6, num_heads=3)]), meshes["tp2"], ValueError)


def _refused(model, mesh, error):
    """``parallelize`` raises, and leaves the model as it was."""
    parts = {name: vars(module).copy() for name, module in model.named_modules()}
    tensors = dict(model.named_parameters())
    with pytest.raises(error, match="parallelize: "):
        parallelize(model, mesh)
    assert {name: vars(module) for name, module in model.named_modules()} == parts
    assert all(tensor is tensors.pop(name) for name, tensor in model.named_parameters())
    assert not tensors


@pytest.fixture(scope="module", params=(2, 4), ids=lambda ranks: f"{ranks} ranks")
def ran(request, tmp_path_factory):
    """The results of all ranks: one start of processes for all rows."""
    folder = tmp_path_factory.mktemp("ranks")
    start(_worker, request.param, folder)
    return request.param, [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def test_a_mesh_makes_what_one_process_makes(ran):
    ranks, results = ran
    expected = {}
    for name, _, function, arguments in _rows(ranks):
        key = function, str(arguments)
        if key not in expected:
            expected[key] = function(*arguments)
        bound = BOUNDS[arguments[1]] if function is cases.run_training else 1e-10
        for result in results:
            for part, value in expected[key].items():
                # Ranks of tp have each a part of a state.
                if part.startswith("state") and "tp" in name:
                    continue
                found = result[name][part]
                assert found.shape == value.shape, f"{name} {part}"
                assert torch.allclose(found, value, rtol=bound, atol=bound), f"{name} {part}"


def _on_gpus(rank, ranks, folder):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, device_id=device
    )
    tokens = torch.randint(0, 12, (4, cases.L), generator=torch.Generator().manual_seed(1)).to(device)
    for name in ("dp", "cp", "tp"):
        mesh = init_device_mesh("cuda", (ranks,), mesh_dim_names=(name,))
        losses, gradients = [], []
        for part in (cases.Part(), cases.part_of(mesh, 4)):
            model = cases.build_model(cases.MIXERS, torch.float32).to(device)
            if losses:
                parallelize(model, mesh)
            losses.append(model(tokens[part], shift_labels=tokens[part], return_logits=False).loss)
            losses[-1].backward()
            gradients.append(cases.gathered(model, lambda p: p.grad))
        assert torch.allclose(*losses, rtol=1e-5)
        for path, expected in gradients[0].items():
            error = (gradients[1][path] - expected).abs().max()
            assert error <= 1e-3 * expected.abs().max().clamp(min=1e-3), f"{name} {path}"
    dist.destroy_process_group()


@pytest.mark.gpu
def test_on_gpus(tmp_path):
    """On two, or what there is of them: the kernels, and NCCL."""
    start(_on_gpus, min(torch.cuda.device_count(), 2), tmp_path)


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_refusals(alone):
    for names in (None, ("x",), ("cp", "dp")):
        mesh = init_device_mesh("cpu", (1,) * len(names or "x"), mesh_dim_names=names)
        with pytest.raises(ValueError, match="parallelize: mesh must have dimensions named dp, cp, tp"):
            parallelize(GatedSSM(2), mesh)
    with pytest.raises(NotImplementedError, match=r'layers must be of GatedSSM, .* on a mesh with "tp", got S4D'):
        parallelize(S4D(2), _mesh("tp1"))
    with pytest.raises(TypeError, match=r"parallelize: parameters to shard must be of one dtype, got \[torch.bf"):
        parallelize(GatedSSM(2, dtype=torch.bfloat16), _mesh("dp1"))
    _refused(nn.ModuleList([GatedSSM(2), S4D(2)]), _mesh("cp1,tp1"), NotImplementedError)
    _refused(nn.ModuleList([GatedSSM(2), GatedSSM(2, dtype=torch.bfloat16)]), _mesh("dp1,tp1"), TypeError)
    model = parallelize(cases.build_model(["gated_ssm"]), _mesh("cp1"))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="SSMForCausalLM: shift_labels must be given in place of labels"):
        model(tokens, labels=tokens)
