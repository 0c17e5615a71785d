"""Back to the generation before, when what was published turns out to be bad.

One script compares the pointer with what was read, looks whether somebody holds the build lock, and swaps the pointer's
two generations. Nothing is deleted: the bad one stays as `previous`, to be looked at or returned to.
"""

from cache_builder.errors import FlipRefusedError, LockHeldError, StoreError, VerifyError
from cache_builder.lock import WAIT, describe
from cache_builder.publish import read_active
from cache_builder.store import Store
from cache_builder.whole import check_whole
from model.cache_format import ActivePointer, Published, active_key, lock_key
from model.progress import Reporter

_ROLL_BACK = """
local active = redis.call('GET', KEYS[2])
if active == ARGV[2] then return false end
local held = redis.call('GET', KEYS[1])
if held then return held end
if active ~= ARGV[1] then return 'moved' end
redis.call('DEL', KEYS[1]) -- nothing, but what a full store lets a script begin with
redis.call('SET', KEYS[2], ARGV[2])
return false
"""


def roll_back(store: Store, prefix: str, generation: str | None, count: bool, reporter: Reporter) -> ActivePointer:
    """Make one of the pointer's two generations current; the pointer as it is then.

    generation: None is the previous one, and then it must be older than the current: to roll back twice would publish
    the bad one again. count: look whether all records of it are there.
    Raises VerifyError where there is nothing whole to go back to, LockHeldError during a build, FlipRefusedError if the
    pointer moved meanwhile, StoreError or ManifestError. Only after a StoreError may the pointer have changed.
    """
    data = store.get(active_key(prefix))
    if data is None:
        raise VerifyError(f"nothing is published under {prefix!r} in {store.name}: there is nothing to go back from")
    pointer = ActivePointer.from_json(data)
    target = _target(pointer, generation)
    if target == pointer.current:
        reporter.note(f"generation {target.generation} is current already: nothing to do")
        return pointer
    check_whole(store, prefix, target, count, reporter)
    rolled_back = ActivePointer(target, pointer.current, pointer.epoch + 1)
    try:
        answer = store.run(_ROLL_BACK, [lock_key(prefix), active_key(prefix)], [data, rolled_back.to_json()])
    except StoreError as error:
        raise StoreError(f"{error}; whether it was rolled back, `status` says") from error
    if answer == b"moved":
        found = read_active(store, prefix)
        named = "nothing" if found is None else f"generation {found.current.generation}, epoch {found.epoch}"
        raise FlipRefusedError(f"what is published changed meanwhile, to {named}: look at it, then roll back again")
    if answer is not None:
        raise LockHeldError(f"a build is running, {describe(answer)}: stop it, or {WAIT}")
    return rolled_back


def _target(pointer: ActivePointer, generation: str | None) -> Published:
    public = [one for one in (pointer.current, pointer.previous) if one is not None]
    if generation is not None:
        for one in public:
            if one.generation == generation:
                return one
        names = " and ".join(one.generation for one in public)
        raise VerifyError(f"generation {generation!r} is neither current nor previous: there are {names}")
    if pointer.previous is None:
        raise VerifyError(f"generation {pointer.current.generation} is the first: there is nothing to go back to")
    if pointer.previous.generation > pointer.current.generation:  # names sort by time
        raise VerifyError(
            f"generation {pointer.current.generation} is older than the previous one: it was rolled back already; "
            f"give --generation {pointer.previous.generation} to publish that again"
        )
    return pointer.previous
