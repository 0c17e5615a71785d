"""What can go wrong in the builder, each with one message for the person who started it.

BuilderError
├── StoreError         the store did not do what it was asked to (translated in store.py and embedded.py)
│   └── StoreFullError   because it has no memory left
├── InputError         bundle, data and options do not fit together
├── LockHeldError      somebody else is building; nothing was written
├── LockLostError      our lock expired or was taken over
├── GenerationGoneError  what was to be gone on with is not there any more
├── WorkerError        a process that helped died
├── FlipRefusedError   what is active changed since we looked, or the lock is no longer ours
├── GateError          the new generation differs too much from the published one, or does not fit into the store
└── VerifyError        the store does not hold what it should
"""


class BuilderError(Exception):
    """A failure that is understood; its message says what was found, what was wanted and what to do."""


class StoreError(BuilderError):
    """The store did not do what it was asked to."""


class StoreFullError(StoreError):
    """The store has no memory left."""


class InputError(BuilderError):
    """Bundle, data and options do not fit together."""


class LockHeldError(BuilderError):
    """Somebody else holds the build lock."""


class LockLostError(BuilderError):
    """The build lock is no longer ours."""


class GenerationGoneError(BuilderError):
    """The generation that was begun is published, or given up."""


class WorkerError(BuilderError):
    """A worker process died."""


class FlipRefusedError(BuilderError):
    """The pointer was not changed."""


class GateError(BuilderError):
    """A check before the flip refused the new generation."""


class VerifyError(BuilderError):
    """The store does not hold what was written to it."""
