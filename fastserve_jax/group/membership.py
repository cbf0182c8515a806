"""Which host of a group this process is: from flags, or from what its orchestrator says.

A pure function of the environment, because jax's own detection asks machines that may not be there
and does not know LeaderWorkerSet. Reads nothing by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastserve_jax.errors import ConfigError

PORT = 8476  # of jax's coordinator; plans go by the one after it


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFlags:
    """As they are typed.

    Attributes
    ----------
    num_hosts
        Hosts that serve together as one, each started with the same command but its --host-id.
        LeaderWorkerSet, GKE's TPU pods, SLURM and SkyPilot say it by themselves.
    host_id
        Which of them this is; 0 leads, and is the one that listens.
    coordinator
        HOST:PORT by which they meet, on host 0; the port after it is taken, too.
    """

    num_hosts: int | None = None
    host_id: int | None = None
    coordinator: str | None = None


@dataclass(frozen=True, slots=True)
class Membership:
    """`coordinator` is HOST:PORT of host 0, which leads."""

    num_hosts: int = 1
    host_id: int = 0
    coordinator: str = ""
    told_by: str = ""  # who says so, for messages

    @property
    def leads(self) -> bool:
        return self.host_id == 0

    @property
    def plan_address(self) -> tuple[str, int]:
        """Where host 0 hands out plans."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1


def membership(environment: Mapping[str, str], flags: HostFlags = HostFlags()) -> Membership:
    """Flags over the environment, which is asked one orchestrator after the other. One host where
    nobody speaks of more. Raises ConfigError for what does not make a group."""
    num_hosts, host_id, coordinator = flags.num_hosts, flags.host_id, flags.coordinator
    if not (num_hosts is None and host_id is None and not coordinator):
        if num_hosts == 1:
            return Membership()
        if num_hosts is None or host_id is None or not coordinator:
            raise ConfigError("--num-hosts, --host-id and --coordinator go together")
        return _checked(num_hosts, host_id, coordinator, "flags")
    for told_by, read in _ORCHESTRATORS.items():
        try:
            found = read(environment)
        except KeyError:
            continue
        except ValueError as error:
            raise ConfigError(f"{told_by} says something odd: {error}") from error
        if found is not None and found[0] > 1:
            return _checked(*found, told_by)
    return Membership()


def _checked(num_hosts: int, host_id: int, coordinator: str, told_by: str) -> Membership:
    if num_hosts < 1 or not 0 <= host_id < num_hosts:
        raise ConfigError(f"{told_by}: no host {host_id} of {num_hosts}: they count from 0")
    host, colon, port = coordinator.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = coordinator, str(PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ConfigError(f"{told_by}: the coordinator {coordinator!r} is not HOST:PORT")
    return Membership(num_hosts, host_id, f"{host}:{port}", told_by)


type _Found = tuple[int, int, str] | None  # hosts, which one, coordinator


def _jax(env: Mapping[str, str]) -> _Found:
    number, own = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
    return number, own, env["JAX_COORDINATOR_ADDRESS"]


def _leader_worker_set(env: Mapping[str, str]) -> _Found:
    number, own = int(env["LWS_GROUP_SIZE"]), int(env["LWS_WORKER_INDEX"])
    return number, own, env["LWS_LEADER_ADDRESS"]


def _gke_tpu(env: Mapping[str, str]) -> _Found:
    """One slice, or several of a multislice job: workers of the first come first."""
    workers, own = env["TPU_WORKER_HOSTNAMES"].split(","), int(env["TPU_WORKER_ID"])
    slices, slice_id = (
        int(env.get("MEGASCALE_NUM_SLICES", 1)),
        int(env.get("MEGASCALE_SLICE_ID", 0)),
    )
    leader = env["MEGASCALE_COORDINATOR_ADDRESS"].partition(":")[0] if slices > 1 else workers[0]
    return len(workers) * slices, slice_id * len(workers) + own, leader


def _job_set(env: Mapping[str, str]) -> _Found:
    """An indexed Job whose manifest says how many pods there are, and who the first of them is."""
    number, own = int(env["NUM_HOSTS"]), int(env["JOB_COMPLETION_INDEX"])
    return number, own, env["COORDINATOR_ADDRESS"]


def _slurm(env: Mapping[str, str]) -> _Found:
    number, own = int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"])
    # Jobs on one machine must not meet: as jax does, the port is of the job.
    port = int(env["SLURM_JOB_ID"]) % 4096 * 2 + 56000
    return number, own, f"{_first_node(env['SLURM_STEP_NODELIST'])}:{port}"


def _first_node(nodes: str) -> str:
    """Of "node[003-005,9],other": node003."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if found is None:
        raise ValueError(f"a list of nodes {nodes!r}")
    return found[1] + (found[2] or "")


def _sky_pilot(env: Mapping[str, str]) -> _Found:
    nodes = env["SKYPILOT_NODE_IPS"].split()
    return len(nodes), int(env["SKYPILOT_NODE_RANK"]), nodes[0]


_ORCHESTRATORS: dict[str, Callable[[Mapping[str, str]], _Found]] = {
    "JAX_COORDINATOR_ADDRESS": _jax,
    "LeaderWorkerSet": _leader_worker_set,
    "GKE's TPU webhook": _gke_tpu,
    "JobSet": _job_set,
    "SLURM": _slurm,
    "SkyPilot": _sky_pilot,
}
