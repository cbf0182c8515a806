"""jax over several processes, and how many devices a CPU is: said before any is asked for."""

from __future__ import annotations

import jax

from fastserve_jax.errors import GroupLost

_SILENCE_S = 60  # jax ends a process whose peer is gone; whoever else watches should be sooner
_END_S = 10


def divide_cpu(count: int) -> None:
    """Into so many devices."""
    jax.config.update("jax_num_cpu_devices", count)  # type: ignore[no-untyped-call]


def join(coordinator: str, num_hosts: int, host_id: int, most_s: float) -> None:
    """Waits for all, so long at the most; once in a process. Raises GroupLost."""
    if jax.distributed.is_initialized():
        return
    # It would take SIGTERM from whoever wants to end in order.
    jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
    try:
        jax.distributed.initialize(
            coordinator,
            num_hosts,
            host_id,
            initialization_timeout=int(most_s),
            heartbeat_timeout_seconds=_SILENCE_S,
            shutdown_timeout_seconds=_END_S,
        )
    except RuntimeError as error:
        raise GroupLost(f"jax's coordinator at {coordinator}: {error}") from error


def part() -> None:
    """Of a group that ends in order: waits for the others to do so, for a while."""
    jax.distributed.shutdown()  # type: ignore[no-untyped-call]
