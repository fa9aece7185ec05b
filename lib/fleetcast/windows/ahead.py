"""Work that is done in a thread before its result is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(work: Callable[[Item], Made], items: Iterable[Item], depth: int) -> Generator[Made, None, None]:
    """What `work` makes of each item, in their order; one thread makes up to `depth` of them in advance.

    An error of `work` is raised where its result is due. Closed before its end, it finishes the item that it
    is at, drops what nobody has asked for, and leaves no thread.
    """
    rest = iter(items)
    waiting: deque[Future[Made]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        waiting.extend(thread.submit(work, item) for item in islice(rest, depth))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(thread.submit(work, item) for item in islice(rest, 1))
            yield made
    finally:
        thread.shutdown(cancel_futures=True)
