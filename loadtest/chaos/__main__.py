"""Faults made on purpose while the service is asked, and what they cost (docs/reliability.md).

    python -m loadtest.chaos [--only overload] [--out docs/reliability]

Needs two cores and Linux. Ends with one JSON line, and with exit status 1 if something that was wanted is not found.
"""

from pathlib import Path
from typing import Annotated

import typer

from loadtest.chaos.report import main_of
from loadtest.chaos.scenarios import SCENARIOS


def main(
    only: Annotated[list[str], typer.Option(help="scenarios, by name; all of them if not given")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="write chaos.json and chaos.md into this folder")] = None,
) -> None:
    """Carry out the scenarios, one after another."""
    if unknown := sorted(set(only) - SCENARIOS.keys()):
        raise typer.BadParameter(f"--only is {', '.join(unknown)}: wanted some of {', '.join(SCENARIOS)}")
    main_of("chaos", {name: scenario for name, scenario in SCENARIOS.items() if not only or name in only}, out)


if __name__ == "__main__":
    typer.run(main)
