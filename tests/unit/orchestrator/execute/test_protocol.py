"""What an attempt's directory shows, read while ranks write into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.contract import CheckpointNote, ProgressLine
from orchestrator.execute import protocol
from orchestrator.execute.protocol import LINE_BYTES, last_progress, news_since, read_report
from tests.worlds import a_contract, a_plan, a_spec


def a_line(step: int, *, saved: bool = True) -> bytes:
    note = CheckpointNote(id=f"step-{step}.attempt-1", step=step, outcome="committed") if saved else None
    line = ProgressLine(time=1.0, phase="save", step=step, checkpoint=note)
    return line.model_dump_json(exclude_none=True).encode() + b"\n"


def steps(news: tuple[ProgressLine, ...]) -> list[int]:
    return [line.step for line in news]


def test_there_is_no_news_before_there_is_a_file(tmp_path: Path) -> None:
    assert news_since(tmp_path / "none", 7) == ((), 7)
    assert last_progress(tmp_path / "none") is None


def test_a_line_is_news_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    first, second = a_line(1), a_line(2)
    path.write_bytes(a_line(0, saved=False) + first + second[:-1])
    news, offset = news_since(path, 0)
    assert steps(news) == [1]
    assert news_since(path, offset) == ((), offset)
    with path.open("ab") as stream:
        stream.write(b"\n")
    news, offset = news_since(path, offset)
    assert (steps(news), offset) == ([2], path.stat().st_size)


@given(
    kinds=st.lists(st.sampled_from(["saved", "step", "garbage", "binary"]), max_size=30),
    cuts=st.lists(st.integers(0, 400), max_size=30),
)
def test_however_the_file_grows_every_note_is_news_once(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("grows") / "progress.jsonl"
    lines = {"garbage": b'{"checkpoint": {"id": 3}}\n', "binary": b"\xff\x00\n"}
    whole = b"".join(lines.get(kind) or a_line(number, saved=kind == "saved") for number, kind in enumerate(kinds))
    told: list[int] = []
    offset, written = 0, 0
    for cut in [*cuts, len(whole)]:
        written = min(len(whole), written + cut)
        path.write_bytes(whole[:written])
        news, offset = news_since(path, offset)
        told += steps(news)
    assert told == [number for number, kind in enumerate(kinds) if kind == "saved"]
    assert offset == len(whole)


def test_news_comes_in_bounded_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_NEWS", 3)
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b"".join(a_line(step) for step in range(7)))
    told, offset = [], 0
    while (found := news_since(path, offset))[0]:
        assert len(found[0]) <= 3
        told += steps(found[0])
        offset = found[1]
    assert told == list(range(7))


def test_a_line_without_end_is_passed_over_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b'"checkpoint"' * LINE_BYTES + b"\n" + a_line(5))
    news, offset = news_since(path, 0)
    assert (steps(news), offset) == ([5], path.stat().st_size)


def test_the_report_of_rank_0s_node_alone_has_news(tmp_path: Path) -> None:
    spec = a_spec(tmp_path / "model", tmp_path / "data.tsv", strategy="ddp")
    contract = a_contract(tmp_path, a_plan(spec, "ddp", 2, 4))
    share = contract.nodes[0].model_copy(update={"processes": 1})
    contract = contract.model_copy(update={"nodes": (share, share)})
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}").mkdir()
        (tmp_path / f"rank-{rank}" / "progress.jsonl").write_bytes(a_line(rank))
    assert steps(read_report(contract, 0, 0, reachable=True).news) == [0]
    second = read_report(contract, 1, 0, reachable=True)
    assert (second.news, second.offset) == ((), 0)
    assert second.progress is not None
    assert second.progress.step == 1
