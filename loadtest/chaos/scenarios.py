"""The scenarios of `make chaos`, in the order in which they run."""

from collections.abc import Mapping

from loadtest.chaos.scenario import Scenario

SCENARIOS: Mapping[str, Scenario] = {}
