"""SIGINT and SIGTERM: a training stops at the next step with a checkpoint; anything else stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ended the work. A KeyboardInterrupt, so that code which lets Ctrl-C through lets this through."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """What the handlers leave for the training loop, which looks at `signum` after each step."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._loops = 0

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Inside, the first signal is only noted, and the loop raises `Stopped` once its state is saved."""
        self._loops += 1
        try:
            yield
        finally:
            self._loops -= 1
        # It came after the last look; what follows may take long and looks at nothing.
        if (signum := self.signum) is not None:
            raise Stopped(signum)

    def handle(self, signum: int, _: FrameType | None) -> None:
        # The second signal does not wait: the step, or the disk, may be what hangs.
        if self._loops == 0 or self.signum is not None:
            raise Stopped(signum)
        self.signum = signum


@contextmanager
def handled() -> Iterator[Stop]:
    """Install the handlers for the duration of the block (in the main thread; elsewhere Python allows none)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {signum: signal.signal(signum, stop.handle) for signum in _SIGNALS}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
