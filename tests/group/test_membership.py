"""Who a host is, from what each orchestrator sets; flags go first."""

import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.group.membership import HostFlags, Membership, membership

LWS = {
    "LWS_LEADER_ADDRESS": "pod-0.pods.default",
    "LWS_GROUP_SIZE": "4",
    "LWS_WORKER_INDEX": "2",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.t,t-1.t,t-2.t,t-3.t", "TPU_WORKER_ID": "3"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "s-0-0.s:8080",
}
SLURM = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "node[003-005,9],other",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "1",
}


@pytest.mark.parametrize(
    ("environment", "hosts", "own", "coordinator"),
    [
        (LWS, 4, 2, "pod-0.pods.default:8476"),
        (TPU, 4, 3, "t-0.t:8476"),
        (TPU | SLICES, 8, 7, "s-0-0.s:8476"),
        (SLURM, 5, 1, "node003:56010"),
        (SLURM | {"SLURM_STEP_NODELIST": "a,b"}, 5, 1, "a:56010"),
        (
            {"NUM_HOSTS": "2", "JOB_COMPLETION_INDEX": "1", "COORDINATOR_ADDRESS": "j-0.j:99"},
            *(2, 1, "j-0.j:99"),
        ),
        (
            {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"},
            *(2, 1, "10.0.0.1:8476"),
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "[::1]:77",
                "JAX_NUM_PROCESSES": "3",
                "JAX_PROCESS_ID": "0",
            },
            *(3, 0, "[::1]:77"),
        ),
    ],
)
def test_each_orchestrator(environment, hosts, own, coordinator):
    found = membership(environment)
    assert (found.num_hosts, found.host_id, found.coordinator) == (hosts, own, coordinator)
    assert found.leads == (own == 0)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LWS | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"JOB_COMPLETION_INDEX": "3"},  # an indexed Job of servers that know nothing of each other
        {"SLURM_JOB_ID": "5"},
    ],
)
def test_one_host_where_nobody_speaks_of_more(environment):
    assert membership(environment) == Membership()


def flags(num_hosts, host_id, coordinator):
    return HostFlags(num_hosts=num_hosts, host_id=host_id, coordinator=coordinator)


def test_flags_go_before_the_environment():
    found = membership(LWS, flags(2, 1, "here:5"))
    assert found == Membership(2, 1, "here:5", "flags")
    assert found.plan_address == ("here", 6)
    assert membership(LWS, HostFlags(num_hosts=1)) == Membership()
    assert membership({}, flags(2, 0, "[::1]:5")).plan_address == ("::1", 6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((2, None, None), "go together"),
        ((2, 1, None), "go together"),
        ((None, 0, "a:1"), "go together"),
        ((2, 2, "a:1"), "no host 2 of 2"),
        ((2, -1, "a:1"), "no host -1 of 2"),
        ((0, 0, "a:1"), "no host 0 of 0"),
        ((2, 0, "a:x"), "not HOST:PORT"),
        ((2, 0, ":1"), "not HOST:PORT"),
        ((2, 0, "a:65535"), "not HOST:PORT"),  # there is none after it
    ],
)
def test_what_makes_no_group(given, reason):
    with pytest.raises(ConfigError, match=reason):
        membership({}, flags(*given))


def test_an_odd_environment_is_named():
    with pytest.raises(ConfigError, match=r"LeaderWorkerSet says something odd: .*'four'"):
        membership(LWS | {"LWS_GROUP_SIZE": "four"})
