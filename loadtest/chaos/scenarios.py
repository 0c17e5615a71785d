"""The scenarios of `make chaos`, in the order in which they run."""

from collections.abc import Mapping

from loadtest.chaos.cancellations import cancellations
from loadtest.chaos.flips import flips
from loadtest.chaos.overload import overload
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.store_faults import store_faults

SCENARIOS: Mapping[str, Scenario] = {
    "overload": overload,
    "cancellations": cancellations,
    "store": store_faults,
    "flips": flips,
}
