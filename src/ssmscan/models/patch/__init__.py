from ssmscan.models.patch.apply import patch_transformers, unpatch_transformers

__all__ = ["patch_transformers", "unpatch_transformers"]
