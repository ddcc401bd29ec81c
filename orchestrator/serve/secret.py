"""Secrets of a yard: given by a setting, or made once and kept where only their owner reads them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from orchestrator.errors import YardError
from orchestrator.settings import Settings

API_TOKEN = "token"
RAY_TOKEN = "ray-token"


def ensure_token(settings: Settings) -> str:
    """The API's token, made if there is none. Raises YardError if it cannot be kept."""
    if settings.token is not None:
        return settings.token.get_secret_value()
    return ensure_secret(settings.root / API_TOKEN)


def ensure_secret(path: Path) -> str:
    """The secret in `path`, made if there is none. Raises YardError if it cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written under another name first, so that nobody ever reads a file that is still empty.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        return path.read_text().strip()
    except OSError as problem:
        raise YardError(
            f"a secret cannot be kept in {path}: {problem.strerror}",
            code="no-secret",
            hint="choose a writable TUNEYARD_HOME",
        ) from problem
