"""Generation: tokens one by one, as fast as the device makes them."""

from ssmscan.generation.generator import Generator
from ssmscan.generation.sampling import Sampling

__all__ = ["Generator", "Sampling"]
