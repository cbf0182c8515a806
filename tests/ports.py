"""Ports for what a test starts."""

import random
import socket
from contextlib import ExitStack


def free_port():
    """With the one behind it, which a group's plans take. Below those that systems give to
    connections, or else one of these may have it before it is listened on."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000, 2)
        try:
            with ExitStack() as held:
                for each in (port, port + 1):
                    held.enter_context(socket.create_server(("127.0.0.1", each)))
        except OSError:
            continue
        return port
