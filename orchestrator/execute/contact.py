"""When a node last heard of its yard. Standard library alone.

A node that the network has cut off is lost to its yard, which starts the job elsewhere once the leash has passed. The
node's agent may live on, and must not keep ranks alive that the yard takes for ended: a heartbeat is as old as the last
contact.

A controller may be dead for as long as it likes, and Ray's head, too: nothing starts elsewhere meanwhile. So what
counts as contact is a call of the controller, or that the head's machine answers, if only to refuse. What does not: no
answer at all. (Who reaches the head, and is not reached by the controller, for longer than a leash, goes unnoticed: the
number of the attempt then keeps its checkpoints apart.)
"""

from __future__ import annotations

import socket
import threading
import time

EVERY_S = 1.0
PATIENCE_S = 2.0


class Contact:
    """Asks the head's machine every now and then, in a thread of its own."""

    def __init__(self, address: str) -> None:
        """`address` is the head's, host:port."""
        host, _, port = address.rpartition(":")
        self._address = host.strip("[]"), int(port)
        self.last = time.monotonic()
        """Of time.monotonic()."""
        self._over = threading.Event()
        threading.Thread(target=self._ask, name="contact", daemon=True).start()

    def heard(self) -> None:
        """The controller has called."""
        self.last = time.monotonic()

    def close(self) -> None:
        """From here on nothing is heard any more."""
        self._over.set()

    def _ask(self) -> None:
        while not self._over.is_set():
            asked = time.monotonic()
            if answers(self._address, PATIENCE_S):
                self.last = max(self.last, asked)
            self._over.wait(EVERY_S)


def answers(address: tuple[str, int], patience: float) -> bool:
    """Whether a machine is there: it takes a connection, or refuses it."""
    try:
        with socket.create_connection(address, patience):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
