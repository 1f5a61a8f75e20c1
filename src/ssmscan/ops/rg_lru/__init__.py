from ssmscan.ops.rg_lru.op import rg_lru, rg_lru_step

__all__ = ["rg_lru", "rg_lru_step"]
