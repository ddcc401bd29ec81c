"""`python -m orchestrator.store.restored`: after an older copy of the database was put back, and before a controller
starts on it.

Attempts may have begun since the copy was made: their numbers are used up, in checkpoint stores and directories. So the
next attempt of each job that has not ended gets a number that none can have had. The database is that of
TUNEYARD_DATABASE_URL or TUNEYARD_HOME.
"""

from __future__ import annotations

import sys
import time

import sqlalchemy as sa

from orchestrator.errors import ConflictError, TuneyardError
from orchestrator.settings import Settings
from orchestrator.store import schema
from orchestrator.store.jobs import LIVE
from orchestrator.store.store import CONTROLLER, Store

GAP = 1000
"""More attempts than a job begins between two copies."""


def skip_numbers(store: Store, now: float) -> int:
    """Let the next attempts of all live jobs begin GAP later. Returns how many jobs there are.

    Raises:
        ConflictError: a controller acts on the database.
        StoreError: it cannot be used.
    """
    jobs, leases = schema.jobs, schema.leases
    store.prepare()
    with store._errors(), store._writing.begin() as connection:
        held = sa.select(leases.c.holder).where(leases.c.name == CONTROLLER, leases.c.expires_at > now)
        holder = connection.execute(held.with_for_update()).scalar()
        if holder is not None:
            raise ConflictError(
                f"the controller {holder} acts on this database",
                code="controller-acts",
                hint="end all controllers; a lease in an older copy is over after some seconds",
            )
        live = jobs.c.state.in_(LIVE)
        ids = list(connection.execute(sa.select(jobs.c.id).where(live)).scalars())
        connection.execute(jobs.update().where(live).values(attempts=jobs.c.attempts + GAP))
        told = {"numbers_skipped": GAP}
        events = [{"job_id": one, "attempt": None, "time": now, "kind": "restored", "data": told} for one in ids]
        if events:
            connection.execute(schema.events.insert(), events)
    return len(ids)


def main() -> int:
    try:
        store = Store(Settings().url)
        try:
            count = skip_numbers(store, time.time())
        finally:
            store.close()
    except TuneyardError as problem:
        print(problem, file=sys.stderr)
        return 2
    print(f"{count} jobs have not ended; their next attempts have numbers that none has had")
    return 0


if __name__ == "__main__":
    sys.exit(main())
