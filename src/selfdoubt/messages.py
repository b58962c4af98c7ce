"""Messages for the user, through the logger ``selfdoubt``.

A program that has set up logging gets them its own way; without any set-up they are printed.
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
    """Log a message that the user has asked for, at level INFO.

    It is printed where no handler takes it. A level that the program gave to the logger ``selfdoubt`` is respected;
    without one the logger's level becomes INFO.
    """
    if log.level == logging.NOTSET and not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(_Printer())
    log.info(text)
