"""Work done ahead of its use, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(prepare: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """Give ``prepare(item)`` for each item, in order, while threads prepare the next ones.

    Args:
        prepare: called in a thread; worth it where it mostly leaves Python's lock free, as decoding does.
        items: what to prepare.
        workers: how many threads; as many results are under way beside the one in use. 0 prepares each when
            it is asked for.

    Raises:
        ValueError: fewer than 0 workers.
        Exception: whatever ``prepare`` raises, when its result is due.
    """
    if workers < 0:
        raise ValueError(f"workers {workers}; 0 or more are needed")
    if workers == 0:
        yield from map(prepare, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="lhc-data") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(prepare, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
