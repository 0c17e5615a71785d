"""The compose file builds and mounts what exists, sets what is read, and is closed to the outside."""

import re
from pathlib import Path

import pytest

from service.settings import Settings
from tests.docker.parsing import DOCKER, ROOT, compose, settings_of


def test_compose_builds_and_mounts_what_exists() -> None:
    for name, service in compose()["services"].items():
        if build := service.get("build"):
            context = (DOCKER / build["context"]).resolve()
            assert context == ROOT
            assert (context / build["dockerfile"]).is_file()
        else:
            assert re.search(r":v?\d+\.\d+[\w.-]*$", service["image"]), f"{name}: {service['image']} is not pinned"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), f"{name} mounts {source}"
            elif not source.startswith("${"):
                assert source in compose()["volumes"], f"{name} mounts {source}"


def test_compose_sets_only_settings_that_exist() -> None:
    for file in ("compose.yaml", "compose.gpu.yaml", "compose.keys.yaml"):
        for name, service in compose(file)["services"].items():
            ours = {key for key in service.get("environment", {}) if key.startswith("LREA_")}
            assert ours <= (settings_of(name) if name in ("service", "builder") else set()), f"{file}: {name}"


def test_compose_values_are_accepted() -> None:
    environment = compose()["services"]["service"]["environment"]
    settings = Settings(**{key.removeprefix("LREA_").lower(): value for key, value in environment.items()})
    assert settings.store_url == "redis://store:6379/0"
    assert settings.key_prefix == compose()["services"]["builder"]["environment"]["LREA_KEY_PREFIX"]


def test_compose_lets_the_service_finish() -> None:
    patience = compose()["services"]["service"]["stop_grace_period"]
    assert int(patience.removesuffix("s")) >= Settings().drain_seconds + Settings().grace_seconds + 10


def test_compose_is_hardened_and_stays_on_this_host() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.keys() & {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc"}, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    command = compose()["services"]["store"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert "--maxmemory" in command


@pytest.mark.parametrize("file", ["compose.gpu.yaml", "compose.keys.yaml"])
def test_other_files_change_services_that_exist(file: str) -> None:
    assert compose(file)["services"].keys() <= compose()["services"].keys()


def test_keys_are_mounted_where_they_are_looked_for() -> None:
    service, prometheus = (compose("compose.keys.yaml")["services"][name] for name in ("service", "prometheus"))
    [keys] = service["volumes"]
    assert keys.endswith("}/service:/keys:ro")
    assert service["environment"] == {"LREA_API_KEYS_FILE": "/keys/api-keys"}
    [key] = prometheus["volumes"]
    assert key.endswith("}/prometheus:/keys:ro")
    [config] = [word.partition("=")[2] for word in prometheus["command"] if word.startswith("--config.file=")]
    assert (DOCKER / "prometheus" / Path(config).name).is_file()
    assert f"./prometheus:{Path(config).parent}:ro" in compose()["services"]["prometheus"]["volumes"]
