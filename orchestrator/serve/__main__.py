"""`python -m orchestrator.serve`: one controller and its API, until SIGTERM. Attempts outlive it."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

import structlog
import uvicorn

from orchestrator.control.collector import collect_seldom
from orchestrator.control.loop import Controller
from orchestrator.errors import TuneyardError
from orchestrator.execute.protocol import Executor
from orchestrator.serve.api import create_app
from orchestrator.serve.fleet import open_fleet
from orchestrator.serve.secret import ensure_token
from orchestrator.settings import Settings
from orchestrator.store.store import Store


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to end. Returns an exit status: 0, or 2 with an error on stderr."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.serve", description=__doc__)
    parser.add_argument("--executor", choices=("local", "ray"), default="ray")
    parser.add_argument("--address", default="auto", help="the Ray cluster, for --executor ray (default: auto)")
    options = parser.parse_args(arguments)
    settings = Settings()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ]
    )
    try:
        serve(settings, options.executor, options.address)
    except TuneyardError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


def serve(settings: Settings, executor_name: str, address: str) -> None:
    """Run controller and API in this process until SIGTERM or SIGINT."""
    token = ensure_token(settings)
    store = Store(settings.url)
    store.prepare()
    executor, head = _executor(executor_name, address, settings)
    controller = Controller(store, executor, settings)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(controller, token, head),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
        )
    )
    collect_seldom()
    fleet = open_fleet(controller, settings)
    ended = False

    def on_signal(_signum: int, _frame: object) -> None:
        nonlocal ended
        ended = True  # nothing more: waking the controller takes a lock that this very thread may hold

    api = threading.Thread(target=server.run, name="api", daemon=True)
    api.start()
    if fleet is not None:
        fleet.start()
    # After the thread is made: uvicorn leaves signals alone off the main thread, and ours must win.
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        controller.run_until(lambda: ended or not api.is_alive())
    finally:
        if fleet is not None:
            fleet.close()
        controller.close()
        server.should_exit = True
        api.join(timeout=5)
        executor.close()
        store.close()


def _executor(name: str, address: str, settings: Settings) -> tuple[Executor, str | None]:
    """And where Ray's head is, if there is one."""
    if name == "local":
        from orchestrator.execute.local import LocalExecutor

        return LocalExecutor(settings.cpu_slots, standbys=settings.standbys, memory_gb=settings.memory_gb), None
    from orchestrator.execute.ray import RayExecutor

    executor = RayExecutor(address, settings.standbys)
    return executor, executor.head


if __name__ == "__main__":
    sys.exit(main())
