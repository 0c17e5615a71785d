"""`python -m service.keys new NAME --role ROLE`: makes an API key. It stores nothing, and no setting is read.

Prints two lines: the key, for whoever will ask with it, and the line for the service's file, which does not tell it.
"""

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from service.access.api_keys import ApiKey, Role, check_name, digest_of, new_key, parse_time

command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command.callback()
def main() -> None:
    """API keys of the scoring service: docs/service.md, "Who may ask"."""


@command.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is: stands in logs, and in answers to its holder.")],
    role: Annotated[Role, typer.Option(help="What it is for.")],
    expires: Annotated[str | None, typer.Option(help="Date or time in UTC from which it is refused.")] = None,
) -> None:
    """Print a new key, once, and the line for the file of keys."""
    text = new_key()
    try:
        key = ApiKey(check_name(name), role, digest_of(text.encode()), None if expires is None else parse_time(expires))
        if key.has_expired(datetime.now(UTC)):
            raise ValueError("the expiry is over already, wanted a time to come")
    except ValueError as error:
        print(f"no key made: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(text)
    print(key.line())


if __name__ == "__main__":
    command()
