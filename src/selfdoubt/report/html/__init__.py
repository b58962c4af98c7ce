"""The page of a report: one HTML file that needs no other.

``page`` puts it together from ``tables`` and ``plots``; ``page.css`` and ``page.js`` stand inside of it.
"""

from __future__ import annotations

from selfdoubt.report.html.page import render_page

__all__ = ["render_page"]
