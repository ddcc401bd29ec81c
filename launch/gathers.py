"""How long ZeRO-3 waits for weights that other ranks hold.

It does so throughout the forward pass, so that all ranks take as long for that as the slowest of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any


def tell_of_gathers(told: Callable[[float], None]) -> None:
    """From here on `told` gets the seconds of each wait in this process; who was told before is told no more."""
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, AllGatherHandle

    for handle in (AllGatherHandle, AllGatherCoalescedHandle):
        handle.wait = _timed(getattr(handle.wait, "__wrapped__", handle.wait), told)


def _timed(wait: Callable[..., None], told: Callable[[float], None]) -> Callable[..., None]:
    @wraps(wait)
    def timed(*arguments: Any, **others: Any) -> None:
        began = time.monotonic()
        wait(*arguments, **others)
        told(time.monotonic() - began)

    return timed
