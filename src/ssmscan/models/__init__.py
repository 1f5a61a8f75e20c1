"""Models: embedding, blocks, norm, head."""

from ssmscan.models.config import LanguageModelConfig
from ssmscan.models.lm import LanguageModel

__all__ = ["LanguageModel", "LanguageModelConfig"]
