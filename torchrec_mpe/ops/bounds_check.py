"""What an op does with ids that are no rows of their table, FBGEMM's modes."""

import enum


class BoundsCheckMode(enum.IntEnum):
    """FBGEMM's ``BoundsCheckMode``, same values. In every mode but NONE no id leads outside a buffer.

    An id of -1 is a pruned row, as in FBGEMM: it adds nothing to its bag and is no error.

    Attributes:
        FATAL: raise IndexError.
        WARNING: read row 0 instead, add the number of such ids to ``bounds_check_warning``.
        IGNORE: read row 0 instead.
        NONE: no check: the caller vouches for ids and offsets.
    """

    FATAL = 0
    WARNING = 1
    IGNORE = 2
    NONE = 3
