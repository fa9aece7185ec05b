"""The errors that a user can cause, and therefore mend."""

from __future__ import annotations


class InputError(Exception):
    """Something given by the user cannot be used.

    The message is one line: what was given (file, row, field, value) and what was expected.
    Jobs print it without a traceback and exit with 1.
    """


def in_one_line(error: BaseException | None) -> str | None:
    """What a user can mend of an error, on whichever worker it began: an InputError, or a file or an object
    that cannot be read or written. None if the fault is ours, and its traceback is wanted."""
    while error is not None:
        if isinstance(error, InputError):
            return str(error)
        if isinstance(error, OSError):
            place = error.filename or (error.args[0] if isinstance(error, FileNotFoundError) else None)
            why = error.strerror or ("no such file" if place else str(error) or type(error).__name__)
            return " ".join((f"{place}: {why}" if place else why).split())
        # What Ray wraps around what happened on a worker.
        of_workers = getattr(error, "worker_failures", None) or {None: None}
        error = (
            getattr(error, "cause", None)
            or getattr(error, "controller_failure", None)
            or next(iter(of_workers.values()))
        )
    return None
