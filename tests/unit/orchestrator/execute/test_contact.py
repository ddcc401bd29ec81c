"""When a node last heard of its yard."""

from __future__ import annotations

import socket
import time

from orchestrator.execute.contact import Contact, answers
from tests.yards import until


def test_a_machine_that_takes_or_refuses_a_connection_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert answers(address, 5)
    assert answers(address, 5), "nothing listens there any more, and the machine says so"


def test_a_machine_that_says_nothing_is_not() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        waiting = []
        for _ in range(4):  # its backlog is full: Linux lets further calls wait without a word
            call = socket.socket()
            call.setblocking(False)
            call.connect_ex(address)
            waiting.append(call)
        assert not answers(address, 0.2)
        for call in waiting:
            call.close()


def test_the_last_word_is_the_heads_or_the_controllers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        contact = Contact("{}:{}".format(*server.getsockname()))
        begun = time.monotonic()
        until(lambda: contact.last > begun)
        contact.close()
    contact.last = 0.0
    contact.heard()
    assert contact.last > begun
