"""Hosts of their own on this machine: network namespaces on one bridge, each with an address, which can be cut off."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.{}.{}"


@dataclass(frozen=True)
class Host:
    """One of them; they share this machine's files and processes."""

    namespace: str
    address: str
    link: str
    """Its cable's end at the bridge."""

    @property
    def prefix(self) -> list[str]:
        """What makes a command run there."""
        return ["ip", "netns", "exec", self.namespace]

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        _ip("link", "set", self.link, "up")


def why_not() -> str | None:
    """Why there can be none here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"ty-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except (OSError, subprocess.CalledProcessError) as problem:
        return f"network namespaces cannot be made here: {problem}"
    return None


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many, that reach each other and are reached from here."""
    mark = secrets.token_hex(3)
    bridge = f"ty{mark}"
    subnet = SUBNET.format(100 + secrets.randbelow(100), secrets.randbelow(256))
    made: list[Host] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{subnet}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index in range(count):
            host = Host(f"{bridge}-{index}", f"{subnet}.{index + 1}", f"{bridge}v{index}")
            _ip("netns", "add", host.namespace)
            made.append(host)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.link, "master", bridge, "up")
            inside = ("-n", host.namespace)
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            _ip("netns", "delete", host.namespace)
        subprocess.run(["ip", "link", "delete", bridge], check=False)


def sshd() -> str | None:
    """The server's program, if there is one here."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextmanager
def an_ssh_server(host: Host, folder: Path) -> Iterator[list[str]]:
    """One on `host` with keys of its own; the command that reaches it, but for the host's name."""
    for name in ("server", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    config = folder / "sshd_config"
    config.write_text(
        f"Port 2222\nHostKey {folder}/server\nAuthorizedKeysFile {folder}/client.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where it takes away its own rights
    program = sshd()
    assert program is not None
    server = subprocess.Popen([*host.prefix, program, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
    known = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")
    command = ["ssh", "-o", "BatchMode=yes", *known, "-p", "2222", "-i", str(folder / "client")]
    try:
        deadline = time.monotonic() + 30
        while subprocess.run([*command, host.address, "true"], capture_output=True, check=False).returncode != 0:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)
        yield command
    finally:
        server.kill()
        server.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
