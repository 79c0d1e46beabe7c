"""Our own chat layout: its control tokens and its Jinja template.

One turn is `<|im_start|>{role}\\n{content}<|im_end|>\\n` with role system, user, assistant or tool.
`trainer/train_tokenizer.py` puts the template beside the tokenizer, where transformers, every
server and `chat_format.py` find it.
"""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

TOOLS_HEAD = (
    "# Tools\n\nYou can call these functions, given as one JSON object per line:\n<tools>\n"
)
TOOLS_TAIL = "</tools>\n\nTo call a function, answer with its name and its arguments as JSON:\n"
TOOLS_SHAPE = '\n{"name": "...", "arguments": {...}}\n'

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
