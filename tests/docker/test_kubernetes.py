"""The manifests agree with each other, with the images and with the service's settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.docker.parsing import DOCKER, settings_of


def manifests() -> list[dict[str, Any]]:
    files = sorted((DOCKER / "kubernetes").glob("*.yaml"))
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod template of every workload in the manifests."""
    for manifest in manifests():
        spec = manifest.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            yield manifest["metadata"]["name"], template["spec"]


def test_kustomization_names_every_manifest() -> None:
    folder = DOCKER / "kubernetes"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    files = {file.name for file in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    images = {container["image"] for _, pod in pods() for container in pod["containers"]}
    assert {image["name"] for image in kustomization["images"]} == images


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=[name for name, _ in pods()])
def test_pod_is_locked_down_and_sets_only_settings_that_exist(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["runAsGroup"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]
    variables = {variable["name"] for variable in container["env"] if variable["name"].startswith("LREA_")}
    assert variables <= settings_of(name.removeprefix("lrea-"))
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_config_map_keys_that_are_asked_for_exist() -> None:
    (config,) = [manifest for manifest in manifests() if manifest["kind"] == "ConfigMap"]
    asked = [
        reference["configMapKeyRef"]
        for _, pod in pods()
        for variable in pod["containers"][0]["env"]
        if "configMapKeyRef" in (reference := variable.get("valueFrom", {}))
    ]
    assert {(reference["name"], reference["key"]) for reference in asked} == {
        (config["metadata"]["name"], key) for key in config["data"]
    }


def test_probes_ask_the_routes_that_they_mean() -> None:
    container = dict(pods())["lrea-service"]["containers"][0]
    paths = {probe: container[probe]["httpGet"]["path"] for probe in container if probe.endswith("Probe")}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}


def test_api_keys_come_from_a_secret_that_is_not_here() -> None:
    pod = dict(pods())["lrea-service"]
    container = pod["containers"][0]
    [file] = [Path(each["value"]) for each in container["env"] if each["name"] == "LREA_API_KEYS_FILE"]
    [mount] = [each for each in container["volumeMounts"] if each["mountPath"] == str(file.parent)]
    assert mount["readOnly"] is True
    assert "subPath" not in mount, "it would never see a change"
    [volume] = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    assert volume["secret"] == {"secretName": "lrea-api-keys"}
    assert f"lrea-api-keys --from-file={file.name}" in (DOCKER / "kubernetes" / "kustomization.yaml").read_text()
    assert "Secret" not in {manifest["kind"] for manifest in manifests()}


def test_a_pod_outlives_its_drain() -> None:
    pod = dict(pods())["lrea-service"]
    environment = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    settings = Settings(drain_seconds=environment["LREA_DRAIN_SECONDS"])
    assert settings.drain_seconds > 5, "endpoints take seconds to forget a pod"
    assert pod["terminationGracePeriodSeconds"] >= settings.drain_seconds + settings.grace_seconds + 15  # with workers
