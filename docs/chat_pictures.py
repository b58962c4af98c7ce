"""Takes the pictures of ``docs/chat.md``: ``python docs/chat_pictures.py`` writes ``chat.png`` and its two siblings.

Needs the extras ``serve`` and ``dev`` and a Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent


def main() -> None:
    """Start the chat, ask, and look."""
    command = [sys.executable, "-m", "selfdoubt", "chat", "--port", "0", "--no-open", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as play:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[2]
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            take(browser, url, "chat.png", "light", 1180, 930, plain)
            take(browser, url, "chat-dark.png", "dark", 1180, 930, withheld)
            take(browser, url, "chat-phone.png", "light", 390, 844, phone)
            browser.close()
        finally:
            server.terminate()


def take(browser: Any, url: str, name: str, scheme: str, width: int, height: int, play: Any) -> None:
    """One picture."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    page.locator(".example").first.wait_for()
    play(page)
    page.wait_for_timeout(400)
    page.screenshot(path=HERE / name)
    context.close()


def ask(page: Any, question: str, number: int) -> Any:
    """Type a question and wait for its answer."""
    page.get_by_label("Your question", exact=True).fill(question)
    page.keyboard.press("Enter")
    page.locator(f".turn[data-turn='{number}'][data-state=done]").wait_for()
    page.locator("#sd-send").wait_for()
    return page.locator(f".turn[data-turn='{number}']")


def plain(page: Any) -> None:
    """Something known, something invented, and the numbers of a doubtful word."""
    ask(page, "What is the capital of France?", 1)
    turn = ask(page, "What is the capital of Narnia?", 2)
    turn.locator(".say .t").nth(6).hover()


def withheld(page: Any) -> None:
    """Candidates for an ambiguous place, then an answer that is not sure enough."""
    ask(page, "Where is Valencia?", 1)
    page.get_by_role("button", name="Show candidates").click()
    page.locator(".turn[data-turn='2'][data-state=done]").wait_for()
    page.locator("#sd-send").wait_for()
    page.get_by_role("button", name="Use the recommended").click()
    ask(page, "In which country is Zorbelheim?", 3)
    page.mouse.move(0, 0)


def phone(page: Any) -> None:
    """An ambiguous place."""
    turn = ask(page, "Where is Valencia?", 1)
    turn.locator(".say .t", has_text="Venezuela").hover()


if __name__ == "__main__":
    main()
