"""Chat templates after the well-known public ones, written anew for the control tokens of ``tests.words``.

``FAITHFUL``: the words of every message stand in the text, trimmed or not. ``LOOKING``: they look into contents, and
change, double or leave out some. ``REFUSED``: they leave nothing that could be told from the template's own words.
"""

from __future__ import annotations


def _turns(expression: str) -> str:
    """A template that prints this expression of a message ``m`` in each turn."""
    return (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{{ EXPRESSION }}{{ '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ).replace("EXPRESSION", expression)


FAITHFUL = {
    "plain": _turns("m.content"),
    "trimmed": _turns("m.content | trim"),
    "users trimmed": _turns("m.content | trim if m.role == 'user' else m.content"),
    "default system": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|system|>\nYou are a helpful assistant<|assistant|>\n' }}{% endif %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "system inside the first turn": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set said = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set said = false %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}"
        "{% if loop.index0 == 0 and said != false %}"
        "{% set content = '<<SYS>>\n' + said + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "start in the first content": (
        "{% for m in messages %}{% set content = '<|' + m['role'] + '|>\n\n' + m['content'] | trim + '</s>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
    ),
    "no line feeds": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "text or parts": _turns("m.content if m.content is string else m.content[0].text"),
    "parts only": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "don't": "Don't lie. It's \"wrong\".\n" + _turns("m.content | trim"),
    "private characters": "\ue000\ue001\U000f0000" + _turns("m.content"),
}

LOOKING = {
    "names the question twice": ("{{ 'Topic: ' + messages[-1].content + '\n' }}" + _turns("m.content")),
    "drops thoughts from history": (
        "{% for m in messages %}{% set content = m.content %}"
        "{% if m.role == 'assistant' and '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{{ '<|' + m.role + '|>\n' + content + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
    ),
    "keeps the last thoughts": (
        "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages %}{% set content = m.content %}"
        "{% if m.role == 'assistant' %}{% set thoughts = '' %}{% if '</think>' in content %}"
        "{% set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.index0 == ns.last %}"
        "{{ '<|assistant|>\n<think>\n' + thoughts.strip('\\n') + '\n</think>\n\n' + content.lstrip('\\n') }}"
        "{% else %}{{ '<|assistant|>\n' + content }}{% endif %}"
        "{% else %}{{ '<|' + m.role + '|>\n' + content }}{% endif %}{{ '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "obeys a switch": (
        "{% set quick = messages[-1].content.rstrip().endswith('/no_think') %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | replace('/no_think', '') | trim + '</s>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% if quick %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}"
    ),
    "looks for a switch": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n"
        "{% if '/no_think' in messages[-1].content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    ),
    "replaces": _turns("m.content | replace('\n', ' ')"),
    "writes JSON": _turns("m.content | tojson"),
    "asks how long": _turns("m.content if m.content | length < 40 else m.content[:40] + '...'"),
    "looks at the first letter": _turns("('> ' if m.content[0] == '(' else '') + m.content"),
}

REFUSED = {
    "shouts": _turns("m.content | upper"),
    "escapes": _turns("m.content | tojson(ensure_ascii=true)"),
    "reads nobody": "<|assistant|>\n",
    "no system": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + _turns("m.content | trim")
    ),
    "always raises": "{{ raise_exception('not for\nchats') }}",
    "wrong": "{{ messages[0].content + 1 }}",
}
ALL = FAITHFUL | LOOKING
