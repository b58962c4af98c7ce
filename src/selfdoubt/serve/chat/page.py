"""Builds the chat page with Gradio, which this file imports at its top: import it where it is used.

Gradio handles events and settings. The conversation itself is one ``gr.HTML`` whose value is the turn that changes, as
``turn_html`` renders it, and which ``chat.js`` puts in its place: a ``gr.Chatbot`` would render answers as Markdown,
lose the keyboard's focus, and render everything again for each token.
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
from selfdoubt.serve.chat.answers import run_turn
from selfdoubt.serve.chat.conversation import AnswerMode, ChatSettings, Conversation, Turn, recommend_confidence
from selfdoubt.serve.chat.turn_html import RenderedTurn, TurnView
from selfdoubt.serve.engine.client import EngineClient
from selfdoubt.serve.http.encoders import EncoderThreads
from selfdoubt.serve.openai.errors import shorten
from selfdoubt.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

#: Largest number of conversations in memory; the one that was idle longest is removed first.
MAX_CONVERSATIONS = 1000
HEADER = """<header class="bar">
<h1><span class="mark" aria-hidden="true"><i class="t0"></i><i class="t1"></i><i class="t2"></i><i class="t3"></i><i
 class="t4"></i></span>selfdoubt</h1><span class="model" title="The model that answers">{model}</span>
<button type="button" data-do="theme" aria-label="Dark or light">◐</button>
<button type="button" data-do="drawer" aria-expanded="false" aria-controls="sd-side">Settings</button></header>"""


def mount_page(
    app: FastAPI, engine: EngineClient, *, title: str | None, model: str | None, max_tokens: int, auth: Any
) -> None:
    """See ``selfdoubt.serve.chat.mount``."""
    page = ChatPage(engine, model or get_display_name(engine.front), max_tokens)
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


def get_display_name(front: LMFront) -> str:
    """Return a model's name, or the last part of its folder or file."""
    if is_pocket(front):
        return POCKET
    name = front.name or "a model"
    return Path(name).name if Path(name).exists() else name


def is_pocket(front: LMFront) -> bool:
    """Return whether this is the small model inside this package."""
    return front.name == resolve_model(POCKET)


class ChatPage:
    """The page and the conversations that are held on it."""

    def __init__(self, engine: EngineClient, model: str, max_tokens: int) -> None:
        self.engine = engine
        self.encoders = EncoderThreads(engine.limits.queue)
        self.model = model
        self.max_tokens = max_tokens
        self.calibration = engine.front.calibration
        self.recommended = recommend_confidence(self.calibration)
        self.pocket = is_pocket(engine.front)
        self.conversations: OrderedDict[str, Conversation] = OrderedDict()

    def build(self, title: str) -> Any:
        """Lay the page out and connect its events."""
        legend = tokens_html.render_legend(phrases.describe_levels(self.engine.front.token_risk))
        with gr.Blocks(title=title, analytics_enabled=False) as page:
            gr.HTML(
                HEADER.format(model=escape(self.model)), elem_id="sd-head", js_on_load=None, apply_default_css=False
            )
            with gr.Row(elem_id="sd-main"):
                with gr.Column(elem_id="sd-talk", scale=3, min_width=0):
                    turns = gr.HTML(
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
            outputs = [turns, typed, send, stop]
            common: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            gr.on([typed.submit, send.click], self.ask, [typed, *settings], outputs, concurrency_limit=None, **common)
            turns.act(self.act, [typed, *settings], outputs, concurrency_limit=None, **common)
            stop.click(self.stop, None, None, queue=False, **common)
            fresh.click(self.clear, None, outputs, queue=False, **common)
            save.click(self.save, None, turns, queue=False, **common)
            page.unload(self.leave)
        return page

    def _welcome(self) -> str:
        intro = "Every word comes in the colour of its doubt. Point at one, tap it, or move there with the arrow keys."
        which = examples.POCKET_EXAMPLES if self.pocket else examples.GENERAL_EXAMPLES
        # Gradio reads the whole as a template of JavaScript, in which a backtick would be the end.
        note = re.sub("`([^`]*)`", r"<code>\1</code>", escape(self.engine.front.note or ""))
        note_html = f'<p class="note">Note: {note}.</p>' if note else ""
        return (
            '<div class="welcome"><p class="lead">Ask, and see how sure the model is.</p>'
            f'<p>{intro}</p>{note_html}<div class="examples">{examples.render_examples(which)}</div></div>'
            '<div class="turns"></div><p class="hint"></p><p class="notice" role="alert"></p>'
            '<p class="sr" aria-live="polite"></p>'
        )

    def _settings(self) -> list[Any]:
        knows = self.calibration is not None or bool(self.engine.front.reference)
        note = "0 always answers. "
        if not knows:
            note = "This model has neither reference answers nor a calibration: see selfdoubt prepare and calibrate."
        elif self.recommended is not None:
            note += f"Calibrated threshold: {phrases.format_share(self.recommended)}."
        else:
            note += "Not calibrated: this counts the reference answers that are riskier."
        sure = gr.Slider(
            0, 100, 0, step=1, label="Answer only when at least … % sure", info=note, interactive=knows,
            elem_id="sd-sure", buttons=[], elem_classes=[] if self.recommended is None else ["marked"],
        )  # fmt: skip
        if self.recommended is not None:
            use = gr.Button(
                f"Use the recommended {phrases.format_share(self.recommended)}", size="sm", elem_id="sd-recommended"
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
        """Answer a question that was typed."""
        conversation = self._find_conversation(request)
        question, editing = _clean_text(typed), conversation.editing
        conversation.editing = None
        if conversation.busy or not question:
            yield self._outputs(conversation)
            return
        turn = conversation.start_turn(question, _read_settings(values), "once", self.recommended, instead=editing)
        async for update in self._run(conversation, turn, request, box="", back=question):
            yield update

    async def act(self, event: gr.EventData, request: gr.Request, typed: str, *values: Any) -> AsyncGenerator[Any]:
        """React to a button within the conversation."""
        conversation, do = self._find_conversation(request), getattr(event, "do", None)
        old = conversation.find_turn(int(getattr(event, "turn", 0)))
        if do == "edit" and not conversation.busy:
            conversation.editing = None if old is None else old.id
            yield self._outputs(conversation)
        elif do == "reveal" and old is not None and not conversation.busy:
            old.revealed = True
            yield self._outputs(conversation, [TurnView(old, self.calibration).draw()])
        elif do == "ask" and not conversation.busy:
            question = _clean_text(getattr(event, "text", ""))
            turn = conversation.start_turn(question, _read_settings(values), "once", self.recommended)
            async for update in self._run(conversation, turn, request, back=typed or turn.question):
                yield update
        elif do in ("retry", "until", "candidates") and old is not None and not conversation.busy:
            mode: AnswerMode = "once" if do == "retry" else do
            turn = conversation.retry_turn(old, _read_settings(values), mode, self.recommended)
            async for update in self._run(conversation, turn, request):
                yield update

    async def _run(
        self,
        conversation: Conversation,
        turn: Turn,
        request: gr.Request,
        box: str | None = None,
        back: str | None = None,
    ) -> AsyncGenerator[Any]:
        """Show the turn while it grows; ``box`` goes into the field to type in, ``back`` if the turn fails."""
        view = TurnView(turn, self.calibration)
        yield self._outputs(conversation, [view.draw()], box)
        try:
            async with aclosing(
                run_turn(self.engine, conversation, turn, client=str(request.session_hash), encoders=self.encoders)
            ) as news:
                async for _ in news:
                    yield self._outputs(conversation, [view.draw()])
        except Exception as error:
            expected = isinstance(error, SelfdoubtError)
            if not expected:
                logging.getLogger(__name__).exception("an answer failed")
            old = conversation.drop_turn(turn)
            conversation.notice = shorten(str(error)) if expected else "The model failed; the server's log says how."
            yield self._outputs(conversation, [TurnView(t, self.calibration).draw() for t in old], back)

    def _outputs(
        self, conversation: Conversation, turns: Sequence[RenderedTurn] = (), box: str | None = None
    ) -> tuple[Any, ...]:
        return (
            self._show(conversation, turns),
            gr.skip() if box is None else box,
            gr.Button(visible=not conversation.busy),
            gr.Button(visible=conversation.busy),
        )

    def _show(self, conversation: Conversation, turns: Sequence[RenderedTurn] = ()) -> dict[str, Any]:
        """Return the turns that changed, and the order of all, for the page."""
        return {
            "order": [t.id for t in conversation.turns],
            "turns": [turn.to_json() for turn in turns],
            "notice": conversation.notice,
            "busy": conversation.busy,
            "editing": conversation.editing,
        }

    async def stop(self, request: gr.Request) -> None:
        """Stop the answer that runs."""
        self._find_conversation(request).stop()

    async def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Begin a new chat."""
        conversation = self._find_conversation(request)
        conversation.clear()
        return self._outputs(conversation)

    async def save(self, request: gr.Request) -> dict[str, Any]:
        """Return the conversation as a file: it goes to the page as text and is never written on this machine."""
        conversation = self._find_conversation(request)
        head = {"program": "selfdoubt", "version": __version__, "model": self.model, "saved": time.time()}
        text = json.dumps(conversation.to_json(head), ensure_ascii=False, indent=1, allow_nan=False)
        name = time.strftime("selfdoubt-%Y-%m-%d-%H%M%S.json")
        return {**self._show(conversation), "file": {"name": name, "text": text}}

    async def leave(self, request: gr.Request) -> None:
        """Stop the answers of a tab that was closed."""
        if request.session_hash in self.conversations:
            self._find_conversation(request).stop()

    def _find_conversation(self, request: gr.Request) -> Conversation:
        """Return the conversation of one tab."""
        key = str(request.session_hash)
        conversation = self.conversations.pop(key, None) or Conversation()
        self.conversations[key] = conversation
        while len(self.conversations) > MAX_CONVERSATIONS:
            self.conversations.popitem(last=False)[1].stop()
        return conversation


def _clean_text(typed: object) -> str:
    """Return text as it was typed, fit to be sent: a browser may send half a character. Code keeps its indentation."""
    return str(typed or "").encode("utf-8", "replace").decode().rstrip().lstrip("\r\n")


def _read_settings(values: tuple[Any, ...]) -> ChatSettings:
    sure, temperature, max_tokens, seed, candidates, max_tries, memory = values
    return ChatSettings(
        temperature=float(temperature or 0),
        max_tokens=int(max_tokens),
        seed=int(seed or 0),
        at_least=float(sure or 0) / 100,
        candidates=int(candidates),
        max_tries=int(max_tries),
        memory=bool(memory),
    )


def _style(recommended: float | None) -> str:
    variables = {f"t{i}": colour for i, colour in enumerate(COLOURS)} | {"recommended": f"{recommended or 0:g}"}
    return _file("chat.css") + ":root{" + "".join(f"--{name}:{value};" for name, value in variables.items()) + "}"


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
