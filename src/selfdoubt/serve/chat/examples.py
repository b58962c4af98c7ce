"""Example questions to begin with."""

from __future__ import annotations

from html import escape
from typing import NamedTuple


class ExampleQuestion(NamedTuple):
    """A question, the kind that it is an example of, and why."""

    kind: str
    text: str
    why: str


#: For the pocket model, which knows some geography and nothing else.
POCKET_EXAMPLES = (
    ExampleQuestion("known", "What is the capital of France?", "read hundreds of times"),
    ExampleQuestion("rare", "In which country is Tartu?", "read now and then; it is in Estonia"),
    ExampleQuestion("unseen", "In which country is Issaquah?", "real, and never read; it is in the United States"),
    ExampleQuestion("ambiguous", "Where is Valencia?", "Spain has one, and so has Venezuela"),
    ExampleQuestion("invented", "In which country is Zorbelheim?", "no such place exists"),
)
#: For any other model.
GENERAL_EXAMPLES = (
    ExampleQuestion("well known", "What is the capital of France?", "most models are sure"),
    ExampleQuestion("lesser known", "Who composed the opera The Wreckers?", "it was Ethel Smyth"),
    ExampleQuestion("a false premise", "When did Marie Curie win her third Nobel Prize?", "she won two"),
    ExampleQuestion("invented", "In which country is the town of Zorbelheim?", "no such place exists"),
)


def render_examples(examples: tuple[ExampleQuestion, ...]) -> str:
    """Return buttons that ask the examples."""
    return "".join(
        f'<button type="button" class="example" data-ask="{escape(e.text)}"><b>{escape(e.kind)}</b>'
        f"<span>{escape(e.text)}</span><small>{escape(e.why)}</small></button>"
        for e in examples
    )
