"""What a machine is told that wants to be a node of this yard."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from orchestrator.control.loop import Controller
from orchestrator.errors import ConflictError
from orchestrator.serve.surroundings import ENV_YARD, is_loopback, versions
from orchestrator.views import JoinView

NO_STORE = {"Cache-Control": "no-store"}


def let_join(guarded: APIRouter, controller: Controller, head: str | None) -> None:
    """Add the route. `head` is where Ray's head listens, host:port; None for a yard without Ray."""

    @guarded.get("/joining", response_model=JoinView)
    def joining(request: Request) -> JSONResponse:
        """Where Ray's head is, and its token: for who has the yard's own."""
        if head is None:
            raise ConflictError(
                "this yard runs without Ray, on one machine", code="no-ray", hint="`tuneyard up` without --executor"
            )
        asker = request.client.host if request.client is not None else "127.0.0.1"
        if is_loopback(head.rpartition(":")[0]) and not is_loopback(asker):
            raise ConflictError(
                f"the yard's Ray listens on {head}, which no other machine reaches",
                code="loopback",
                hint="`tuneyard down`, then `TUNEYARD_HOST=ADDRESS tuneyard up` with this machine's address",
            )
        view = JoinView(
            yard=os.environ.get(ENV_YARD),
            home=str(controller.settings.root),
            head=head,
            ray_token=_ray_token(),
            redis="RAY_REDIS_ADDRESS" in os.environ,
            **versions(),
        )
        return JSONResponse(view.model_dump(mode="json"), headers=NO_STORE)


def _ray_token() -> str | None:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(path).read_text().strip() if path else os.environ.get("RAY_AUTH_TOKEN")
