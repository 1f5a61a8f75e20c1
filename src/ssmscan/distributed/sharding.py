"""Parameters sharded over processes, block by block, by FSDP2."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ssmscan.layers import Block


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the parameters of ``model`` over ``mesh``: those of a block together, and the rest together.

    Gradients are summed over the ranks, not averaged.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block) and module is not model]
    for module in (*blocks, model):
        sharded: FSDPModule = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        # The factor would be a multiplication that not every backend has.
        sharded.set_force_sum_reduction_for_comms(True)
