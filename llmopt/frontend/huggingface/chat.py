"""Take a Jinja chat template apart into a `ChatFormat` that a device without Jinja renders.

The template is only ever rendered, never parsed: conversations of marked contents show the
literal text between any two neighbours, then other conversations, chosen to trip a wrong guess,
must come out the same from the template and from the pieces.
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
_LEFT, _RIGHT = "\n  \n", " \n\t"  # put around contents to see what is trimmed
_DAYS = (datetime(2003, 4, 5, tzinfo=UTC), datetime(2024, 11, 23, tzinfo=UTC))
# what a template may raise: its own complaints arrive as TemplateError
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
    """A template does not come apart; the message says why."""


def compile_chat(template: str, special_tokens: Mapping[str, str]) -> tuple[ChatFormat | None, str]:
    """Return the format that renders as ``template`` does, or None and the reason why not.

    Args:
        template: The Jinja text of a checkpoint's ``chat_template``.
        special_tokens: ``{"bos_token": "<s>", ...}``, which templates refer to.
    """
    try:
        marked = _renderer(template, special_tokens, DATE.format)
        found = _take_apart(marked, _THINK if _THINK in template else None)
        for day in _DAYS:
            _compare(found, _renderer(template, special_tokens, day.strftime), day)
    except TemplateRefusal as refusal:
        return None, str(refusal)
    return found, ""


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
        """``{% generation %}`` marks what an assistant said, for training: here it is nothing."""

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


def _take_apart(render: Render, reasoning_end: str | None) -> ChatFormat:
    joins: dict[tuple[str, str], Join] = {}
    for walk in _WALKS:
        _learn(joins, walk, walk, render)
    system_last = _learn_system(joins, render)
    _learn_if_allowed(joins, ("user", "user"), render)
    return ChatFormat(tuple(joins[pair] for pair in sorted(joins)), system_last, reasoning_end)


def _learn_system(joins: dict[tuple[str, str], Join], render: Render) -> bool:
    """Learn the joins of a system message; return whether it goes before the last user's."""
    walk = ("system", "user", "assistant", "user")
    try:
        shown = render(_messages(walk, [_mark(index) for index in range(len(walk))]))
    except TemplateRefusal:
        return False  # it has no system role: the format will not have one either
    if _mark(0) not in shown:
        return False  # it drops the message, which rendering must not do silently
    system_last = shown.find(_mark(0)) > shown.find(_mark(2))
    _learn(joins, ("system", "user"), ("system", "user"), render)
    as_shown = ("user", "assistant", "system", "user") if system_last else walk
    _learn(joins, walk, as_shown, render)
    return system_last


def _learn_if_allowed(
    joins: dict[tuple[str, str], Join], walk: tuple[str, ...], render: Render
) -> None:
    learned = dict(joins)
    try:
        _learn(learned, walk, walk, render)
    except TemplateRefusal:
        return  # the template allows no such conversation, or treats it in a way of its own
    joins |= learned


def _learn(
    joins: dict[tuple[str, str], Join],
    said: tuple[str, ...],
    shown: tuple[str, ...],
    render: Render,
) -> None:
    """Learn every join of one conversation.

    Args:
        joins: What is known; added to.
        said: The roles in the order of the messages.
        shown: The roles in the order in which the template puts them.
        render: The template.
    """
    marks = [_mark(index) for index in range(len(said))]
    # a system message that is shown elsewhere than said stands before the last user's
    marks_shown = marks if shown == said else [*marks[1:-1], marks[0], marks[-1]]
    bare = _between(render(_messages(said, marks)), marks_shown)
    padded = _between(
        render(_messages(said, [f"{_LEFT}{mark}{_RIGHT}" for mark in marks])), marks_shown
    )
    roles = (START, *shown, GENERATE)
    for first, second, text, wide in zip(roles, roles[1:], bare, padded, strict=False):
        join = _join(first, second, text, wide)
        known = joins.setdefault((first, second), join)
        if known != join:
            raise TemplateRefusal(
                f"what stands between {first} and {second} depends on more than the two: "
                f"{known.text!r} and {join.text!r}"
            )


def _join(first: str, second: str, text: str, wide: str) -> Join:
    """Return the join whose trimming turns ``text``, seen bare, into ``wide``, seen padded."""
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
    """Return what stands before, between and after the marks."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise TemplateRefusal("the template drops, repeats or reorders a message")
        pieces.append(before)
    return [*pieces, text]


def _compare(found: ChatFormat, render: Render, day: datetime) -> None:
    """Check the pieces against the template on conversations that they were not made from."""
    for messages in _conversations(found):
        expected = render(messages)
        if found.render(messages, day) != expected:
            raise TemplateRefusal(f"its pieces do not give its text for {messages!r}")


def _conversations(found: ChatFormat) -> list[Messages]:
    """Return conversations of one to four turns with odd contents, each content in each role."""
    walks = [("user", "assistant") * turns + ("user",) for turns in range(4)]
    if any(join.first == "system" for join in found.joins):
        walks += [("system", *walk) for walk in walks]
    odd = [*_ODD, *([f"thought{found.reasoning_end}\n\nsaid "] if found.reasoning_end else [])]
    result = []
    for walk in walks:
        for shift in range(len(odd)):
            contents = [odd[(shift + 2 * index) % len(odd)] for index in range(len(walk))]
            result.append(_messages(walk, contents))
    return result
