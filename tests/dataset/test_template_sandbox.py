"""Chat templates that never end or write without end are stopped; ordinary ones see no difference."""

import re
import tracemalloc

import pytest
from conftest import conversations, write_jsonl
from running import run_script
from transformers.utils.chat_template_utils import render_jinja_template

from benchmarks.chat_templates import CASES
from dataset import template_sandbox
from dataset.chat_template import CHAT_TEMPLATE
from dataset.template_checks import BATTERY
from dataset.template_layout import plain_message
from dataset.template_manner import Template
from dataset.template_reader import TemplateReader

MANY = "{% for a in range(99999) %}"
SHARE = "{% set ns = namespace(a=[1], b=[1]) %}{% for n in range(40) %}"
GROW = "{% set ns = namespace(x=[1, 2], t='ab', n=10) %}" + MANY
HOSTILE = {
    "loops": (MANY * 3 + "{% endfor %}" * 3, "more than"),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "more than",
    ),
    "recursion": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(9) }}", "recursion|more than"),
    "sums": (MANY + "{% set x = range(99999) | sum %}{% endfor %}", "more than"),
    "searches": (
        "{% set x = 'x' * 9999999 %}" + MANY + "{% if 'yx' in x %}{% endif %}{% endfor %}",
        "more than",
    ),
    "output": (MANY + "{{ 'x' * 9999999 }}{% endfor %}", "more than"),
    "a captured text": (
        "{% set x %}" + MANY + "{{ 'x' * 99999 }}{% endfor %}{% endset %}",
        "more than",
    ),
    "times": ("{{ 'x' * 10000000000 }}", "more than"),
    "a list": ("{{ [1] * 10000000000 }}", "more than"),
    "power": ("{{ 10 ** (10 ** 9) }}", "more than"),
    "powers": (GROW + "{% set ns.n = ns.n * ns.n %}{% endfor %}", "more than"),
    "doubling": (GROW + "{% set ns.t = ns.t + ns.t %}{% endfor %}", "more than"),
    "doubling ~": (GROW + "{% set ns.t = ns.t ~ ns.t %}{% endfor %}", "more than"),
    "a deep list": (
        "{% set ns = namespace(x=[1, 2]) %}{% for n in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x }}",
        "more than",
    ),
    "its JSON": (
        "{% set ns = namespace(x=[1, 2]) %}{% for n in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x | tojson }}",
        "more than",
    ),
    "a comparison": (
        SHARE + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
        "{{ ns.a == ns.b }}",
        "more than",
    ),
    "a hash": (SHARE + "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} }}", "more than"),
    "a dict": (SHARE + "{% set ns.a = dict(a=ns.a, b=ns.a) %}{% endfor %}{{ ns.a }}", "more than"),
    "its views": (SHARE + "{% set ns.a = {1: ns.a, 2: ns.a}.items() %}{% endfor %}", "more than"),
    "a batch": (
        SHARE + "{% for x in [1] | batch(3, ns.a) %}{% set ns.a = x %}{% endfor %}{% endfor %}",
        "more than",
    ),
    "arguments": (
        SHARE + "{% macro f() %}{% set ns.a = varargs %}{% endmacro %}{{ f(ns.a, ns.a) }}"
        "{% endfor %}{{ ns.a == ns.b }}",
        "more than",
    ),
    "lorem ipsum": ("{{ lipsum(n=1000000) }}", "'lipsum' is undefined"),
    "wrapping": ("{{ ('a' * 9999999) | wordwrap(1) }}", "No filter named 'wordwrap'"),
    "rounding": ("{{ 1.5 | round(9999999, 'floor') }}", "more than"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "a range": ("{{ range(9999999999) | list }}", "more than"),
    "a filter": ("{{ 'x' | center(9999999999) }}", "more than"),
    "a method": ("{{ 'x'.ljust(9999999999) }}", "more than"),
    "a format": ("{{ '%1000000000d' % 1 }}", "more than"),
    "a format's width": ("{{ '%*d' % (1000000000, 1) }}", "more than"),
    "a format method": ("{{ '{:1000000000}'.format(1) }}", "more than"),
    "replace": ("{% set x = 'x' * 99999 %}{{ x.replace('x', x) }}", "more than"),
    "join": ("{% set x = 'x' * 9999 %}{{ x | list | join(x) }}", "more than"),
    "expandtabs": ("{% set x = '\t' * 99999 %}{{ x.expandtabs(99999) }}", "more than"),
    "lists of lists": ("{{ ([range(9999) | list] * 9999) | sum(start=[]) | length }}", "more than"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_without_end_is_stopped(kind, monkeypatch):
    monkeypatch.setattr(template_sandbox, "STEPS", 100_000)
    monkeypatch.setattr(template_sandbox, "SIZE", 1 << 20)
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    source, reason = HOSTILE[kind]
    tracemalloc.start()
    with pytest.raises(ValueError, match=reason) as error:
        Template(source, "evil.jinja", {}).render([{"role": "user", "content": "hi"}])
    assert tracemalloc.get_traced_memory()[1] < 100e6 and "\n" not in str(error.value)
    tracemalloc.stop()


def test_a_run_ends_with_the_name_of_the_template_and_the_budget(tmp_path):
    evil = tmp_path / "evil.jinja"
    evil.write_text(MANY + "{{ 'x' * 9999999 }}{% endfor %}")
    data = write_jsonl(tmp_path / "chats.jsonl", conversations(4))
    words = [f"--data_path={data}", f"--chat_template={evil}", f"--out_dir={tmp_path / 'out'}"]
    done = run_script("trainer/train_full_sft.py", *words, "--from_weight=none", "--device=cpu")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(rf"{evil}: .*writes more than 16,777,216 characters", done.stderr)


FEATURES = """\
{%- for m in messages recursive %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}
{{- loop.previtem.role if loop.previtem is defined }}{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}
{%- generation %}{% set x = 1 %}{{ x ~ 2 ~ none ~ [1] }}{% endgeneration %}{{ x is defined }}
{%- for key, value in {'a': 1, 'b': 'c'}.items() if value != 2 %}{{ key }}{{ value }}{% continue %}{% endfor %}
{%- set ns = namespace(n=0) %}{% for _ in range(3) %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
{{- '%s-%05.2f' % ('a', 1) }}{{ '{}:{:>4}'.format(1, 'b') }}{{ [1, 2] * 2 + [3] }}{{ 2 ** 10 * 3 % 7 }}
{{- messages | map(attribute='role') | join(', ') }}{{ (messages | selectattr('role', 'equalto', 'user') | list) | length }}
{{- {'b': 1, 'a': '<é>'} | tojson }}{{ {'b': [1]} | tojson(indent=2) }}{{ 'a\nb' | indent(2) }}
{%- macro f(n) %}{{ n }}{% endmacro %}{{ f(1733000000) }}{{ 1733000000 | string }}
{%- set a, b = (1, [2]) %}{{ a }}{{ b }}{{ [a, b] == [1, [2]] }}{{ {'k': b}.items() | list }}
{{- dict(a=1) }}{{ messages[0].content | trim | upper | replace('A', 'bb') }}{{ undefined_name }}"""


@pytest.mark.parametrize("name", [*CASES, "ours", "features"])
def test_ordinary_templates_are_rendered_as_transformers_does(name):
    source = {"ours": CHAT_TEMPLATE, "features": FEATURES}.get(name) or CASES[name].template
    template = Template(source, name, {"bos_token": "<s>", "eos_token": "</s>"})
    for messages, tools in BATTERY:
        messages = [plain_message(message, False) for message in messages]
        for flags in ({}, {"add_generation_prompt": True}):
            options = {"tools": tools, "chat_template": source, **template.variables, **flags}
            try:
                expected = render_jinja_template([messages], **options)[0][0]
            except Exception:
                with pytest.raises(ValueError):
                    template.render(messages, tools, **flags)
            else:
                assert template.render(messages, tools, **flags) == expected


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000],
    ids=["parentheses", "conditions"],
)
def test_a_template_that_is_nested_too_deeply_is_refused(source):
    with pytest.raises(ValueError, match="^evil.jinja: nested too deeply; name another"):
        TemplateReader(Template(source, "evil.jinja", {}), None)
