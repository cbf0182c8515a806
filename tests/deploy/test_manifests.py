"""What configs/deploy/ gives to a cluster: valid by its schemas, and true of this server."""

import math
import os
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from fastserve_jax.cli import app
from fastserve_jax.config import load_settings
from fastserve_jax.group.leader import START_S
from fastserve_jax.group.membership import membership
from fastserve_jax.meters import ModelMetrics
from fastserve_jax.server.config import ServerConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "configs" / "deploy"
GROUPS = ("tpu-v5e-4x4", "tpu-v6e-4x4", "gpu-h100-2x8")
CORE = ("Service", "PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy")
CRDS = {
    "leaderworkerset.x-k8s.io/v1": "leaderworkersets.yaml",
    "inference.networking.k8s.io/v1": "inferencepools.yaml",
}


def documents(name):
    text = (DEPLOY / f"{name}.yaml").read_text()
    return [document for document in yaml.safe_load_all(text) if document]


def group(name):
    (only,) = documents(name)
    return only


def templates(name):
    spec = group(name)["spec"]["leaderWorkerTemplate"]
    return spec["leaderTemplate"], spec["workerTemplate"]


def container(template):
    (only,) = template["spec"]["containers"]
    return only


def beside(kind):
    (only,) = [document for document in documents("serving") if document["kind"] == kind]
    return only


@pytest.mark.parametrize("kind", CORE)
def test_kubernetes_takes_it(kind):
    document = beside(kind)
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_refuses_a_name_that_it_does_not_know():
    document = beside("Service")
    document["spec"]["prots"] = document["spec"].pop("ports")
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", GROUPS)
def test_kubernetes_takes_the_pods(name):
    for template in templates(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
        pod["metadata"] = {"name": "one", **template["metadata"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", [*GROUPS, "inference-pool"])
def test_the_other_controllers_take_it(shared, name):
    (document,) = documents(name)
    crd = yaml.safe_load(shared(f"api/crds/{CRDS[document['apiVersion']]}").read_text())
    version = document["apiVersion"].rpartition("/")[2]
    (schema,) = [v["schema"] for v in crd["spec"]["versions"] if v["name"] == version]
    closed = strict(schema["openAPIV3Schema"])
    assert not [*jsonschema.Draft7Validator(closed).iter_errors(document)]


def strict(schema):
    """With every name that is not in it refused, as the API server does with field validation; of
    metadata a CRD says nothing."""
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema:
        made["properties"] = {name: strict(of) for name, of in schema["properties"].items()}
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


@pytest.mark.parametrize("name", GROUPS)
def test_every_host_runs_the_same_command_and_it_is_one(name):
    leader, worker = map(container, templates(name))
    assert leader["args"] == worker["args"]
    assert leader["image"] == worker["image"]
    command, bound, _ = app.parse_args(leader["args"], print_error=False, exit_on_error=False)
    assert command.__name__ == "serve"
    config = bound.arguments["config"]
    assert config.parts[:2] == ("/", "app")
    settings = load_settings(ROOT / config.relative_to("/app"))
    assert settings.engine.max_slots > 32


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_is_the_slice_that_it_asks_for(name):
    size = group(name)["spec"]["leaderWorkerTemplate"]["size"]
    for template in templates(name):
        (chips,) = {int(n) for n in container(template)["resources"]["limits"].values()}
        assert (
            container(template)["resources"]["requests"]
            == (container(template)["resources"]["limits"])
        )
        topology = template["spec"]["nodeSelector"].get("cloud.google.com/gke-tpu-topology")
        if topology:
            assert math.prod(map(int, topology.split("x"))) == size * chips
    environment = {"LWS_LEADER_ADDRESS": "a.b", "LWS_GROUP_SIZE": str(size)}
    found = membership(environment | {"LWS_WORKER_INDEX": str(size - 1)})
    assert (found.num_hosts, found.host_id) == (size, size - 1)


@pytest.mark.parametrize("name", GROUPS)
def test_probes_give_it_time_and_leave_it_none_to_be_broken(name):
    leader = container(templates(name)[0])
    start = leader["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= START_S
    assert start["httpGet"]["path"] == leader["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert leader["livenessProbe"]["httpGet"]["path"] == "/health"
    grace = templates(name)[0]["spec"]["terminationGracePeriodSeconds"]
    wait = leader["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert container(templates(name)[1])["lifecycle"] == leader["lifecycle"], "it stops the group"
    assert wait + ServerConfig().drain_timeout_s < grace
    assert "livenessProbe" not in container(templates(name)[1]), "nothing listens there"
    (port,) = [p["containerPort"] for p in leader["ports"] if p["name"] == "http"]
    assert port == ServerConfig().port


@pytest.mark.parametrize("name", GROUPS)
def test_labels_lead_from_one_to_the_other(name):
    leader, worker = (template["metadata"]["labels"] for template in templates(name))
    assert beside("Service")["metadata"]["name"] != group(name)["metadata"]["name"], (
        "a group's own Service is made only where none has its name"
    )
    service = beside("Service")["spec"]
    assert service["selector"].items() <= leader.items()
    assert not service["selector"].items() <= worker.items()
    assert [port["targetPort"] for port in service["ports"]] == ["http"]
    (pool,) = documents("inference-pool")
    assert pool["spec"]["selector"]["matchLabels"].items() <= leader.items()
    assert not pool["spec"]["selector"]["matchLabels"].items() <= worker.items()
    for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        chosen = beside(kind)["spec"][key]["matchLabels"].items()
        assert chosen <= leader.items()
        assert chosen <= worker.items()
    claims = [
        v["persistentVolumeClaim"]["claimName"]
        for t in templates(name)
        for v in t["spec"]["volumes"]
        if "persistentVolumeClaim" in v
    ]
    assert claims == [beside("PersistentVolumeClaim")["metadata"]["name"]] * 2


def test_the_numbers_that_a_picker_reads_are_there():
    text = (DEPLOY / "inference-pool.yaml").read_text()
    named = set(re.findall(r"fastserve:(\w+)", text))
    source = Path(ModelMetrics.__module__.replace(".", os.sep) + ".py")
    assert len(named) == 3
    assert all(name in (ROOT / source).read_text() for name in named)


def test_the_image_is_made_of_what_is_here():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [
        word
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
    ]
    assert len(copied) >= 5
    assert all((ROOT / name).exists() for name in copied)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    said = next(line for line in lines if line.startswith("# EXTRA is"))
    named = re.findall(r"\b(tpu|cuda\d+|hub)\b", said)
    assert set(named) == {"tpu", "cuda12", "cuda13", "hub"}
    assert set(named) <= set(extras)
    environment = dict(re.findall(r"(\w+)=(\S+)", next(x for x in lines if x.startswith("ENV"))))
    for name in GROUPS:
        mounts = {m["name"]: m["mountPath"] for m in container(templates(name)[1])["volumeMounts"]}
        for kept in ("FASTSERVE_CACHE", "HF_HOME"):
            assert environment[kept].startswith(mounts["cache"] + "/")
    (user,) = [line.split()[1] for line in lines if line.startswith("USER")]
    assert user != "root"
    for name in GROUPS:
        assert container(templates(name)[0])["image"].startswith("fastserve-jax:")
