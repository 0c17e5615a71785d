"""Is a generation that was written earlier still whole? Asked before it becomes current, by hand."""

from cache_builder.errors import VerifyError
from cache_builder.publish import read_manifest
from cache_builder.store import Store
from model.cache_format import Manifest, Published, generation_prefix
from model.progress import Reporter

COUNT_KEYS = 1_000


def check_whole(store: Store, prefix: str, target: Published, count: bool, reporter: Reporter) -> Manifest:
    """Its manifest. count: look whether all its records are there. Raises VerifyError if it is not whole."""
    manifest = read_manifest(store, prefix, target)
    if manifest is None:
        raise VerifyError(f"generation {target.generation} has no manifest in {store.name}: build the cache again")
    if count:
        reporter.start("count", manifest.users, "users")
        found = 0
        records = generation_prefix(prefix, target.model_id, target.generation) + "u:"
        for keys in store.scan(records, COUNT_KEYS):
            found += len(keys)
            reporter.advance(len(keys))
        if found < manifest.users:
            raise VerifyError(
                f"generation {target.generation} has {found} records of {manifest.users}: see whether {store.name} "
                "evicts keys; --no-count takes it all the same, and users without a record are scored as unknown"
            )
    return manifest
