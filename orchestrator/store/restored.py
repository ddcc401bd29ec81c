"""`python -m orchestrator.store.restored`: after an older copy of the database was put back, and before a controller
starts on it.

Attempts may have begun since the copy was made: their numbers are used up, in checkpoint stores and directories. So the
next attempt of each job that has not ended gets a number that none can have had. The database is that of
TUNEYARD_DATABASE_URL or TUNEYARD_HOME.
"""

from __future__ import annotations

import sys
import time

from orchestrator.errors import TuneyardError
from orchestrator.settings import Settings
from orchestrator.store.store import Store

GAP = 1000
"""More attempts than a job begins between two copies."""


def main() -> int:
    try:
        store = Store(Settings().url)
        try:
            store.prepare()
            count = store.skip_numbers(GAP, time.time())
        finally:
            store.close()
    except TuneyardError as problem:
        print(problem, file=sys.stderr)
        return 2
    print(f"{count} jobs have not ended; their next attempts have numbers that none has had")
    return 0


if __name__ == "__main__":
    sys.exit(main())
