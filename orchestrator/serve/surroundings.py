"""Where a server runs, and what of: without the server, for who starts or joins it."""

from __future__ import annotations

import ipaddress
import platform
from importlib.metadata import version

from launch import __version__

ENV_YARD = "TUNEYARD_YARD"
"""Holds a yard's id in all of its processes."""


def versions() -> dict[str, str]:
    """Of what must be the same on all nodes, on this one."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "ray": version("ray"), "tuneyard": __version__}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
