"""What a run's record says of its rows: one width for all elements, or the widths of blocks of components."""

MAX_COMPONENTS = 16
"""Components of a transformed row: one vector of 16 floats, at most 128 bits."""

COMPONENT_BLOCKS = ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16))
"""First component of each block and the one after its last; the components of a block have one width."""

TRANSFORMED = 1 << 31
"""Bit of a run's coding that is set if its rows are transformed; else the coding is the rows' bit-width."""


def block_bits(coding: int) -> tuple[int, ...]:
    """The bit-widths of a transformed run's blocks of components, 5 numbers; that of block i is in bits 4 * i on."""
    return tuple(coding >> 4 * block & 15 for block in range(len(COMPONENT_BLOCKS)))


def component_bits(coding: int, components: int) -> tuple[int, ...]:
    """The bit-widths of a transformed run's components.

    Args:
        coding (int): of the run's record.
        components (int): K of the table; blocks end there.
    """
    return tuple(
        bits
        for bits, (first, stop) in zip(block_bits(coding), COMPONENT_BLOCKS, strict=True)
        for _ in range(first, min(stop, components))
    )


def level_count(coding: int, components: int) -> int:
    """Levels that are stored of a run: scale and offset of each coded component, or a plain run's step size."""
    if coding & TRANSFORMED:
        return 2 * sum(bits > 0 for bits in component_bits(coding, components))
    return int(coding > 0)
