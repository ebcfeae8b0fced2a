"""How the id of a row leads to the row's bytes."""

import enum

LINE_BYTES = 64
"""Bytes of a line of a nibble or bitmap directory: a cache line."""

NIBBLE_ROWS = 120
"""Rows that one line of a nibble directory covers."""

BITMAP_ROWS = 448
"""Rows that one line of a bitmap directory covers."""

SPLIT_BYTES = 32
"""Bytes of a split of a wavelet directory: 8 int32."""

MAX_SPLITS = 64
"""Splits of a wavelet directory at most."""


class Directory(enum.IntEnum):
    """How a table's ids find their rows. The values are those of ``PackedTables.directory_kinds``.

    Attributes:
        RANKED: ids are in frequency order, or all rows have one width; nothing is needed but the table's runs, 20 bytes
            each.
        REMAP: an int32 per row, the stored rank of each id; then as RANKED. 32 bits a row, and ids in any order::

            byte     0            4            8
                     | i32 rank   | i32 rank   | ...

        NIBBLE: lines of 64 bytes for 120 rows each, 4.27 bits a row. Rows are stored in the order of their ids. Row j
            of a line is ``width[j]`` bits wide and starts ``base + width[0] + ... + width[j - 1]`` units after the
            table's first byte; a unit is ceil(D / 8) bytes, what one bit of width adds to a row::

            byte     0            4                                        64
                     | u32 base   | width 1, width 0 | width 3, width 2 |...|
            bits                    7  ..  4  3 .. 0   7  ..  4  3 .. 0

        BITMAP: lines of 64 bytes for 448 rows each, 1.14 bits a row. Bit j, bit ``j % 8`` of byte ``8 + j // 8``, is
            set when row j has more than 0 bits; its kept rank is ``rank`` plus the set bits before it. Kept rows have
            one width and lie in one run, in the order of their ids::

            byte     0                        8                            64
                     | u64 rank               | 448 bits                   |

        BITMAP_NIBBLE: the lines of BITMAP followed by those of NIBBLE over the kept ranks: for tables that are mostly
            0 bits wide with several other widths. Without kept rows there are no nibble lines.

        WAVELET: of coded tables: a wavelet tree over the runs, about as many bits a row as the entropy of the runs. A
            split halves neighbouring stored ranks: it has the lines of a BITMAP for its rows, in which bit j is set if
            row j has one of the lower ranks. Rows of either half are counted in the order of their ids and go on to
            another split, to ranks in that order, or to an int32 each, their stored ranks. Splits come first, the root
            at byte 0, each before those that it leads to, 32 bytes each and zeros up to 64::

                byte     0           4          8          12         16        20         24           28           32
                         | i32 first | i32 rows | i32 kept | i32 line | i32 set | i32 rest | i32 splits | i32 levels |

            ``first`` is its lowest rank, ``rows`` the number of its rows, ``kept`` how many of them have their bit set:
            ranks from ``first`` on, the others from ``first + kept`` on. ``line`` is its first line of 64 bytes,
            counted from the root. ``set`` and ``rest`` say where rows of either half go on: a split's number; 0: ranks
            in the order of ids; -n: to int32 ranks from line n on. The root has the number of splits, and how many of
            them a row meets at most; the others have zeros there.
    """

    RANKED = 0
    REMAP = 1
    NIBBLE = 2
    BITMAP = 3
    BITMAP_NIBBLE = 4
    WAVELET = 5
