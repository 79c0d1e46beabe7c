"""The chat layout as a Jinja template, for transformers and every server that reads one.

Tests hold it equal to `chat_format.render`.
"""

from dataset.tools import TOOLS_HEAD, TOOLS_SHAPE, TOOLS_TAIL

CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' and messages[0].content -%}
        {{- messages[0].content + '\\n\\n' -}}
    {%- endif -%}
    {{- HEAD -}}
    {%- for tool in tools -%}
        {{- (tool | tojson) + '\\n' -}}
    {%- endfor -%}
    {{- TAIL -}}
    {{- '<tool_call>' + SHAPE + '</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message.content or '' -%}
    {%- if message.role == 'system' and loop.first and tools -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if message.reasoning_content -%}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- content -}}
        {%- for tool_call in message.tool_calls or [] -%}
            {%- set call = tool_call.function or tool_call -%}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
            {{- '\\n' if content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' + arguments -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking else '') -}}
{%- endif -%}
"""
for _name, _text in (("HEAD", TOOLS_HEAD), ("TAIL", TOOLS_TAIL), ("SHAPE", TOOLS_SHAPE)):
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(_name, "'" + _text.replace("\n", "\\n") + "'")
