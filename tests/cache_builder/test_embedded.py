"""The store in a folder: what it held at a clean stop is there at the next start, and nobody else writes over it."""

from pathlib import Path

import pytest
from redis import Redis

from cache_builder.embedded import open_store, serve_folder
from cache_builder.errors import StoreError
from cache_builder.store import Store
from tests.conftest import free_port


def test_data_outlives_the_server(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path / 'store'}"
    for number in range(3):
        with open_store(url) as store:
            found = store.get_many([f"key-{earlier}" for earlier in range(3)])
            assert found == [b"x"] * number + [None] * (3 - number)
            store.set_many([(f"key-{number}", b"x")])


def test_data_is_saved_after_a_failure_inside(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path}"

    def write_and_fail() -> None:
        with open_store(url) as store:
            store.set_many([("key", b"x")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    with open_store(url) as store:
        assert store.get("key") == b"x"


def start(folder: Path, port: int | None = None) -> None:
    with serve_folder(folder, port):
        pass


def test_a_folder_in_use_is_refused_with_the_url_to_use_instead(tmp_path: Path) -> None:
    with serve_folder(tmp_path) as url:
        with pytest.raises(StoreError, match=f"is in use by a running store: stop it, or give its URL, {url}"):
            start(tmp_path)
        with open_store(url) as store:
            store.ping()


def test_the_port_is_the_one_asked_for_or_an_error(tmp_path: Path) -> None:
    port = free_port()
    with serve_folder(tmp_path / "a", port) as url:
        assert url == f"redis://127.0.0.1:{port}"
        with pytest.raises(StoreError, match=f"did not start in .*b: Port {port} is already in use"):
            start(tmp_path / "b", port)


def test_a_folder_with_white_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="white space in its path"):
        start(tmp_path / "a b")


def test_data_that_cannot_be_saved_is_an_error(tmp_path: Path) -> None:
    def put_something_in_the_way() -> None:
        with open_store(f"embedded:{tmp_path}") as store:
            store.set_many([("key", b"x")])
            (tmp_path / "dump.rdb").mkdir()

    with pytest.raises(StoreError, match="did not save"):
        put_something_in_the_way()


def test_a_server_that_died_inside_does_not_hide_why(tmp_path: Path) -> None:
    def kill_and_ask() -> None:
        with serve_folder(tmp_path) as url, Store(url) as store:
            with Redis.from_url(url) as admin:
                admin.shutdown(nosave=True)
            store.get("key")

    with pytest.raises(StoreError, match="did not read"):
        kill_and_ask()


def test_a_store_that_does_not_answer_is_an_error_at_once() -> None:
    with pytest.raises(StoreError, match="did not answer"), open_store(f"redis://127.0.0.1:{free_port()}"):
        pass
