"""Prometheus and Grafana ask for metrics and labels that the service has, and leave none of them unseen."""

import json
import re

import pytest
import yaml
from prometheus_client import CollectorRegistry

from cache_builder.job_metrics import GAUGES
from service.errors import ServiceError
from service.metrics import Metrics
from tests.docker.parsing import DOCKER, compose, instructions


def exposed_metrics() -> set[str]:
    """Every series name that the service's own metrics, and those of a build, can expose."""
    registry = CollectorRegistry()
    Metrics(registry)
    return set(registry._names_to_collectors) | set(GAUGES)


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of every alert, panel and annotation."""
    rules = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "lrea.json").read_text())
    alerts = [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]
    panels = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    notes = [(note["name"], note["expr"]) for note in dashboard["annotations"]["list"]]
    return alerts + panels + notes


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_metrics_that_are_asked_for_exist(where: str, expression: str) -> None:
    asked = set(re.findall(r"\b(lrea_\w+|up\b)", expression))
    assert asked, f"{where} asks for no metric of ours"
    assert asked <= exposed_metrics() | {"up"}, where
    assert expression.count("(") == expression.count(")"), where


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_labels_that_are_asked_for_exist(where: str, expression: str) -> None:
    labels = {
        label
        for collector in vars(Metrics(CollectorRegistry())).values()
        for label in getattr(collector, "_labelnames", ())
    }
    asked = {
        name for selector in re.findall(r"\{([^}]*)\}", expression) for name in re.findall(r"(\w+)\s*[=!]", selector)
    }
    grouped = {name for names in re.findall(r"\bby\s*\(([^)]*)\)", expression) for name in re.split(r"\s*,\s*", names)}
    assert asked | grouped <= labels | {"le", "job"}, where


def test_dashboard_shows_and_alerts_watch_every_metric_of_the_service() -> None:
    """A metric that nobody looks at is a metric to delete."""
    shown = " ".join(expression for _, expression in expressions())
    registry = CollectorRegistry()
    Metrics(registry)
    unseen = [family.name for family in registry.collect() if family.name not in shown]
    assert unseen == []


def test_alerts_say_what_to_do() -> None:
    rules = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]


def test_the_alert_of_server_errors_says_what_to_do_of_each() -> None:
    rules = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
    (action,) = (
        rule["annotations"]["action"]
        for group in rules["groups"]
        for rule in group["rules"]
        if rule["alert"] == "LreaServerErrors"
    )
    errors: list[type[ServiceError]] = [ServiceError, *ServiceError.__subclasses__()]
    answered = {error.status for error in errors if error.status >= 500}
    assert answered == {int(status) for status in re.findall(r"\b5\d\d\b", action)}


def test_prometheus_reads_the_rules_and_scrapes_the_service() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert all((DOCKER / "prometheus" / name).is_file() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in compose()["services"]
    assert dict(instructions(DOCKER / "service.Dockerfile"))["EXPOSE"] == port
    alerts = (DOCKER / "prometheus" / "alerts.yml").read_text()
    assert set(re.findall(r'job="([^"]+)"', alerts)) == {job["job_name"]}


def test_prometheus_with_a_key_differs_in_nothing_else() -> None:
    plain, keyed = (
        yaml.safe_load((DOCKER / "prometheus" / name).read_text()) for name in ("prometheus.yml", "prometheus.keys.yml")
    )
    (job,) = keyed["scrape_configs"]
    assert job.pop("authorization") == {"credentials_file": "/keys/key"}
    assert keyed == plain


def test_grafana_finds_its_datasource_and_dashboard() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "lrea.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "lrea.yaml").read_text())["providers"]
    grafana = compose()["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/lrea.json"
