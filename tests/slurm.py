"""A real Slurm of two nodes on this machine, its daemons in a directory of their own, ended by their process ids."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from orchestrator.execute.local import free_ports
from orchestrator.execute.processes import end_all

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
CPUS = 4
MEMORY_MB = 16_000
START_S, END_S = 60.0, 30.0


def why_not() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


def configuration(folder: Path) -> str:
    """slurm.conf of two nodes on this host, which count more CPUs than there may be."""
    control, *nodes = free_ports(3)
    host = socket.gethostname().partition(".")[0]
    lines = [
        "ClusterName=yard",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={control}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        # What is requeued waits until its credential has expired, two minutes by default.
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "ProctrackType=proctrack/pgid",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "SlurmdParameters=config_overrides",
        "SchedulerParameters=sched_min_interval=0,bf_interval=1",
        "SlurmctldTimeout=30",
        "SlurmdTimeout=20",
        "KillWait=10",
        "DefMemPerCPU=1000",
        "ReturnToService=2",
        *(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} "
            f"RealMemory={MEMORY_MB} State=UNKNOWN"
            for number, port in enumerate(nodes, start=1)
        ),
        "PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP",
        "PartitionName=short Nodes=n1,n2 MaxTime=1 State=UP",
        "",
    ]
    return "\n".join(lines)


class Slurm:
    """One that runs; its commands find it by `env`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *argv: str, check: bool = True) -> str:
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, check=False)
        if check:
            assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def resume(self, node: str) -> None:
        """Bring back a node that was set down; one whose daemon has answered meanwhile has come back by itself."""
        while "DOWN" in self.run("scontrol", "--oneliner", "show", "node", node).partition("State=")[2].split()[0]:
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            time.sleep(0.2)

    def start(self, name: str, *argv: str) -> None:
        """A daemon in the foreground, so that its process is ours to end."""
        path = f"{self.env.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        log = (self.folder / f"{name}.out").open("ab")
        found = shutil.which(argv[0], path=path)
        assert found is not None
        self.daemons[name] = subprocess.Popen(
            [found, *argv[1:]], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name, "-f", str(self.conf))

    def kill(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*.*g")
        )


@contextmanager
def a_slurm() -> Iterator[Slurm]:
    """A Slurm whose two nodes are idle."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        slurm = Slurm(folder)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (folder / "state").mkdir()
        for number in (1, 2):
            (folder / f"spool-n{number}").mkdir()
        slurm.conf.write_text(configuration(folder))
        stack.callback(_end, slurm)
        slurm.start(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
            "--num-threads=2",
        )  # fmt: skip
        _await(slurm, (folder / "munge.socket").exists)
        slurm.start("slurmctld", "slurmctld", "-D", "-c", "-f", str(slurm.conf))
        for number in (1, 2):
            slurm.start_node(f"n{number}")
        _await(slurm, lambda: slurm.run("sinfo", "-h", "-p", "main", "-o", "%t %D", check=False).strip() == "idle 2")
        yield slurm


def _await(slurm: Slurm, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        ended = [name for name, daemon in slurm.daemons.items() if daemon.poll() is not None]
        assert not ended, f"{ended} ended\n{slurm.logs()}"
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)


def _end(slurm: Slurm) -> None:
    """Let jobs end as Slurm ends them, then everything that was started from here."""
    slurm.run("scancel", "--user=root", check=False)
    deadline = time.monotonic() + END_S
    while slurm.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in reversed(list(slurm.daemons)):
        slurm.kill(name)
    end_all("SLURM_CONF", str(slurm.conf))  # what daemons started for jobs outlives them
