"""The page of a report: one HTML file without other files.

``page`` builds it from ``tables`` and ``plots``; ``page.css`` and ``page.js`` are put into it.
"""

from __future__ import annotations

from selfdoubt.report.html.page import render_page

__all__ = ["render_page"]
