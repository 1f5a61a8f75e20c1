"""Parameters sharded over processes, block by block, by FSDP2; and the sums of gradients where they are not."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from ssmscan.layers import Block
from ssmscan.layers.mixer import Mixer
from ssmscan.shapes import error

# Numbers that are summed at once: a quarter of a gigabyte in float32.
_BUCKET = 2**26

DIMENSIONS = ("dp", "cp", "tp")


def shard_parameters(model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype | None, reshard: bool) -> None:
    """Shard the parameters of ``model`` over ``mesh``: those of a block together, and the rest together.

    Gradients are summed over the ranks, not averaged. With a ``param_dtype`` the blocks' matrices are gathered in it;
    the modules with a parameter that stays wide are small, and belong to the rest. What a block gathers it gives up
    after its forward where it is to ``reshard``, the rest after the backward.
    """
    dtype = dtype_of(model)
    inner = (module for module in model.modules() if module is not model)
    blocks: list[nn.Module] = [module for module in inner if isinstance(module, Block)]
    narrow = MixedPrecisionPolicy(param_dtype, reduce_dtype=dtype, cast_forward_inputs=False)
    if param_dtype is not None:
        for module in model.modules():
            if isinstance(module, Mixer):
                module.parameter_dtype = dtype
        for module in blocks or [model]:
            _shard([owner for owner in _owners(module) if not _stays_wide(owner)], mesh, narrow, reshard)
    else:
        for block in blocks:
            _shard(block, mesh, MixedPrecisionPolicy(), reshard)
    _shard(model, mesh, MixedPrecisionPolicy(), None)


def holders_of(function: str, mesh: DeviceMesh) -> DeviceMesh | None:
    """The ranks with tokens of their own, those of "dp" and "cp" together; None where there are none.

    ValueError, from ``function``, where the mesh is not one that they have.
    """
    names = mesh.mesh_dim_names or ()
    if not names or list(names) != [name for name in DIMENSIONS if name in names]:
        rule = f"mesh must have dimensions named {', '.join(DIMENSIONS)}, or some of them in this order"
        raise ValueError(error(function, rule, names, "Pass mesh_dim_names to init_device_mesh."))
    data = tuple(name for name in names if name != "tp")
    if len(data) < 2:
        return mesh[data] if data else None
    return mesh[data]._flatten()


@torch.no_grad()
def sum_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradients of a model whose parameters are whole on the ranks of "dp" and "cp", in place.

        dloss/dθ = Σ_ranks dloss_rank/dθ

    Args:
        model: of ``parallelize(model, mesh, shard=False)``, after the last backward of a step, and once in it. A
            gradient that there is none of counts as 0, and is there afterwards.
        mesh: that of the model. All its ranks call this together.

    Raises:
        ValueError: a mesh as :func:`parallelize` does not take it; the parameters are sharded, whose gradients the
            backward sums.

    Example, of one process; under torchrun the group is there already:
        >>> import tempfile, torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from ssmscan.distributed import parallelize, sum_gradients
        >>> from ssmscan.layers import GatedSSM
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        ...     mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        ...     layer = parallelize(GatedSSM(4), mesh, shard=False)
        ...     layer(torch.randn(2, 5, 4)).sum().backward()
        ...     sum_gradients(layer, mesh)
        ...     dist.destroy_process_group()
    """
    holders = holders_of("sum_gradients", mesh)
    if holders is None:
        return
    gradients = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            # Another rank may have one.
            parameter.grad = torch.zeros_like(parameter)
        gradient: Tensor = parameter.grad
        if isinstance(gradient, DTensor):
            if gradient.device_mesh.mesh_dim_names != ("tp",):
                rule = f"parameters must be whole on the ranks of {holders.mesh_dim_names}"
                raise ValueError(error("sum_gradients", rule, f"{name} sharded", "The backward sums their gradients."))
            gradient = gradient.to_local()
        gradients.append(gradient)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=holders.get_group())
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(to) for part, to in zip(parts, bucket, strict=True)])


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, so many as are summed at once."""
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        if bucket and (numbers + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket


def synchronise(model: nn.Module, now: bool) -> None:
    """Whether the backwards to come sum gradients over the ranks, and give up the weights that they gathered."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of all parameters, None where there are none; TypeError where they have several."""
    dtypes = sorted({parameter.dtype for parameter in model.parameters()}, key=str)
    if len(dtypes) > 1:
        rule, advice = "parameters to shard must be of one dtype", "Keep float32, and pass param_dtype under autocast."
        raise TypeError(error("parallelize", rule, dtypes, advice))
    return dtypes[0] if dtypes else None


def _shard(
    modules: nn.Module | list[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool | None
) -> None:
    fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    sharded = modules[0] if isinstance(modules, list) else modules
    assert isinstance(sharded, FSDPModule)
    sharded.set_gradient_divide_factor(1.0)
    # The factor would be a multiplication that not every backend has.
    sharded.set_force_sum_reduction_for_comms(True)


def _owners(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters of their own, as they were before tensor parallelism cut these into pieces."""
    for part in module.modules():
        if not isinstance(part, ParametrizationList) and _names(part):
            yield part


def _names(module: nn.Module) -> set[str]:
    whole = {name for name, _ in module.named_parameters(recurse=False)}
    return whole | set(getattr(module, "parametrizations", ()))


def _stays_wide(module: nn.Module) -> bool:
    return not _names(module).isdisjoint(getattr(module, "_keep_wide", ()))
