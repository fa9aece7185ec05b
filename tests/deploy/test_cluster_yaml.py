"""The cluster launcher's file: valid, spot-safe, guarded by a token, of the versions that are tested."""

import re
import tomllib

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from resources import DEPLOY, ROOT, load


@pytest.fixture
def cluster():
    config = prepare_config(load("cluster.yaml"))
    validate_config(config)
    return config


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def test_ray_refuses_what_it_does_not_know():
    config = load("cluster.yaml") | {"idle_timeout": 5}
    with pytest.raises(ValidationError, match="idle_timeout"):
        validate_config(prepare_config(config))


def test_workers_are_spot_and_come_only_when_they_are_needed(cluster):
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert {name: kind["resources"].get("GPU", 0) > 0 for name, kind in types.items()} == {
        "data": False,
        "training": True,
    }
    for kind in types.values():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["min_workers"] == 0 < kind["max_workers"]
    assert sum(kind["max_workers"] for kind in types.values()) <= cluster["max_workers"]
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_every_node_asks_for_the_token_and_none_is_in_the_file(cluster):
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"AKIA|RAY_AUTH_TOKEN=|aws_secret|password", text, re.I)


def test_nodes_start_ray_behind_haproxy(cluster):
    for role in ("head", "worker"):
        (start,) = (line for line in cluster[f"{role}_start_ray_commands"] if "ray start" in line)
        assert start.startswith("RAY_SERVE_ENABLE_HA_PROXY=1 ray start ")


def test_nodes_get_what_installing_needs_at_the_pinned_versions(cluster):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    mounts = {
        remote.removeprefix("/home/ray/fleetcast/"): local for remote, local in cluster["file_mounts"].items()
    }
    for needed in ("pyproject.toml", "constraints.txt", "lib", project["readme"], *project["license-files"]):
        assert mounts[needed] == needed
        assert (ROOT / needed).exists()
    installs = [line for line in cluster["setup_commands"] if "pip install" in line]
    assert installs and all("--constraint /tmp/fleetcast/constraints.txt" in line for line in installs)


def test_all_files_name_the_same_versions():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [ROOT / "cluster.yaml", *(path for path in DEPLOY.rglob("*") if path.is_file())]
    text = "\n".join(path.read_text() for path in files)
    assert set(re.findall(r"rayproject/ray:([\w.]+)-py311\b", text)) == {pinned("ray")}
    assert set(re.findall(r"rayVersion: (\S+)", text)) == {pinned("ray")}
    assert set(re.findall(r"example/fleetcast:(\S+)", text)) == {version}


def test_the_image_copies_what_is_there():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"pyproject.toml", "constraints.txt", "lib", "jobs"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_the_overview_names_every_file():
    text = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*"):
        name = path.relative_to(DEPLOY)
        if path.is_file() and name.name != "README.md":
            assert f"]({name})" in text or f"]({name.parent})" in text


def test_every_manifest_is_one_document():
    for path in (*DEPLOY.rglob("*.y*ml"), ROOT / "cluster.yaml"):
        assert len(list(yaml.safe_load_all(path.read_text()))) == 1
