"""How a launch covers its tensors: blocks of channels, and segments of the length."""

from typing import NamedTuple


class Cover(NamedTuple):
    """A program takes one block of channels and one segment."""

    blocks: int
    length: int  # steps of a segment
    segments: int

    @classmethod
    def of(cls, blocks: int, l: int, wanted: int, multiple: int) -> "Cover":
        """About as many segments as ``wanted``, of a ``multiple`` of steps; every sequence has one at least."""
        length = max(-(-l // (wanted * multiple)), 1) * multiple
        return cls(blocks, length, max(-(-l // length), 1))
