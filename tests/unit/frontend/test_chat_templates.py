"""Chat templates come apart into literal pieces, or a reason is given."""

import ast
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llmopt.frontend.huggingface.chat import compile_chat
from llmopt.runtime import chat
from llmopt.runtime.chat import ChatFormat, Join

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = """\
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = none -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate') }}
  {%- endif -%}
  {%- set text = m.content -%}
  {%- if loop.first and system is not none -%}
    {%- set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content -%}
  {%- endif -%}
  {%- if m.role == 'user' -%}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
  {%- else -%}{{ ' ' + text.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}
"""
LLAMA3 = (
    "{% for m in messages %}{% set t = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set t = bos_token + t %}"
    "{% endif %}{{ t }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}
{% set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}
{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{% for m in rest %}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if loop.first %}{{ first }}{% endif %}
{{- m.content | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
GEMMA = GEMMA.replace("\n{", "{").rstrip("\n")  # its lines are for reading
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{% if loop.last and sys is defined %}"
    "{{ '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}"
    "{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
DATED = (
    "<sys>Today is {{ strftime_now('%d %b %Y') }}.</sys>{% for m in messages %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
REASONING = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c"
    " %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|{{ m.role }}|>{{ c }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRAINING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<a>{{ m.content }}"
    "{% endgeneration %}{% else %}<u>{{ m.content }}{% endif %}{% endfor %}<a>"
)
TEMPLATES = {
    "smollm2": SMOLLM2,
    "chatml": CHATML,
    "llama-2": LLAMA2,
    "llama-3": LLAMA3,
    "gemma-2": GEMMA2,
    "gemma-3": GEMMA,
    "mistral": MISTRAL,
    "phi-3": PHI3,
    "zephyr": ZEPHYR,
    "reasoning": REASONING,
    "training-marks": TRAINING,
}
NO_SYSTEM = {"gemma-2"}


def compiled(template: str) -> ChatFormat:
    found, reason = compile_chat(template, TOKENS)
    assert found is not None, reason
    return found


def oracle(template: str, messages: list[dict[str, str]]) -> str:
    """Return what transformers renders."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, **TOKENS
    )
    return str(rendered[0])


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = [
    conversation(("user", "Why is the sky blue?")),
    conversation(("user", " \n padded\t\n")),
    conversation(("user", "a"), ("assistant", " b\n"), ("user", "\tc ")),
    conversation(("system", " Be brief. \n"), ("user", " x ")),
    conversation(
        ("system", "{{ bos_token }}"),
        ("user", "1"),
        ("assistant", "two"),
        ("user", "  3"),
        ("assistant", "<think>hm</think>\n\nfour"),
        ("user", "five 🙂"),
    ),
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_the_pieces_render_what_transformers_renders(
    name: str, messages: list[dict[str, str]]
) -> None:
    if name in NO_SYSTEM:
        messages = [message for message in messages if message["role"] != "system"]
    assert compiled(TEMPLATES[name]).render(messages) == oracle(TEMPLATES[name], messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_format_survives_being_written_and_read(name: str) -> None:
    found = compiled(TEMPLATES[name])
    assert ChatFormat.from_json(found.to_json()) == found
    assert ChatFormat.from_json(found.to_json()).to_json() == found.to_json()


def test_the_default_system_text_appears_only_without_a_system_message() -> None:
    found = compiled(SMOLLM2)
    assert "named SmolLM" in found.render(conversation(("user", "hi")))
    given = found.render(conversation(("system", "Be terse."), ("user", "hi")))
    assert "named SmolLM" not in given
    assert given.startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nhi")


def test_a_date_is_the_day_of_rendering_not_of_compiling() -> None:
    found = compiled(DATED)
    text = found.render(conversation(("user", "hi")), datetime(2031, 2, 3, tzinfo=UTC))
    assert text == "<sys>Today is 03 Feb 2031.</sys><user>hi<assistant>"


def test_a_date_mark_in_a_message_is_left_alone() -> None:
    text = compiled(CHATML).render(conversation(("user", "\ue000%Y\ue001")))
    assert "\ue000%Y\ue001" in text


def test_a_template_without_a_system_role_refuses_one_when_rendering() -> None:
    found = compiled(GEMMA2)
    with pytest.raises(ValueError, match="no role 'system'; it has assistant, user"):
        found.render(conversation(("system", "x"), ("user", "y")))


def test_a_template_that_drops_the_system_message_has_no_system_role() -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    found = compiled(template)
    with pytest.raises(ValueError, match="no role 'system'"):
        found.render(conversation(("system", "x"), ("user", "y")))


def test_roles_that_must_alternate_are_refused_otherwise() -> None:
    found = compiled(LLAMA2)
    with pytest.raises(ValueError, match="no 'user' right after 'user'"):
        found.render(conversation(("user", "x"), ("user", "y")))


def test_two_user_messages_in_a_row_render_where_the_template_allows_them() -> None:
    messages = conversation(("user", "x"), ("user", "y"))
    assert compiled(CHATML).render(messages) == oracle(CHATML, messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "drops, repeats or reorders",
        ),
        ("{{ messages[-1].content }}", "drops, repeats or reorders"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "repeats"),
        (
            "{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}",
            "depends on other messages",
        ),
        ("{% for m in messages %}{{ m.content | replace(' ', '_') }}\n{% endfor %}", "changes"),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('e', 'E') }}{% endfor %}",
            "drops",
        ),
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content | replace('<', '') }}{% endfor %}",
            "and the template render",
        ),
        ("{% for m in messages %}{{ m.nothing.at.all }}{% endfor %}", "the template fails"),
        ("{% for m in messages %}", "does not parse"),
        ("{{ raise_exception('never') }}", "the template fails: never"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "the template fails"),
        ("{{ 1 // 0 }}", "the template fails"),
        (
            "{{ strftime_now('%Y')[:2] }}{% for m in messages %}{{ m.content }}|{% endfor %}",
            "differently",
        ),
    ],
)
def test_what_does_not_come_apart_is_said(template: str, reason: str) -> None:
    found, said = compile_chat(template, TOKENS)
    assert found is None
    assert reason in said
    assert said.count("\n") == 0


def test_json_filters_give_plain_json() -> None:
    template = "{% for m in messages %}{{ m.role | tojson }}:{{ m.content }}\n{% endfor %}"
    assert compiled(template).render(conversation(("user", "x"))) == '"user":x\n'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": 2}',
        '{"schema": 1, "joins": [{"text": 1}]}',
        '{"schema": 1}',
        "7",
    ],
)
def test_a_damaged_format_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"chat format|Expecting value"):
        ChatFormat.from_json(text)


def test_keys_from_the_future_are_ignored() -> None:
    found = ChatFormat((Join("start", "user", "<u>"), Join("user", "generate", "<a>")))
    value = json.loads(found.to_json())
    value["new"] = value["joins"][0]["new"] = 1
    assert ChatFormat.from_json(json.dumps(value)) == found


def test_rendering_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(chat.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.partition(".")[0]
        for node in imports
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        + [alias.name for alias in node.names if isinstance(node, ast.Import)]
    }
    assert "json" in names
    assert names <= sys.stdlib_module_names
