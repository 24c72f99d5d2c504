"""Ctrl-C or SIGTERM while a model trains: noted, so that the step under way ends and what has been learnt is saved.

In: a block of work that says from when on it cannot be left at any point. Out: `KeyboardInterrupt` at a point where it
can.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_USUAL: dict[signal.Signals, tuple[Callable[[int, FrameType | None], Any] | signal.Handlers, ...]] = {
    signal.SIGINT: (signal.default_int_handler,),
    signal.SIGTERM: (signal.SIG_DFL, signal.default_int_handler),
}
"""What Python starts with, and for SIGTERM what our command line puts in its place."""


class Interruption:
    """Ctrl-C, or the SIGTERM that schedulers send, held back from `hold` to the end of a block, and raised there.

        with Interruption() as interruption:
            load()                     # Ctrl-C ends this at once
            interruption.hold()
            train(interruption)        # and this where it looks at `asked`

    A second one is not held back. Outside of the main thread, which alone gets signals, nothing is, and neither is a
    signal that somebody else handles.

    Attributes:
        asked: whether one has come and was held back.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        return self

    def hold(self) -> None:
        """From here on they are noted."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, usual in _USUAL.items():
            if (before := signal.getsignal(number)) in usual:
                self._before[number] = before
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Only that: what else is done in here may meet itself half done, such as a line that is being written."""
        self.asked = True
        self._release()

    def _release(self) -> None:
        """Both signals do what they did before."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Signals as before; an error after one is taken to be its consequence, as it ends worker processes too.

        Raises:
            KeyboardInterrupt: a signal was held back.
        """
        self._release()
        if self.asked and error is None:
            raise KeyboardInterrupt
        if self.asked and isinstance(error, Exception):
            raise KeyboardInterrupt(f"what was finished is kept; what was under way is not saved: {error}") from error
