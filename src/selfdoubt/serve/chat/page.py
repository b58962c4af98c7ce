"""The Gradio page. This file imports Gradio at its top: import it where it is used.

Gradio carries events and settings. The conversation itself is one ``gr.HTML`` whose value is the turn that changes, as
``turn_html`` draws it, and which ``chat.js`` puts in its place: a ``gr.Chatbot`` would read answers as Markdown, take
away what a keyboard needs, and draw everything again for each token.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from selfdoubt.errors import SelfdoubtError
from selfdoubt.lm.front import LMFront
from selfdoubt.lm.load import POCKET, resolve_model
from selfdoubt.lm.risk_levels import COLOURS
from selfdoubt.serve.chat import examples, phrases, tokens_html
from selfdoubt.serve.chat.answers import answer
from selfdoubt.serve.chat.conversation import Conversation, Settings, Turn, Way, recommended
from selfdoubt.serve.chat.turn_html import Shown, View
from selfdoubt.serve.engine.client import Desk
from selfdoubt.serve.http.encoders import Encoders
from selfdoubt.serve.openai.errors import shortened
from selfdoubt.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

#: Most conversations that are kept; the one that was idle longest goes first.
CONVERSATIONS = 1000
HEADER = """<header class="bar">
<h1><span class="mark" aria-hidden="true"><i class="t0"></i><i class="t1"></i><i class="t2"></i><i class="t3"></i><i
 class="t4"></i></span>selfdoubt</h1><span class="model" title="The model that answers">{model}</span>
<button type="button" data-do="theme" aria-label="Dark or light">◐</button>
<button type="button" data-do="drawer" aria-expanded="false" aria-controls="sd-side">Settings</button></header>"""


def mount_page(app: FastAPI, engine: Desk, *, title: str | None, model: str | None, max_tokens: int, auth: Any) -> None:
    """See ``selfdoubt.serve.chat.mount``."""
    page = Page(engine, model or name_of(engine.front), max_tokens)
    gr.mount_gradio_app(
        app,
        page.build(title or f"selfdoubt: {page.model}"),
        path="/",
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=f"<style>{_style(page.recommended)}</style>",  # Gradio would rewrite the selectors of css=
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,  # nothing is uploaded here
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        auth=auth,
    )


def name_of(lm: LMFront) -> str:
    """What to call a model: its name, or the last part of its folder."""
    if is_pocket(lm):
        return POCKET
    name = lm.name or "a model"
    return Path(name).name if Path(name).is_dir() else name


def is_pocket(lm: LMFront) -> bool:
    """Whether this is the small model inside this package."""
    return lm.name == resolve_model(POCKET)


class Page:
    """The page and the conversations that are held on it."""

    def __init__(self, engine: Desk, model: str, max_tokens: int) -> None:
        self.engine = engine
        self.encoders = Encoders(engine.limits.queue)
        self.model = model
        self.max_tokens = max_tokens
        self.calibration = engine.front.calibration
        self.recommended = recommended(self.calibration)
        self.pocket = is_pocket(engine.front)
        self.conversations: OrderedDict[str, Conversation] = OrderedDict()

    def build(self, title: str) -> Any:
        """Lay it out and connect it."""
        legend = tokens_html.legend(phrases.bounds(self.engine.front.token_risk))
        with gr.Blocks(title=title, analytics_enabled=False) as page:
            gr.HTML(
                HEADER.format(model=escape(self.model)), elem_id="sd-head", js_on_load=None, apply_default_css=False
            )
            with gr.Row(elem_id="sd-main"):
                with gr.Column(elem_id="sd-talk", scale=3, min_width=0):
                    talk = gr.HTML(
                        self._show(Conversation()),
                        elem_id="sd-turns",
                        html_template=self._welcome(),
                        js_on_load=_file("chat.js"),
                        apply_default_css=False,
                    )
                    with gr.Column(elem_id="sd-foot", min_width=0):
                        gr.HTML(legend, elem_id="sd-legend", js_on_load=None, apply_default_css=False)
                        with gr.Row(elem_id="sd-composer"):
                            typed = gr.Textbox(
                                placeholder="Ask something", label="Your question", show_label=False, container=False,
                                lines=1, max_lines=6, elem_id="sd-typed", scale=1, min_width=0,
                            )  # fmt: skip
                            send = gr.Button("Ask", variant="primary", elem_id="sd-send", scale=0, min_width=0)
                            stop = gr.Button("Stop", visible=False, elem_id="sd-stop", scale=0, min_width=0)
                with gr.Column(elem_id="sd-side", scale=1, min_width=0):
                    settings = self._settings()
                    with gr.Row(elem_id="sd-file"):
                        save = gr.Button("Download JSON", size="sm", min_width=0)
                        fresh = gr.Button("New chat", size="sm", min_width=0, elem_id="sd-new")
            outputs = [talk, typed, send, stop]
            common: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            gr.on([typed.submit, send.click], self.ask, [typed, *settings], outputs, concurrency_limit=None, **common)
            talk.act(self.act, [typed, *settings], outputs, concurrency_limit=None, **common)
            stop.click(self.stop, None, None, queue=False, **common)
            fresh.click(self.clear, None, outputs, queue=False, **common)
            save.click(self.save, None, talk, queue=False, **common)
            page.unload(self.leave)
        return page

    def _welcome(self) -> str:
        intro = "Every word comes in the colour of its doubt. Point at one, tap it, or move there with the arrow keys."
        which = examples.POCKET if self.pocket else examples.OTHERS
        # Gradio reads the whole as a template of JavaScript, in which a backtick would be the end.
        said = re.sub("`([^`]*)`", r"<code>\1</code>", escape(self.engine.front.note or ""))
        note = f'<p class="note">Note: {said}.</p>' if said else ""
        return (
            '<div class="welcome"><p class="lead">Ask, and see how sure the model is.</p>'
            f'<p>{intro}</p>{note}<div class="examples">{examples.cards(which)}</div></div>'
            '<div class="turns"></div><p class="hint"></p><p class="notice" role="alert"></p>'
            '<p class="sr" aria-live="polite"></p>'
        )

    def _settings(self) -> list[Any]:
        knows = self.calibration is not None or bool(self.engine.front.reference)
        note = "0 always answers. "
        if not knows:
            note = "This model has neither a calibration nor reference answers: selfdoubt calibrate gives it both."
        elif self.recommended is not None:
            note += f"Calibrated threshold: {phrases.percent(self.recommended)}."
        else:
            note += "Without a calibration this counts reference answers that are riskier."
        sure = gr.Slider(
            0, 100, 0, step=1, label="Answer only when at least … % sure", info=note, interactive=knows,
            elem_id="sd-sure", buttons=[], elem_classes=[] if self.recommended is None else ["marked"],
        )  # fmt: skip
        if self.recommended is not None:
            use = gr.Button(
                f"Use the recommended {phrases.percent(self.recommended)}", size="sm", elem_id="sd-recommended"
            )
            use.click(None, None, sure, js=f"() => {self.recommended * 100:g}", api_visibility="private")
        top = min(self.engine.limits.answer_tokens, 1024)
        with gr.Accordion("More settings", open=False, elem_id="sd-more"):
            more = [
                gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the most probable word", buttons=[]),
                gr.Slider(1, top, min(self.max_tokens, top), step=1, label="Most tokens of an answer", buttons=[]),
                gr.Number(0, label="Seed", precision=0, minimum=0, info="Same seed, same answer"),
                gr.Slider(2, min(10, self.engine.limits.choices), 5, step=1, label="Candidates", buttons=[]),
                gr.Slider(2, 20, 8, step=1, label="Most tries until sure", buttons=[]),
                gr.Checkbox(
                    not self.pocket,
                    label="Remember earlier turns",
                    info="The pocket model has only learnt single questions" if self.pocket else None,
                ),
            ]
        return [sure, *more]

    async def ask(self, request: gr.Request, typed: str, *values: Any) -> AsyncGenerator[Any]:
        """A question was typed."""
        talk = self._of(request)
        question, editing = _asked(typed), talk.editing
        talk.editing = None
        if talk.busy or not question:
            yield self._outputs(talk)
            return
        turn = talk.begin(question, _settings(values), "once", self.recommended, instead=editing)
        async for update in self._run(talk, turn, request, box="", back=question):
            yield update

    async def act(self, event: gr.EventData, request: gr.Request, typed: str, *values: Any) -> AsyncGenerator[Any]:
        """A button within the conversation was pressed."""
        talk, what = self._of(request), event._data or {}
        old = talk.turn(int(what.get("turn", 0)))
        do = what.get("do")
        if do == "edit" and not talk.busy:
            talk.editing = None if old is None else old.id
            yield self._outputs(talk)
        elif do == "reveal" and old is not None and not talk.busy:
            old.revealed = True
            yield self._outputs(talk, [View(old, self.calibration).draw()])
        elif do == "ask" and not talk.busy:
            turn = talk.begin(_asked(str(what.get("text", ""))), _settings(values), "once", self.recommended)
            async for update in self._run(talk, turn, request, back=typed or turn.question):
                yield update
        elif do in ("retry", "until", "candidates") and old is not None and not talk.busy:
            way: Way = "once" if do == "retry" else do
            turn = talk.again(old, _settings(values), way, self.recommended)
            async for update in self._run(talk, turn, request):
                yield update

    async def _run(
        self, talk: Conversation, turn: Turn, request: gr.Request, box: str | None = None, back: str | None = None
    ) -> AsyncGenerator[Any]:
        """Show the turn while it grows; ``box`` goes into the field to type in, ``back`` when it came to nothing."""
        view = View(turn, self.calibration)
        yield self._outputs(talk, [view.draw()], box)
        try:
            async with aclosing(
                answer(self.engine, talk, turn, client=str(request.session_hash), encoders=self.encoders)
            ) as news:
                async for _ in news:
                    yield self._outputs(talk, [view.draw()])
        except Exception as error:
            expected = isinstance(error, SelfdoubtError)
            if not expected:
                logging.getLogger(__name__).exception("an answer failed")
            old = talk.drop(turn)
            talk.notice = shortened(str(error)) if expected else "The model failed; the server's log says how."
            yield self._outputs(talk, [View(t, self.calibration).draw() for t in old], back)

    def _outputs(self, talk: Conversation, turns: Sequence[Shown] = (), box: str | None = None) -> tuple[Any, ...]:
        return (
            self._show(talk, turns),
            gr.skip() if box is None else box,
            gr.Button(visible=not talk.busy),
            gr.Button(visible=talk.busy),
        )

    def _show(self, talk: Conversation, turns: Sequence[Shown] = ()) -> dict[str, Any]:
        """What the page gets: the turns that changed, and which there are."""
        return {
            "order": [t.id for t in talk.turns],
            "turns": [*turns],
            "notice": talk.notice,
            "busy": talk.busy,
            "editing": talk.editing,
        }

    async def stop(self, request: gr.Request) -> None:
        """The stop button."""
        self._of(request).stop()

    async def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """A new chat."""
        talk = self._of(request)
        talk.clear()
        return self._outputs(talk)

    async def save(self, request: gr.Request) -> dict[str, Any]:
        """The conversation as a file: it goes to the page as text and is never written on this machine."""
        talk = self._of(request)
        about = {"program": "selfdoubt", "version": __version__, "model": self.model, "saved": time.time()}
        text = json.dumps(talk.to_json(about), ensure_ascii=False, indent=1, allow_nan=False)
        name = time.strftime("selfdoubt-%Y-%m-%d-%H%M%S.json")
        return {**self._show(talk), "file": {"name": name, "text": text}}

    async def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        if request.session_hash in self.conversations:
            self._of(request).stop()

    def _of(self, request: gr.Request) -> Conversation:
        """The conversation of one tab."""
        key = str(request.session_hash)
        found = self.conversations.pop(key, None) or Conversation()
        self.conversations[key] = found
        while len(self.conversations) > CONVERSATIONS:
            self.conversations.popitem(last=False)[1].stop()
        return found


def _asked(typed: object) -> str:
    """Text as it was typed, fit to be sent: a browser may hand over half a character. Code keeps its indentation."""
    return str(typed or "").encode("utf-8", "replace").decode().rstrip().lstrip("\r\n")


def _settings(values: tuple[Any, ...]) -> Settings:
    sure, temperature, max_tokens, seed, candidates, tries, memory = values
    return Settings(
        temperature=float(temperature or 0),
        max_tokens=int(max_tokens),
        seed=int(seed or 0),
        at_least=float(sure or 0) / 100,
        candidates=int(candidates),
        tries=int(tries),
        memory=bool(memory),
    )


def _style(recommended: float | None) -> str:
    own = {f"t{i}": colour for i, colour in enumerate(COLOURS)} | {"recommended": f"{recommended or 0:g}"}
    return _file("chat.css") + ":root{" + "".join(f"--{name}:{value};" for name, value in own.items()) + "}"


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
