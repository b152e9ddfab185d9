"""A chat format: what stands between the messages of a conversation, as plain text.

Devices have no Jinja. At compile time a checkpoint's chat template is taken apart into *joins*,
the literal text between two neighbours in a conversation, and proven to give the same text. This
module needs nothing but the standard library.

A conversation is a walk: ``start``, the role of each message, ``generate``. Its text is::

    join(start, system) system join(system, user) user ... user join(user, generate)
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

START = "start"
GENERATE = "generate"
SCHEMA = 1
# stands for today's date in a join: the strftime format between two private-use characters
DATE = "\ue000{}\ue001"
_DATE = re.compile("\ue000(.*?)\ue001", re.DOTALL)


@dataclass(frozen=True)
class Join:
    """What stands between two neighbours.

    Attributes:
        first: A role, or ``start``.
        second: A role, or ``generate``.
        text: The literal text.
        strip_before: Whether white space at the end of the first's content is dropped.
        strip_after: Whether white space at the start of the second's content is dropped.
    """

    first: str
    second: str
    text: str
    strip_before: bool = False
    strip_after: bool = False


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes the text that a model was trained on.

    Attributes:
        joins: One for each pair of neighbours that the format has.
        system_last: Whether a system message belongs before the last user message instead of
            the first.
        reasoning_end: Assistant content up to and including this mark is dropped, or None.
    """

    joins: tuple[Join, ...]
    system_last: bool = False
    reasoning_end: str | None = None

    def render(self, messages: Sequence[Mapping[str, str]], now: datetime | None = None) -> str:
        """Return the prompt for the answer to a conversation, special tokens included.

        Encode it without adding special tokens: the text has those that belong there.

        Args:
            messages: ``{"role": ..., "content": ...}``, the last one to be answered.
            now: The date for formats that state it; the clock's by default.

        Raises:
            ValueError: The format has no place for a role, or none after the one before it.
        """
        turns = self._placed([(message["role"], message["content"]) for message in messages])
        roles = [START, *(role for role, _ in turns), GENERATE]
        joins = [self._join(*pair) for pair in itertools.pairwise(roles)]
        when = now or datetime.now().astimezone()
        pieces = [_dated(joins[0].text, when)]
        for (role, content), before, after in zip(turns, joins, joins[1:], strict=False):
            text = self._content(role, content)
            text = text.lstrip() if before.strip_after else text
            text = text.rstrip() if after.strip_before else text
            pieces += [text, _dated(after.text, when)]
        return "".join(pieces)

    def to_json(self) -> str:
        """Return the format as JSON text; the same format gives the same bytes."""
        value = {"schema": SCHEMA, **asdict(self)}
        return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> ChatFormat:
        """Return the format that `to_json` wrote; keys that are not known are ignored.

        Raises:
            ValueError: The text is not a chat format, or a newer one than this.
        """
        try:
            value = json.loads(text)
            if value["schema"] != SCHEMA:
                raise ValueError(f"chat format schema {value['schema']}, known: {SCHEMA}")
            names = Join.__dataclass_fields__
            joins = tuple(
                Join(**{key: each[key] for key in names if key in each}) for each in value["joins"]
            )
            return ChatFormat(joins, bool(value["system_last"]), value["reasoning_end"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a chat format: {error!r}") from error

    def _join(self, first: str, second: str) -> Join:
        for join in self.joins:
            if (join.first, join.second) == (first, second):
                return join
        known = sorted({join.second for join in self.joins} - {GENERATE})
        if second not in {*known, GENERATE}:
            raise ValueError(f"the chat format has no role {second!r}; it has {', '.join(known)}")
        raise ValueError(f"the chat format has no {second!r} right after {first!r}")

    def _placed(self, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the turns with the system message where the format wants it."""
        if not self.system_last or not turns or turns[0][0] != "system":
            return turns
        system, *rest = turns
        users = [index for index, (role, _) in enumerate(rest) if role == "user"]
        last = users[-1] if users else 0
        return [*rest[:last], system, *rest[last:]]

    def _content(self, role: str, content: str) -> str:
        if self.reasoning_end and role == "assistant" and self.reasoning_end in content:
            return content.rpartition(self.reasoning_end)[2].lstrip("\n")
        return content


def _dated(text: str, when: datetime) -> str:
    return _DATE.sub(lambda found: when.strftime(found[1]), text)
