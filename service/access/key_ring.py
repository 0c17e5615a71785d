"""The API keys that are in force: those of the variable, and those of the file as it last was good.

The file is read again every few seconds, and not only when its time or size changes: it is short, and so nothing is
missed, neither two changes within one tick of the file system's clock nor a link that points elsewhere, as Kubernetes'
do.
"""

import asyncio
import hmac
import logging
import math
import stat
from datetime import UTC, datetime
from pathlib import Path

from service.access.api_keys import ApiKey, check_together, digest_of, parse_keys, shown, utc
from service.errors import ApiKeysError, Unauthorized
from service.metrics import Metrics
from service.tasks import in_daemon_thread

logger = logging.getLogger(__name__)
POLL_S = 2.0
READ_S = 10.0  # a file on a network may hang for good
MAX_FILE_BYTES = 1 << 20  # 10,000 keys: whatever is larger is another file
FILE, VARIABLE = "LREA_API_KEYS_FILE", "LREA_API_KEYS"


class KeyRing:
    """Who holds a key. Its constructor raises ApiKeysError."""

    def __init__(self, file: Path | None, variable: str | None, metrics: Metrics) -> None:
        """file, variable: what the two settings say; one of them is there."""
        self._file = file
        self._metrics = metrics
        self._fixed = [] if variable is None else parse_keys(variable.replace(";", "\n"), VARIABLE)
        self._source = " and ".join([FILE] * (file is not None) + [VARIABLE] * (variable is not None))
        self._content = self._read()
        self._reading: asyncio.Task[bytes] | None = None
        self._refused: str | None = None
        self._adopt(self._content)

    def holder(self, presented: bytes) -> ApiKey:
        """The key that this is. Raises Unauthorized for one that is unknown or has expired.

        Looks at every key, whichever it is, and compares in constant time: how long it takes tells nothing of them.
        """
        digest = digest_of(presented)
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise Unauthorized("the API key is none of this service's: ask for one")
        if found.expires is not None and found.has_expired(datetime.now(UTC)):
            self._note_expired(found)
            raise Unauthorized(f"the API key {found.name} expired at {utc(found.expires)}: ask for a new one")
        return found

    async def run(self) -> None:
        """Read the file again every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.poll()
            except Exception:
                logger.exception("reading the API keys failed; trying again in %s s", POLL_S)

    async def poll(self) -> None:
        """Adopt the file's keys if they have changed. A file that cannot be used changes nothing."""
        try:
            content = await self._read_again()
            if content != self._content:
                self._adopt(content)
                self._content = content
                self._metrics.api_key_reloads.labels("adopted").inc()
            self._refused = None
        except ApiKeysError as error:
            self._refuse(str(error))
        self._show_expiry()

    async def _read_again(self) -> bytes:
        """On a thread. One that hangs is waited for again by the next poll, which starts no other."""
        if self._reading is None:
            self._reading = asyncio.create_task(in_daemon_thread(self._read), name="read-api-keys")
        done, _ = await asyncio.wait([self._reading], timeout=READ_S)
        if not done:
            raise ApiKeysError(f"{FILE}: reading {self._file} has not ended after {READ_S:g} s: is its disk there?")
        reading, self._reading = self._reading, None
        return reading.result()

    def _read(self) -> bytes:
        if self._file is None:
            return b""
        try:
            if not stat.S_ISREG(self._file.stat().st_mode):  # a pipe hangs, and can be read only once
                raise ApiKeysError(f"{FILE}: {self._file} is no regular file: put the lines of the keys into one")
            with self._file.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ApiKeysError(f"{FILE}: cannot read {self._file} ({error.strerror})") from error
        if len(content) > MAX_FILE_BYTES:
            raise ApiKeysError(f"{FILE}: {self._file} has more than {MAX_FILE_BYTES} bytes: is it the file of keys?")
        return content

    def _adopt(self, content: bytes) -> None:
        try:
            keys = [*parse_keys(content.decode("utf-8-sig"), FILE), *self._fixed]
        except UnicodeDecodeError:
            raise ApiKeysError(f"{FILE}: {self._file} is not UTF-8 text: is it the file of keys?") from None
        check_together(keys, self._source)
        self._keys = keys
        self._noted_expired = set[str]()
        logger.info("API keys: %s", shown(keys))
        self._show_expiry()

    def _refuse(self, message: str) -> None:
        """Count and log what is new, not whenever it is met again."""
        if message != self._refused:
            logger.error("the API keys stay as they were: %s", message)
            self._metrics.api_key_reloads.labels("refused").inc()
        self._refused = message

    def _note_expired(self, key: ApiKey) -> None:
        """Once per key: its holder may ask a thousand times a second."""
        if key.name not in self._noted_expired:
            self._noted_expired.add(key.name)
            logger.warning("the API key %s has expired, and somebody still asks with it", key.name)

    def _show_expiry(self) -> None:
        now = datetime.now(UTC)
        left_s = [(key.expires - now).total_seconds() for key in self._keys if key.expires is not None]
        self._metrics.api_key_expiry_seconds.set(min(left_s, default=math.inf))
