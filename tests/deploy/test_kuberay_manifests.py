"""The manifests for KubeRay: valid, spot-safe, guarded, and the same server as serve_config.yaml."""

import copy

import pytest
import yaml
from fleetcast.serving.options import ServeOptions
from pydantic import ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from resources import DEPLOY, RayCluster, RayService, load, of_kubernetes

SECRETS = {"fleetcast-ray": "auth_token", "fleetcast-api": "token"}


@pytest.fixture
def cluster():
    manifest = load("deploy/kuberay/raycluster.yaml")
    RayCluster.model_validate(manifest)
    return manifest


@pytest.fixture
def service():
    manifest = load("deploy/kuberay/rayservice.yaml")
    RayService.model_validate(manifest)
    return manifest


def groups(spec):
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def containers():
    """Every container of every manifest."""
    cluster = load("deploy/kuberay/raycluster.yaml")["spec"]
    service = load("deploy/kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]
    job = load("deploy/kuberay/nightly.yaml")["spec"]["jobTemplate"]["spec"]["template"]
    pods = [group["template"] for group in (*groups(cluster), *groups(service))]
    return [container for pod in (*pods, job) for container in pod["spec"]["containers"]]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.workerGroupSpec", []),
        ("spec.authOptions.mode", "tokens"),
        ("spec.workerGroupSpecs.0.minReplicas", 99),
        ("spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.headGroupSpec.template.spec.containers.0.imge", "x"),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.cpu", [1]),
    ],
)
def test_a_slip_in_a_manifest_is_seen(cluster, path, value):
    broken = copy.deepcopy(cluster)
    place = broken
    *way, last = path.split(".")
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    with pytest.raises(ValidationError, match=last):
        RayCluster.model_validate(broken)


def test_the_autoscaler_reads_the_cluster_as_meant(cluster):
    cluster["metadata"]["namespace"] = "fleetcast"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert types["data"]["resources"]["CPU"] == 14
    assert types["training"]["resources"]["GPU"] == 1
    for name in ("data", "training"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
        assert types[name]["labels"]["ray.io/market-type"] == "spot"


def test_only_workers_of_jobs_are_on_spot_nodes(cluster, service):
    def kinds(spec):
        label = "karpenter.sh/capacity-type"
        return [group["template"]["spec"]["nodeSelector"][label] for group in groups(spec)]

    assert kinds(cluster["spec"]) == ["on-demand", "spot", "spot"]
    assert set(kinds(service["spec"]["rayClusterConfig"])) == {"on-demand"}


def test_a_slip_in_the_serve_config_is_seen(service):
    service["spec"]["serveConfigV2"] = service["spec"]["serveConfigV2"].replace("route_prefix", "route")
    with pytest.raises(ValidationError, match="route"):
        RayService.model_validate(service)


def test_serves_what_serve_config_yaml_says_but_from_s3_and_with_a_token(service):
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    expected = load("serve_config.yaml")
    arguments = [application.pop("args") for application in config["applications"]]
    for application in expected["applications"]:
        application.pop("args")
    assert config == expected, "copy serve_config.yaml, but for args, to deploy/kuberay/rayservice.yaml"

    (options,) = (ServeOptions(**given) for given in arguments)
    assert options.store.startswith("s3://")
    assert options.clock == "wall"
    for group in groups(service["spec"]["rayClusterConfig"]):
        (container,) = group["template"]["spec"]["containers"]
        assert options.token_variable in {variable["name"] for variable in container["env"]}


def test_the_service_is_where_others_look_for_it(service):
    found = service["spec"]["serveService"]
    port = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["port"]
    assert found["metadata"]["name"] == "fleetcast"
    assert found["spec"]["ports"] == [{"name": "serve", "port": port}]
    for path in (
        "deploy/keda/scaledobject-replicas.yaml",
        "deploy/keda/scaledobject-load.yaml",
        "deploy/prometheus/prometheus.yml",
        "deploy/grafana/datasources.yaml",
    ):
        assert f"fleetcast.fleetcast:{port}" in str(load(path))


def test_every_node_of_the_server_is_behind_haproxy(service):
    for group in groups(service["spec"]["rayClusterConfig"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in container["env"]


def test_clusters_ask_for_the_token_and_do_not_share_a_name(cluster, service):
    for spec in (cluster["spec"], service["spec"]["rayClusterConfig"]):
        assert spec["authOptions"] == {"mode": "token", "secretName": "fleetcast-ray"}
    assert cluster["metadata"]["name"] != service["metadata"]["name"]  # both make NAME-head-svc


def test_secrets_are_referred_to_and_made_by_the_overview():
    overview = (DEPLOY / "README.md").read_text()
    for name, key in SECRETS.items():
        assert f"create secret generic {name} --from-literal={key}=" in overview
    for container in containers():
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom"):
                secret = reference["secretKeyRef"]
                assert SECRETS[secret["name"]] == secret["key"]
            elif variable["name"] != "RAY_AUTH_MODE":
                assert not any(word in variable["name"] for word in ("TOKEN", "AUTH", "KEY", "PASSWORD"))


def test_containers_run_as_a_user_without_rights():
    for container in containers():
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"]["memory"]


def test_the_service_account_is_the_one_that_pods_have(cluster, service):
    account = load("deploy/kuberay/serviceaccount.yaml")
    of_kubernetes(account)
    for spec in (cluster["spec"], service["spec"]["rayClusterConfig"]):
        for group in groups(spec):
            assert group["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
