"""The errors that a user can cause, and therefore mend."""


class InputError(Exception):
    """Something given by the user cannot be used.

    The message is one line: what was given (file, row, field, value) and what was expected.
    Jobs print it without a traceback and exit with 1.
    """
