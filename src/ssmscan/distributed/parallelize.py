"""parallelize: a model on a mesh of processes."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ssmscan.distributed.loss import SeveralHolders
from ssmscan.distributed.sequence import SplitContext
from ssmscan.distributed.sharding import dtype_of, holders_of, shard_parameters
from ssmscan.distributed.tensor import split
from ssmscan.layers.context import Context
from ssmscan.shapes import check_flags, error


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    shard: bool = True,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Arrange a model on a mesh of processes, in place: each keeps a part of it, and computes a part of each batch.

    - "dp": every rank has sequences of its own.
    - "cp": the ranks have stretches of the same sequences, in their order. See :func:`context_parallel`; attention
      gathers the keys and values of all.
    - "tp": the ranks have the same tokens, and heads or channels of their own: of Mamba, Mamba2, RGLRU, GatedSSM,
      MatrixSSM, Attention and MLP, and the tokens of embedding and head where their number divides.

        loss = Σ_ranks loss_rank,    dloss/dθ = Σ_ranks dloss_rank/dθ    over "dp" and "cp"

    The parameters are sharded over the ranks of "dp" and "cp", block by block (FSDP2), and their gradients are those
    of the sum of what these ranks called ``backward`` on. The loss of an :class:`ssmscan.models.SSMForCausalLM` is
    that of the whole batch, the same on every rank, and its gradient on each the rank's share. A model that is not
    sharded gets that sum from :func:`sum_gradients`.

    Args:
        model: an ``SSMForCausalLM`` or ``SSMModel``, or any module of mixers and blocks of :mod:`ssmscan.layers`. On
            every rank the same, on the device of the mesh. Load a checkpoint before, make the optimizer after.
        mesh: its dimensions are named "dp", "cp" and "tp", or some of these, in this order.
        shard: whether the ranks of "dp" and "cp" share the parameters, and with them gradients and optimizer. If not,
            each has them whole, and nothing of them goes between the ranks before :func:`sum_gradients`.
            Default True, which needs the least memory.
        param_dtype: with ``shard``, in which the blocks' matrices are gathered over "dp" and "cp", such as bfloat16,
            under ``torch.autocast`` with it. Parameters and gradients stay what they are, and so do modules with a
            parameter that is to stay wide: rates of decay, D, biases of step sizes, norms. Default None: in their own
            dtype.
        reshard_after_forward: with ``shard``, whether a block gives up the weights that it gathered over "dp" and "cp"
            as soon as its forward is done, and gathers them again in the backward. Default True, which needs the least
            memory.

    Returns:
        the model itself, whose parameters, where they are shared, now are DTensors. :func:`full_state_dict` puts them
        together again.

    Where the sequence is split a forward takes this rank's stretch of everything with a time axis, and ``cu_seqlens``
    of the whole sequence. Give ``shift_labels`` in place of ``labels``, for the last token's next one is another
    rank's. A cache, or a layer's state, ends as the state after the whole sequence on every rank; over "tp" each rank
    has the state of its heads or channels.

    Raises:
        ValueError: a mesh without names, or with others; a model that is on one already; heads or channels that the
            ranks of "tp" cannot share.
        TypeError: parameters of several dtypes to shard; a flag that is not True or False.
        NotImplementedError: a mixer that has no form for "tp".

    Where one of these is raised, the model is as it was.

    Zhao et al., "PyTorch FSDP" (2023), for the sharding; Shoeybi et al., "Megatron-LM" (2019), section 3, for the
    split of columns and then of rows.

    Example, of one process; under torchrun the group is there already:
        >>> import tempfile, torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from ssmscan.distributed import parallelize
        >>> from ssmscan.layers import GatedSSM
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        ...     mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
        ...     y = parallelize(GatedSSM(4), mesh)(torch.randn(2, 5, 4))
        ...     dist.destroy_process_group()
        >>> y.shape
        torch.Size([2, 5, 4])
    """
    check_flags("parallelize", shard=shard, reshard_after_forward=reshard_after_forward)
    names = mesh.mesh_dim_names or ()
    holders = holders_of("parallelize", mesh)
    # All that can be refused is refused before the first change.
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        advice = "Give all dimensions in one mesh."
        raise ValueError(error("parallelize", "model must be whole", "one that is on a mesh already", advice))
    if holders is not None and shard:
        dtype_of(model)
    if "tp" in names:
        split(_without_memory(model), mesh["tp"])
        split(model, mesh["tp"])
    if "cp" in names:
        context = SplitContext(mesh.get_group("cp"))
        for module in model.modules():
            if isinstance(getattr(module, "context", None), Context):
                module.context = context  # type: ignore[assignment]
    if holders is not None:
        if shard:
            if "tp" in names:
                # A sum over both in one collective, whose bits all ranks agree on: that of a clipped gradient's norm.
                mesh._flatten()
            shard_parameters(model, holders, param_dtype, reshard_after_forward)
        if hasattr(model, "holders"):
            model.holders = SeveralHolders(holders.get_group())  # type: ignore[assignment]
    return model


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy of a model on the device "meta", for what is done on trial."""
    made: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        parameter = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return deepcopy(model, made)
