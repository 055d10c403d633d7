"""A function in several processes at once, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing

from d4s.ranks import here, joined

# A fork has all modules already. Where CUDA has been started it can have none.
HOW = "spawn" if torch.cuda.is_available() else "fork"


def in_each(count: int, work: Callable[..., Any], *arguments: Any, within: float = 60) -> list[Any]:
    """What `work(*arguments)` gives in each of `count` processes that are joined, by rank; of one that raised the
    error's own text, of one that ended otherwise None.

    Fails where one has not ended within the seconds.
    """
    context = multiprocessing.get_context(HOW)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    started = [
        context.Process(target=_one, args=(rank, count, port, results, work, arguments))
        for rank in range(count)
    ]
    for one in started:
        one.start()
    try:
        for one in started:
            one.join(within)
            assert one.exitcode is not None, f"a process of {count} hangs"
    finally:
        for one in started:
            one.kill()
    found: dict[int, Any] = {}
    while not results.empty():
        rank, value = results.get()
        found[rank] = value
    return [found.get(rank) for rank in range(count)]


def _one(rank: int, count: int, port: int, results: Any, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with joined():
            assert here().count == count
            results.put((rank, work(*arguments)))
    except BaseException as error:
        traceback.print_exc()
        results.put((rank, f"{type(error).__name__}: {error}"))
    os._exit(0)
