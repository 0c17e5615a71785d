"""Whether a generation holds what its manifest says, by the records of some users who are resident now.

A manifest alone says little: its records may have been evicted, or be of another build. What is asked is only what a
good generation cannot fail: it may well lack some of these users, or have a damaged record.
"""

import logging
from collections.abc import Mapping, Sequence

from model.cache_format import Manifest, Reason, RecordError, decode
from model.identifiers import Id
from service.errors import PublicationError
from service.store.reads import Store
from service.tasks import in_daemon_thread

logger = logging.getLogger(__name__)
SAMPLE_USERS = 64
USERS_PER_READ = 8  # a large read could outlast the store's timeout, and delays those of requests
ENOUGH_USERS = 16  # to take it for a fault when none of them has a record


async def check_records(store: Store, manifest: Manifest, user_ids: Sequence[Id]) -> None:
    """Raises PublicationError where there are records and none is good, or none for so many users; or StoreError."""
    if not manifest.users or not user_ids:
        return
    found: dict[Id, bytes] = {}
    for first in range(0, len(user_ids), USERS_PER_READ):
        some = user_ids[first : first + USERS_PER_READ]
        read = await store.read_records(manifest.model_id, manifest.generation, some)
        found |= {user_id: data for user_id, data in read.items() if data is not None}
    faults = await in_daemon_thread(_faults, manifest, found)
    generation, asked = f"generation {manifest.generation} of model {manifest.model_id}", len(user_ids)
    if not found and asked >= ENOUGH_USERS:
        raise PublicationError(
            f"{generation} has no record of any of {asked} users who have one now, and its manifest counts "
            f"{manifest.users} users: build the cache again, or restart the service if its users really are others"
        )
    if found and len(faults) == len(found):
        reasons = ", ".join(sorted(set(faults)))
        raise PublicationError(f"{generation} has no good record among {len(found)} ({reasons}): build the cache again")
    logger.info(
        "%s: of %s users who are resident %s have a record, of which %s are damaged",
        *(generation, asked, len(found), len(faults)),
    )


def _faults(manifest: Manifest, found: Mapping[Id, bytes]) -> list[Reason]:
    """Why records cannot be scored, one reason for each that cannot."""
    faults = []
    for user_id, data in found.items():
        try:
            decode(
                data,
                model_id=manifest.model_id,
                generation=manifest.generation,
                user_id=user_id,
                shape=manifest.shape,
            )
        except RecordError as error:
            faults.append(error.reason)
    return faults
