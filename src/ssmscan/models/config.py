"""The shape of a model."""

from dataclasses import dataclass

from ssmscan.shapes import error


@dataclass(frozen=True)
class LanguageModelConfig:
    """The shape of a :class:`ssmscan.models.LanguageModel`.

    Args:
        hidden_size: width m of the residual stream.
        layers: number of GatedSSM blocks.
        state_size_mult: channels of each scan, as a multiple of hidden_size.
        eps: of every norm.
        shortest_memory: shortest time constant of a channel at the start (tokens).
        longest_memory: longest time constant of a channel at the start (tokens).
    """

    hidden_size: int = 64
    layers: int = 2
    state_size_mult: int = 4
    eps: float = 1e-6
    shortest_memory: float = 1.0
    longest_memory: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "state_size_mult"):
            if getattr(self, name) < 1:
                raise ValueError(error("model", f"{name} must be at least 1", getattr(self, name)))
        if self.eps <= 0:
            raise ValueError(error("model", "eps must be positive", self.eps))
        if not 0 < self.shortest_memory <= self.longest_memory:
            raise ValueError(
                error(
                    "model",
                    "shortest_memory must be positive and at most longest_memory",
                    f"{self.shortest_memory} and {self.longest_memory}",
                )
            )
