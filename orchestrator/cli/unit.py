"""`tuneyard unit`."""

from __future__ import annotations

import getpass
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

YARD = """\
[Unit]
Description=Tuneyard: a yard's controller, its API and Ray's head
After=network-online.target
Wants=network-online.target

[Service]
User={user}
Environment=TUNEYARD_HOME={home}
# TUNEYARD_HOST, TUNEYARD_PORT, TUNEYARD_DATABASE_URL and the like; readable by {user} alone.
EnvironmentFile=-/etc/tuneyard/yard.env
ExecStart={command} up --block
# A restart starts another supervisor and leaves jobs alone. `tuneyard down` ends the yard.
KillMode=process
Restart=always
RestartSec=2

[Install]
WantedBy=multi-user.target
"""
NODE = """\
[Unit]
Description=Tuneyard: a node of the yard at {url}
After=network-online.target
Wants=network-online.target

[Service]
User={user}
Environment=TUNEYARD_HOME={home}
# The yard's token comes from the credential, a file that root alone needs to read.
LoadCredential=token:/etc/tuneyard/token
EnvironmentFile=-/etc/tuneyard/node.env
ExecStart={command} node join {url} --token-file ${{CREDENTIALS_DIRECTORY}}/token --block
# Ranks get time to save: what runs here goes on elsewhere.
KillMode=mixed
TimeoutStopSec=180
Restart=always
RestartSec=5

[Install]
WantedBy=multi-user.target
"""


def unit(
    join: Annotated[str | None, typer.Option("--join", metavar="URL", help="The unit of a node of this yard.")] = None,
) -> None:
    """Print a systemd unit that keeps a yard up on this machine, or with --join a node of one.

    `tuneyard unit > /etc/systemd/system/tuneyard.service`, then `systemctl enable --now tuneyard`.
    """
    from orchestrator.settings import Settings

    command = shutil.which("tuneyard", path=str(Path(sys.executable).parent)) or f"{sys.executable} -m orchestrator"
    text = YARD if join is None else NODE
    typer.echo(text.format(user=getpass.getuser(), home=Settings().root, command=command, url=join), nl=False)
