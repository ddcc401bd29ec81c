"""Reading traces: our own columns strictly, public ones as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError, SpecErrors
from orchestrator.simulate import formats
from orchestrator.simulate.formats import read_trace
from orchestrator.simulate.workload import SimulatedJob, read_csv

HEADER = "job_id,submit_s,duration_s,num_gpus,tenant"


def write(folder: Path, *lines: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_trace_is_read_with_its_optional_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"\ufeff{HEADER},priority,min_gpus,max_gpus,name", "a,0,10.5,2,x,,,,", "", "b,3,7,4,y,-5,2,8,bert",
    )  # fmt: skip
    assert read_csv(path).jobs == (
        SimulatedJob("a", 0, 10.5, 2, "x"),
        SimulatedJob("b", 3, 7, 4, "y", priority=-5, min_gpus=2, max_gpus=8, name="bert"),
    )


@pytest.mark.parametrize(
    ("rows", "column", "line", "message"),
    [
        (["a,0,0,1,x"], "duration_s", 2, "seconds, more than 0"),
        (["a,0,-5,1,x"], "duration_s", 2, "duration_s is '-5'"),
        (["a,0,inf,1,x"], "duration_s", 2, "duration_s is 'inf'"),
        (["a,soon,5,1,x"], "submit_s", 2, "submit_s is 'soon'"),
        (["a,-1,5,1,x"], "submit_s", 2, "seconds, 0 or more"),
        (["a,0,5,1.5,x"], "num_gpus", 2, "a whole number"),
        (["a,0,5,0,x"], "num_gpus", 2, "1 or more"),
        (["a,0,5,1,"], "tenant", 2, "tenant is ''"),
        (["a,0,5,1,x", "a,1,5,1,x"], "job_id", 3, "job a is listed twice"),
        (["a,5,5,1,x", "b,4,5,1,x"], "submit_s", 3, "job b was submitted at 4 s, before"),
        (["a,0,5,1"], None, 2, "4 cells, where the first line names 5"),
        (['a,0,5,1,"x'], None, 2, "not a row of CSV"),
    ],
)
def test_a_faulty_row_is_told_with_line_column_and_remedy(
    tmp_path: Path, rows: list[str], column: str | None, line: int, message: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        read_csv(write(tmp_path, HEADER, *rows))
    error = refusal.value
    assert message in error.message
    assert (error.code, error.field, error.line) == ("bad-trace", column, line)
    assert error.hint
    assert error.file == str(tmp_path / "trace.csv")


def test_all_faulty_rows_are_told_at_once_up_to_a_point(tmp_path: Path) -> None:
    with pytest.raises(SpecErrors) as refusal:
        read_csv(write(tmp_path, HEADER, "a,0,0,0,x", "b,0,5,1,x", "c,x,5,1,x"))
    assert [(one.line, one.field) for one in refusal.value.errors] == [
        (2, "duration_s"), (2, "num_gpus"), (4, "submit_s"),
    ]  # fmt: skip
    with pytest.raises(SpecErrors) as refusal:
        read_csv(write(tmp_path, HEADER, *("a,0,0,1,x" for _ in range(500))))
    assert len(refusal.value.errors) == 20


@pytest.mark.parametrize(
    ("lines", "code", "field"),
    [
        ([""], "missing-column", "job_id"),
        (["job_id,submit_s,num_gpus,tenant"], "missing-column", "duration_s"),
        ([f"{HEADER},proirity"], "unknown-column", "proirity"),
        ([f"{HEADER},tenant"], "duplicate-column", "tenant"),
        ([HEADER], "empty-trace", None),
    ],
)
def test_a_faulty_header_is_told(tmp_path: Path, lines: list[str], code: str, field: str | None) -> None:
    with pytest.raises(SpecError) as refusal:
        read_csv(write(tmp_path, *lines))
    assert (refusal.value.code, refusal.value.field) == (code, field)
    assert refusal.value.hint
    if code == "unknown-column":
        assert "priority" in refusal.value.hint


def test_bounds_of_an_elastic_job_hold_its_size(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"num_gpus 1 is not in 2\.\.4"):
        read_csv(write(tmp_path, f"{HEADER},min_gpus,max_gpus", "a,0,5,1,x,2,4"))


def test_what_is_no_file_or_no_text_is_told(tmp_path: Path) -> None:
    write(tmp_path, HEADER)
    with pytest.raises(SpecError, match="does not exist") as refusal:
        read_trace(tmp_path / "tracee.csv")
    assert "trace.csv" in (refusal.value.hint or "")
    with pytest.raises(SpecError, match="is a directory"):
        read_trace(tmp_path)
    (tmp_path / "zip.csv").write_bytes(b"PK\x03\xff\xfe")
    with pytest.raises(SpecError, match="not UTF-8"):
        read_trace(tmp_path / "zip.csv")


# Public formats.


def philly_job(name: str, *attempts: tuple[str | None, str | None, int], **changes: Any) -> dict[str, Any]:
    return {
        "status": "Pass",
        "vc": "ee9e8c",
        "jobid": name,
        "attempts": [
            {"start_time": start, "end_time": end, "detail": [{"ip": "m1", "gpus": [f"gpu{n}" for n in range(gpus)]}]}
            for start, end, gpus in attempts
        ],
        "submitted_time": "2017-10-07 01:11:39",
        "user": "ce2f4c",
    } | changes


def test_philly_as_published(tmp_path: Path) -> None:
    path = tmp_path / "cluster_job_log"
    jobs = [
        philly_job(
            "two", ("2017-10-07 01:12:09", "2017-10-07 01:13:23", 8), ("2017-10-07 01:13:30", "2017-10-07 01:14:30", 8)
        ),
        philly_job("first", ("2017-10-07 01:12:00", "2017-10-07 01:13:00", 1), submitted_time="2017-10-07 01:11:00"),
        philly_job("none"),
        philly_job("running", ("2017-10-07 01:12:09", None, 1)),
        philly_job("odd", ("None", "2017-10-07 01:12:09", 1)),
        philly_job("no-gpu", ("2017-10-07 01:12:09", "2017-10-07 01:13:09", 0)),
        philly_job("no-time", ("2017-10-07 01:12:09", "2017-10-07 01:12:09", 1)),
    ]
    path.write_text(json.dumps(jobs))
    workload = read_trace(path)
    assert workload.jobs == (
        SimulatedJob("first", 0, 60, 1, "ee9e8c"),
        SimulatedJob("two", 39, 74 + 60, 8, "ee9e8c"),
    )
    assert workload.skipped == {formats.NO_TIME: 3, formats.NO_GPU: 1, formats.NO_LENGTH: 1}


@pytest.mark.parametrize("text", ["{", "{}", '[{"jobid": 1}]', "[3]", "[]"])
def test_what_is_not_philly_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(SpecError) as refusal:
        read_trace(path)
    assert refusal.value.code in ("bad-trace", "empty-trace")
    assert refusal.value.hint


PAI_TASKS = (
    "a,ps,2.0,Terminated,100.0,190.0,600.0,29.3,,MISC",
    "a,worker,3.0,Terminated,110.0,200.0,600.0,29.3,50.0,V100",
    "a,evaluator,1.0,Terminated,150.0,260.0,600.0,29.3,200.0,V100",
    "b,tensorflow,1.0,Running,120.0,,600.0,29.3,100.0,P100",
    "c,ps,1.0,Terminated,120.0,130.0,600.0,29.3,,MISC",
    "d,worker,1.0,Failed,130.0,130.0,600.0,29.3,100.0,T4",
    "e,worker,1.0,Terminated,140.0,145.0,600.0,29.3,25.0,T4",
)


@pytest.mark.parametrize("header", [True, False])
def test_pai_as_published(tmp_path: Path, header: bool) -> None:
    names = (",".join(formats.PAI_TASK),) if header else ()
    path = write(tmp_path, *names, *PAI_TASKS, name="pai_task_table.csv")
    # Gangs of whole GPUs: 3 halves are 3, and one instance with two.
    assert [(job.job_id, job.submit_s, job.duration_s, job.num_gpus, job.tenant) for job in read_trace(path).jobs] == [
        ("a", 0, 150, 5, "default"), ("e", 30, 5, 1, "default"),
    ]  # fmt: skip
    write(tmp_path, "e,id1,u1,Terminated,40.0,150.0", "a,id2,u2,Terminated,90.0,260.0", name="pai_job_table.csv")
    workload = read_trace(path)
    assert [(job.job_id, job.submit_s, job.tenant) for job in workload.jobs] == [("e", 0, "u1"), ("a", 50, "u2")]
    assert workload.skipped == {formats.NO_TIME: 1, formats.NO_GPU: 1, formats.NO_LENGTH: 1}


def test_crux_as_programs_read_it(tmp_path: Path) -> None:
    res = json.dumps({"cpu": "12", "nvidia.com/gpu": "8"}).replace('"', '""')
    write(
        tmp_path, "id,job_name,worker_name,replica_type,RES",
        f'1,j1,w0,master,"{res}"', f'2,j1,w1,worker,"{res}"', f'3,j2,w0,worker,"{res}"', "4,j3,w0,worker,{}",
        f'5,j4,w0,worker,"{res}"', f'6,j5,w0,worker,"{res}"',
        name="worker.csv",
    )  # fmt: skip
    path = write(
        tmp_path, "id,job_name,tenant_id,gmt_job_submitted,gmt_job_running,gmt_job_stopped,gmt_job_finished",
        "1,j1,t7,2023/7/15 02:19,2023/7/15 02:20,,2023/7/15 03:20",
        "2,j2,t7,2023/7/15 02:09,2023/7/15 02:10,2023/7/15 02:15,",
        "3,j3,t7,2023/7/15 02:09,2023/7/15 02:10,,2023/7/15 02:15",
        "4,j4,t7,2023/7/15 02:09,2023/7/4 02:10,,2023/7/15 02:15",
        "5,j5,t7,2023/7/15 02:09,,,2023/7/15 02:15",
        name="job.csv",
    )  # fmt: skip
    workload = read_trace(path)
    assert workload.jobs == (SimulatedJob("j2", 0, 300, 8, "t7"), SimulatedJob("j1", 600, 3600, 16, "t7"))
    assert workload.skipped == {formats.NO_GPU: 1, formats.NO_TIME: 2}


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "job_name,status", "a,Running", name="pai_task_table.csv")
    with pytest.raises(SpecError, match="no column task_name"):
        read_trace(path)
    path = write(tmp_path, "a,Running", name="pai_task_table.csv")
    with pytest.raises(SpecError, match="2 cells instead of 10"):
        read_trace(path)


def test_names_that_stand_twice_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    one = philly_job("j", ("2017-10-07 01:12:00", "2017-10-07 01:13:00", 1))
    path.write_text(json.dumps([one, one]))
    assert [job.job_id for job in read_trace(path).jobs] == ["j", "j-2"]
