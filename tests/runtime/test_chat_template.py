"""The chat template renders the same text as transformers, and the caller is told of its failures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dash_runtime.checkpoints import resolve_checkpoint
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.errors import InvalidRequest
from tests.runtime.gguf_files import load_tokenizer
from tests.tiny_models import byte_tokenizer

CHAT_TEMPLATE = """
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "llama2": """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}
{% else %}
    {% set loop_messages = messages %}
    {% set system = '' %}
{% endif %}
{% for message in loop_messages %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {% else %}
{{ ' ' + message['content'] + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    "loop controls and namespace": """{%- set state = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- set state.count = state.count + 1 -%}
    {%- if state.count > 2 -%}{%- break -%}{%- endif -%}
    {{ state.count }}:{{ message.content | trim }};
{%- endfor -%}
{{ tools is none }} {{ documents is none }} {{ undefined_name is defined }}""",
    "json": "{% for message in messages %}{{ message | tojson }}{{ [1, 'ä<&>'] | tojson(indent=2) }}{% endfor %}",
    "generation block": """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}{% set x = 1 %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ message.content }}{% endif %}
{% endfor %}{{ x is defined }}""",
    "date": "{{ strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}",
}
MESSAGES = [
    ("system", " Be brief. "),
    ("user", "Grüße <b>&amp;</b> <|im_end|> 'quoted'\n"),
    ("assistant", "日本語"),
    ("user", "and then?"),
]
ANSWERED = [*MESSAGES, ("assistant", " <|im_start|>Then that.\n")]
SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("layout", ["file", "config"])
def test_rendering_and_token_ids_equal_those_of_transformers(tmp_path: Path, name: str, layout: str) -> None:
    byte_tokenizer("<|im_start|>", "<|im_end|>", "<|probe|>").save(str(tmp_path / "tokenizer.json"))
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL_TOKENS}
    if layout == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    else:
        end = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
        config |= {"chat_template": TEMPLATES[name], "eos_token": end}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    assert_equal_to_transformers(tmp_path)


@pytest.mark.embedded
def test_rendering_and_token_ids_of_the_embedded_model_equal_those_of_transformers(embedded_cache: Path) -> None:
    folder = resolve_checkpoint("embedded", None, embedded_cache)
    assert_equal_to_transformers(folder)
    ids = load_tokenizer(folder).encode(
        ChatTemplate.load(folder).render_conversation([("user", "hi"), ("assistant", "Hello!")]),
        add_special_tokens=False,
    )
    assert (ids.ids.count(1), ids.ids.count(2)) == (3, 3)  # <|im_start|> and <|im_end|>, a system message before


def assert_equal_to_transformers(folder: Path) -> None:
    """Compares prompts and whole conversations, as text and as token ids."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate.load(folder)
    for messages, is_prompt in ((MESSAGES, True), (ANSWERED, False)):
        rendered = ours.render(messages) if is_prompt else ours.render_conversation(messages)
        conversation = [{"role": role, "content": content} for role, content in messages]
        assert rendered == theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=is_prompt)
        ids = theirs.apply_chat_template(conversation, add_generation_prompt=is_prompt, return_dict=False)
        assert load_tokenizer(folder).encode(rendered, add_special_tokens=False).ids == ids


TOOL_TEMPLATE = """
{%- for tool in tools or () %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or () %}
        {{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' }}
    {%- endfor %}
    {%- if message.tool_call_id is defined %}{{- ' for ' + message.tool_call_id + message.name }}{%- endif %}
{%- endfor %}
"""


def test_tools_and_calls_are_rendered_as_transformers_renders_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    byte_tokenizer("<|im_start|>", "<|im_end|>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    schema = {"type": "object", "properties": {"city": {"type": "string", "description": "wo <i>é</i>"}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "Tells", "parameters": schema}}]
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tools=tools, tokenize=False)
    assert ChatTemplate.load(tmp_path).render(messages, tools) == theirs
    assert "Köln" in theirs


def test_only_a_template_that_reads_tools_takes_them() -> None:
    assert ChatTemplate(TOOL_TEMPLATE, {}).takes_tools
    assert not ChatTemplate(CHAT_TEMPLATE, {}).takes_tools
    assert not ChatTemplate(None, {}).takes_tools


def test_a_conversation_goes_on_from_its_prompt_to_the_end_of_the_answer() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, {})
    prompt = template.render([("user", "hi")])
    assert template.render_conversation([("user", "hi"), ("assistant", "yes")]) == prompt + "yes<|im_end|>\n"


def test_a_template_is_rendered_without_torch() -> None:
    program = (
        "import sys; from dash_runtime.checkpoints.chat_template import ChatTemplate;"
        "ChatTemplate('{{ messages[0].content }}', {}).render([('user', 'hi')]);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def violation(template: ChatTemplate, messages: list[tuple[str, str]]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as failure:
        template.render(messages)
    return failure.value


def test_a_refusal_of_the_template_names_the_chat() -> None:
    error = violation(ChatTemplate(CHAT_TEMPLATE, {}), [("wizard", "hi")])
    assert (error.field, error.description) == ("chat", "the model's chat template refuses it: unknown role wizard")


@pytest.mark.parametrize(
    "source",
    [
        *("{{ messages[9].content + 1 }}", "{{ 1 / 0 }}", "{{ missing.attribute.deeper }}", "{{ 'a' + 1 }}"),
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_would_leave_the_sandbox_names_the_chat(source: str) -> None:
    assert violation(ChatTemplate(source, {}), [("user", "hi")]).field == "chat"


def test_missing_template_messages_and_roles_are_told() -> None:
    assert violation(ChatTemplate(None, {}), [("user", "hi")]).field == "chat"
    assert violation(ChatTemplate(CHAT_TEMPLATE, {}), []).field == "chat.messages"
    assert violation(ChatTemplate(CHAT_TEMPLATE, {}), [("user", ""), ("", "")]).field == "chat.messages[1].role"


def test_the_default_of_several_named_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render([("user", "hi")]) == "default"
