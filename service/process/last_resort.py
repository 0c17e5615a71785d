"""The end of a process that has begun to stop and does not: a thread may be stuck where nothing reaches it.

A forward on a device that hangs, a file on a network that is gone: to close its executor is then to wait for ever.
"""

import faulthandler

SPARE_S = 10.0  # beyond what a stop may take


def end_within(stop_s: float) -> None:
    """If this process still runs `stop_s` + `SPARE_S` from now, end it with status 1.

    What each of its threads does is written to stderr before. The last call counts. A signal's handler may call it.
    """
    # Not a threading.Timer: to start a thread takes a lock that the thread which the signal interrupts may hold, and to
    # end takes the interpreter's, which may be held by what is stuck.
    faulthandler.dump_traceback_later(stop_s + SPARE_S, exit=True)
