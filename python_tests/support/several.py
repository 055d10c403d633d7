"""A function in several processes at once, as a launcher would start them."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import multiprocessing

from d4s.ranks import joined

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
    with TemporaryDirectory() as folder:
        given = (count, port, folder, work, arguments)
        started = [context.Process(target=_one, args=(rank, *given)) for rank in range(count)]
        for one in started:
            one.start()
        until = time.monotonic() + within
        try:
            for one in started:
                one.join(max(0.0, until - time.monotonic()))
                assert one.exitcode is not None, f"a process of {count} has not ended within {within} s"
        finally:
            for one in started:
                one.kill()
        places = [Path(folder) / str(rank) for rank in range(count)]
        return [pickle.loads(place.read_bytes()) if place.exists() else None for place in places]


def _one(rank: int, count: int, port: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with joined():
            value = work(*arguments)
    except BaseException as error:
        traceback.print_exc()
        value = f"{type(error).__name__}: {error}"
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(value))
    os._exit(0)
