"""The address to listen on: whether it is free, and one socket on it that several processes share.

Shared, and not one socket per process on the same port (SO_REUSEPORT): there the kernel deals connections out by a hash
of the caller's address, to busy processes as to idle ones, and resets those that wait in the queue of one that ends.
From a shared queue, whoever has time takes the next, and what an ended process did not take, another one does.
"""

import logging
import resource
import socket
from ipaddress import ip_address

from service.errors import StartupError

logger = logging.getLogger(__name__)
OTHER_FILES = 256  # that a process has open beside its callers' connections: the store's, libraries, logs


def allow_connections(most: int, reserved: int) -> int:
    """How many of `most` connections this process may have, `reserved` more not counted, after it has asked for more.

    Many systems begin with 1,024 open files. A service that has none left can neither ask its store nor answer a probe,
    so it warns of a limit that is too low, and has fewer connections.
    """
    wanted = most + reserved + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        most = max(1, hard - reserved - OTHER_FILES)
        found = f"LREA_MAX_CONNECTIONS needs {wanted} open files, and the system allows {hard}"
        logger.warning("%s: raise its limit (ulimit -Hn), or set fewer; it is %d until then", found, most)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return most


def check_address(host: str, port: int) -> None:
    """Raise StartupError if nobody can listen there; asked before a model is loaded for nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise _refused(host, port, error) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. A name that cannot be looked up may be anything."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address that the host's name has. They are bound and do not listen yet: until a process does,
    callers are refused, as they are by a process that is not there. Raises StartupError."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise _refused(host, port, error) from error
    return listeners


def _refused(host: str, port: int, error: OSError) -> StartupError:
    return StartupError(f"cannot listen on {host}:{port} ({error.strerror}): set LREA_HOST and LREA_PORT")
