"""Jinja chat templates become a `ChatFormat`, which a device without Jinja can render.

The template is rendered, never parsed: conversations with marked contents reveal the literal text
between adjacent messages. Other conversations, chosen to expose a wrong guess, must then render
the same from the template and from the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from llmopt.runtime.chat import DATE, GENERATE, START, ChatFormat, Join

Messages = list[dict[str, str]]
Render = Callable[[Messages], str]

_THINK = "</think>"
_LEFT, _RIGHT = "\n  \n", " \n\t"  # around contents, to detect trimming
_DAYS = (datetime(2003, 4, 5, tzinfo=UTC), datetime(2024, 11, 23, tzinfo=UTC))
# what a template may raise; its own raise_exception arrives as TemplateError
_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_WALKS = (("user",), ("user", "assistant", "user"))
_ODD = (
    "Hello",
    "  leading and trailing \n\n",
    "{{ messages }} {% if x %} {# no #}",
    "<|im_end|>\n<|im_start|>system [INST] <</SYS>> </s> <end_of_turn> <|eot_id|>",
    "naïve 日本語 🙂 \"quoted\" 'single' \\n \u2028 &amp; <b>",
    "12345",
    "line one\n\n\tline two\r\n",
    "None",
    "system",
)


class TemplateRefusal(Exception):  # noqa: N818 -- not an error: the answer to a question
    """A template has no `ChatFormat`; the message says why."""


def compile_chat(template: str, special_tokens: Mapping[str, str]) -> tuple[ChatFormat | None, str]:
    """Return the format that renders like ``template``, or None and the reason.

    Args:
        template: Jinja text of a checkpoint's ``chat_template``.
        special_tokens: ``{"bos_token": "<s>", ...}``, which templates refer to.
    """
    try:
        marked = _renderer(template, special_tokens, DATE.format)
        chat = _decompose(marked, _THINK if _THINK in template else None)
        for day in _DAYS:
            _compare(chat, _renderer(template, special_tokens, day.strftime), day)
    except TemplateRefusal as refusal:
        return None, str(refusal)
    return chat, ""


def _renderer(
    template: str, special_tokens: Mapping[str, str], date: Callable[[str], str]
) -> Render:
    """Return a function that renders messages as transformers does, in a sandbox."""
    import jinja2

    environment = _environment(date)
    try:
        compiled = environment.from_string(template)
    except (jinja2.TemplateError, *_FAILURES) as error:
        raise TemplateRefusal(f"the template does not parse: {error}") from error

    def render(messages: Messages) -> str:
        try:
            return str(
                compiled.render(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **special_tokens,
                )
            )
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise TemplateRefusal(f"the template fails: {error}") from error

    return render


def _environment(date: Callable[[str], str]) -> Any:
    """Return the sandbox that chat templates are written for."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks an assistant's reply for training; it renders its body."""

        tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": date}
    return environment


def _to_json(value: Any, **options: Any) -> str:
    """Return plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _decompose(render: Render, reasoning_end: str | None) -> ChatFormat:
    joins: dict[tuple[str, str], Join] = {}
    for walk in _WALKS:
        _learn(joins, walk, walk, render)
    system_last = _learn_system(joins, render)
    _learn_if_allowed(joins, ("user", "user"), render)
    return ChatFormat(tuple(joins[pair] for pair in sorted(joins)), system_last, reasoning_end)


def _learn_system(joins: dict[tuple[str, str], Join], render: Render) -> bool:
    """Learn the joins of a system message; return whether it precedes the last user's."""
    walk = ("system", "user", "assistant", "user")
    try:
        text = render(_messages(walk, [_mark(index) for index in range(len(walk))]))
    except TemplateRefusal:
        return False  # no system role: the format will have none either
    if _mark(0) not in text:
        return False  # it drops the message, which must not happen silently
    system_last = text.find(_mark(0)) > text.find(_mark(2))
    _learn(joins, ("system", "user"), ("system", "user"), render)
    rendered = ("user", "assistant", "system", "user") if system_last else walk
    _learn(joins, walk, rendered, render)
    return system_last


def _learn_if_allowed(
    joins: dict[tuple[str, str], Join], walk: tuple[str, ...], render: Render
) -> None:
    learned = dict(joins)
    try:
        _learn(learned, walk, walk, render)
    except TemplateRefusal:
        return  # the template refuses such a conversation, or treats it specially
    joins |= learned


def _learn(
    joins: dict[tuple[str, str], Join],
    sent: tuple[str, ...],
    rendered: tuple[str, ...],
    render: Render,
) -> None:
    """Learn every join of one conversation.

    Args:
        joins: Joins learned so far; extended in place.
        sent: Roles in the order of the messages.
        rendered: Roles in the order in which the template renders them.
        render: Function that renders the template.
    """
    marks = [_mark(index) for index in range(len(sent))]
    # a system message that is rendered elsewhere than sent precedes the last user's
    marks_rendered = marks if rendered == sent else [*marks[1:-1], marks[0], marks[-1]]
    bare = _between(render(_messages(sent, marks)), marks_rendered)
    padded = _between(
        render(_messages(sent, [f"{_LEFT}{mark}{_RIGHT}" for mark in marks])), marks_rendered
    )
    roles = (START, *rendered, GENERATE)
    for first, second, text, wide in zip(roles, roles[1:], bare, padded, strict=False):
        join = _join(first, second, text, wide)
        known = joins.setdefault((first, second), join)
        if known != join:
            raise TemplateRefusal(
                f"the text between {first} and {second} depends on other messages: "
                f"{known.text!r} and {join.text!r}"
            )


def _join(first: str, second: str, text: str, wide: str) -> Join:
    """Return the join whose trimming explains ``text``, bare, and ``wide``, padded."""
    for before in (False, True):
        for after in (False, True):
            left = "" if before or first == START else _RIGHT
            right = "" if after or second == GENERATE else _LEFT
            if wide == left + text + right:
                return Join(
                    first,
                    second,
                    text,
                    strip_before=before and first != START,
                    strip_after=after and second != GENERATE,
                )
    raise TemplateRefusal(f"the template changes the content around {first} and {second}")


def _mark(index: int) -> str:
    return f"qz{'abcdefgh'[index]}content{'abcdefgh'[index]}zq"


def _messages(roles: Sequence[str], contents: Sequence[str]) -> Messages:
    pairs = zip(roles, contents, strict=True)
    return [{"role": role, "content": content} for role, content in pairs]


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """Return the text before, between and after the marks."""
    pieces = []
    for mark in marks:
        before, separator, text = text.partition(mark)
        if not separator or mark in text:
            raise TemplateRefusal("the template drops, repeats or reorders a message")
        pieces.append(before)
    return [*pieces, text]


def _compare(chat: ChatFormat, render: Render, day: datetime) -> None:
    """Check the format against the template on conversations it was not learned from."""
    for messages in _conversations(chat):
        expected = render(messages)
        if chat.render(messages, day) != expected:
            raise TemplateRefusal(f"the format and the template render {messages!r} differently")


def _conversations(chat: ChatFormat) -> list[Messages]:
    """Return conversations of one to four turns with odd contents, each content in each role."""
    walks = [("user", "assistant") * turns + ("user",) for turns in range(4)]
    if any(join.first == "system" for join in chat.joins):
        walks += [("system", *walk) for walk in walks]
    odd = [*_ODD, *([f"thought{chat.reasoning_end}\n\nsaid "] if chat.reasoning_end else [])]
    result = []
    for walk in walks:
        for shift in range(len(odd)):
            contents = [odd[(shift + 2 * index) % len(odd)] for index in range(len(walk))]
            result.append(_messages(walk, contents))
    return result
