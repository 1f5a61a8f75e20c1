from ssmscan.ops.s4d.init import s4d_lin, s4d_real
from ssmscan.ops.s4d.op import s4d, s4d_step

__all__ = ["s4d", "s4d_lin", "s4d_real", "s4d_step"]
