"""Errors that a user of the command line can cause."""


class UserError(Exception):
    """A mistake that its user can mend, told in one sentence.

    The message says what is wrong, where (file, line, column, table or feature) and what to do. The command line
    prints it without a traceback and ends with exit code 2. Library functions raise the precise built-in exception
    (``ValueError``, ``KeyError``, ``TypeError``) instead; ``UserError`` is for files and options that people write.
    """
