"""Ctrl-C while a model trains: noted, so that the step under way ends and what has been learnt is saved.

In: a block of work that says from when on it cannot be left at any point. Out: `KeyboardInterrupt` at a point where it
can.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interruption:
    """Ctrl-C, held back from `hold` to the end of a block, and raised there.

        with Interruption() as interruption:
            load()                     # Ctrl-C ends this at once
            interruption.hold()
            train(interruption)        # and this where it looks at `asked`

    A second Ctrl-C is not held back. Outside of the main thread, which alone gets signals, and where somebody else
    handles this one, nothing is.

    Attributes:
        asked: whether Ctrl-C was pressed and held back.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruption:
        return self

    def hold(self) -> None:
        """From here on Ctrl-C is noted."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Only that: what else is done in here may meet itself half done, such as a line that is being written."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ctrl-C as before; an error after it is taken to be its consequence, as it ends worker processes too.

        Raises:
            KeyboardInterrupt: Ctrl-C was held back.
        """
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.asked and error is None:
            raise KeyboardInterrupt
        if self.asked and isinstance(error, Exception):
            raise KeyboardInterrupt(f"what was finished is kept; what was under way is not saved: {error}") from error
