"""The whole of a model's parameters, from what each process has of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils.parametrize import ParametrizationList

from ssmscan.distributed.splitter import Local


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that a model had before :func:`parallelize`, from all ranks, which all must call it.

    Args:
        model: arranged on a mesh, or not.

    Returns:
        whole tensors by the names of the model in one process, on every rank: what ``load_state_dict`` takes there,
        and ``save_pretrained`` as its ``state_dict``.

    Example, of one process; under torchrun the group is there already:
        >>> import tempfile, torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from ssmscan.distributed import full_state_dict, parallelize
        >>> from ssmscan.layers import MLP
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        ...     mlp = parallelize(MLP(4, 6), init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
        ...     whole = full_state_dict(mlp)
        ...     dist.destroy_process_group()
        >>> {name: tuple(tensor.shape) for name, tensor in whole.items()}
        {'fc1.weight': (12, 4), 'fc2.weight': (4, 6)}
    """
    return gathered(model, lambda tensor: tensor.detach())


def gathered(model: nn.Module, of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """What ``of`` makes of each parameter, such as its gradient, and of each buffer of the state dict: whole."""
    found = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # What a forward has left may be narrow.
            module.reshard()
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList) and isinstance(module[0], Local):
            pieces = [_whole(of(piece)) for piece in module.parameters()]
            # "layer.parametrizations.weight" stands for "layer.weight".
            *owner, _, name = path.split(".")
            if None not in pieces:
                found[".".join([*owner, name])] = torch.cat(pieces, module[0].dim)  # type: ignore[arg-type]
        else:
            kept = module._non_persistent_buffers_set
            buffers = {name: b for name, b in module.named_buffers(recurse=False) if name not in kept}
            for name, tensor in (*module.named_parameters(recurse=False), *buffers.items()):
                if (whole := _whole(of(tensor))) is not None:
                    found[f"{path}.{name}" if path else name] = whole
    return found


def _whole(tensor: Tensor | None) -> Tensor | None:
    if not isinstance(tensor, DTensor):
        return tensor
    # One dimension of the mesh after the other: sharding comes first there, and was done last.
    placements = list(tensor.placements)
    for i in range(len(placements)):
        placements[i] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()
