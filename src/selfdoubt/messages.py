"""Shows messages to the user through the logger ``selfdoubt``.

They go to the handlers that the program has set up; without any they are printed.
"""

from __future__ import annotations

import logging

log = logging.getLogger("selfdoubt")


class _Printer(logging.Handler):
    """A handler that prints, until the program sets up logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record))


def show_message(text: str) -> None:
    """Log a message that the user has asked for, e.g. with ``verbose=1``, at level INFO.

    It is printed where no handler takes it. A level that the program gave to the logger ``selfdoubt`` is respected;
    without one the logger's level becomes INFO.
    """
    if log.level == logging.NOTSET and not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(_Printer())
    log.info(text)
