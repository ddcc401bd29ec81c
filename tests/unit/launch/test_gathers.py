"""ZeRO-3's waits for weights, timed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from launch.gathers import tell_of_gathers


def test_each_wait_is_told_once_and_only_to_who_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, AllGatherHandle

    class Handle:
        def wait(self) -> None:
            time.sleep(0.02)

    for kind in (AllGatherHandle, AllGatherCoalescedHandle):
        monkeypatch.setattr(kind, "wait", kind.wait)
    first: list[float] = []
    second: list[float] = []
    tell_of_gathers(first.append)
    tell_of_gathers(second.append)
    for handle in _handles(Handle()):
        handle.wait()
    assert first == []
    assert len(second) == 2
    assert all(0.02 <= seconds < 1 for seconds in second)


def _handles(inner: Any) -> list[Any]:
    """Of each kind one, over a collective that is `inner`."""
    import torch
    from deepspeed.runtime.zero.partition_parameters import (
        AllGatherCoalescedHandle,
        AllGatherHandle,
        ZeroParamStatus,
    )

    parameter: Any = torch.nn.Parameter(torch.zeros(2))
    parameter.ds_status = ZeroParamStatus.INFLIGHT
    return [AllGatherHandle(inner, parameter), AllGatherCoalescedHandle(inner, [], [], 1)]
