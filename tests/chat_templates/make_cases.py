"""Renders every template with transformers' own renderer and writes cases.json: what the Rust renderer must print.

    pip install transformers jinja2 && python make_cases.py
"""

import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Given to every chat, so that no output depends on the day.
DATE = {"date_string": "26 Jul 2024"}

user, assistant, system = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system"))
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "It's <b>\"weather\"</b> & 天気 in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city"},
                "days": {"type": "integer", "default": 3},
                "units": {"enum": ["c", "f"], "type": "string"},
                "items": {"type": "array", "items": {"type": ["number", "null"]}},
                "scale": {"type": "number", "default": 1e-07, "nullable": True},
                "nested": {"type": "object", "properties": {"x": {"oneOf": [{"type": "string"}, {"type": "array"}]}}},
            },
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object", "properties": {}}}}


def call(name, arguments, id="abcdef123"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CHATS = {
    "one": [user("Hi")],
    "system": [system("Be brief.\n"), user(" What rose? ")],
    "turns": [system("S"), user("a"), assistant(" b\n"), user("c\n\n"), assistant("d"), user("ünï 🙂 ‹x›")],
    "two-users": [user("a"), user("b")],
    "starts-with-assistant": [assistant("a"), user("b")],
    "late-system": [user("a"), assistant("b"), system("now"), user("c")],
    "system-only": [system("alone")],
    "thoughts": [user("q"), assistant("<think>\nhmm\n</think>\n\nanswer"), user("r"), assistant("<think>so</think>fine")],
    "reasoning": [user("q"), {"role": "assistant", "content": "a", "reasoning_content": "\nwhy\n"}],
    "tools": [
        user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call("weather", {"city": "Köln", "days": 2.0, "deep": {"a": [1, None, True]}})]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "abcdef123"},
        {"role": "tool", "content": "{\"t\": 1}", "tool_call_id": "abcdef123"},
        assistant("12."),
        user("Thanks"),
    ],
    "two-calls": [
        user("Both?"),
        {"role": "assistant", "content": "Yes", "tool_calls": [call("weather", {}), call("time", {"a": "\"q\"\n\\"}, "short")]},
    ],
    "empty-content": [system(""), user(""), assistant("")],
    "controls": [user("a"), {"role": "skip", "content": "x"}, user("b"), {"role": "stop", "content": "y"}, user("c")],
    "spaces": [user("\x1f\u00a0 \tx \u2003\u3000\x1c\n")],
    "odd-role": [{"role": "critic", "content": "no"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}, assistant("x")],
}
OPTIONS = [
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "tools": [WEATHER, TIME]},
    {"variables": {"enable_thinking": False, "builtin_tools": ["weather", "interpreter"]}, "add_generation_prompt": True},
]

# Single expressions: (template, variables).
BAG = {
    "s": "  Hello, World\n", "n": 7, "f": 2.5, "t": True, "none_": None, "e": "", "l": [3, 1, 2], "words": ["b", "A", "c"],
    "d": {"z": 1, "a": {"k": [1, 2.0, None, True, "q'\"é\n"]}, "items": "shadow", "get": 5}, "m": [{"r": "u", "c": 1}, {"r": "a", "c": 2}, {"r": "u"}],
    "big": 12345678901234567890, "small": 1e-7, "large": 1e16, "plain": 123456789.125, "neg": -0.0, "ctl": "\x00\x07\x7f\u2028",
    "lines": "a\r\nb\rc\x0bd\n\ne", "csv": "a,b,,c", "ws": " a  b c ",
}
EXPRESSIONS = [
    "{{ s.strip() }}|{{ s.lstrip() }}|{{ s.rstrip() }}|{{ s|trim }}|{{ s.strip('\\n Hd') }}",
    "{{ csv.split(',') }}{{ csv.split(',', 1) }}{{ csv.split(',', maxsplit=2) }}{{ csv.rsplit(',', 1) }}{{ csv.split('x') }}{{ e.split(',') }}",
    "{{ ws.split() }}{{ ws.split(none, 1) }}{{ ws.rsplit(None, 1) }}{{ e.split() }}{{ ws.split(' ') }}",
    "{{ lines.splitlines() }}{{ lines.splitlines(true) }}",
    "{{ csv.partition(',') }}{{ csv.rpartition(',') }}{{ csv.partition('x') }}",
    "{{ csv.removeprefix('a,') }}{{ csv.removesuffix('c') }}{{ csv.replace(',', ';', 2) }}{{ csv.replace('', '-') }}",
    "{{ csv.upper() }}{{ s.lower() }}{{ 'ab cd'.title() }}{{ 'ab'.capitalize() }}{{ csv.count(',') }}{{ csv.find('b') }}{{ 'x'.isdigit() }}{{ '12'.isdigit() }}",
    "{{ csv.startswith('a') }}{{ csv.startswith(('x', 'a')) }}{{ csv.endswith('c') }}{{ 'b' in csv }}{{ 'z' not in csv }}",
    "{{ ', '.join(words) }}{{ words|join('-') }}{{ l|join }}{{ m|map(attribute='r')|join(',') }}",
    "{{ '{} and {x}'.format(1, x='y') }}{{ '%s-%d'|format('a', 3) }}",
    "{{ n }} {{ f }} {{ t }} {{ none_ }} {{ undefined_ }}|{{ l }} {{ d }} {{ m }}",
    "{{ d|tojson }}", "{{ d|tojson(indent=2) }}", "{{ d|tojson(indent=2, sort_keys=true) }}", "{{ d|tojson(ensure_ascii=true) }}",
    "{{ d|tojson(separators=(',', ':')) }}", "{{ [] | tojson(indent=2) }}{{ {} | tojson(indent=2) }}{{ [[], {}]|tojson(indent=1) }}",
    "{{ [big, small, large, plain, neg, 1.0, 1e22, 1.5e300, 0.0001, 123456789012345680.0]|tojson }}",
    "{{ ctl|tojson }}{{ '<b>&\\'\"</b>'|tojson }}{{ none_|tojson }}{{ t|tojson }}{{ {1: 2, none: 3, true: 4}|tojson }}",
    "{{ small }} {{ large }} {{ plain }} {{ neg }} {{ 1.0 }} {{ big }} {{ t }}", "{{ undefined_|tojson }}",
    "{{ '<b>&</b>' }}{{ '<b>'|e }}{{ '<b>'|safe }}",
    "{{ l[1:] }}{{ l[::-1] }}{{ l[-1] }}{{ s[2:7] }}{{ s[:-3] }}{{ l[5:] }}{{ csv[::2] }}",
    "{{ l|first }}{{ l|last }}{{ l|length }}{{ l|sort }}{{ words|sort }}{{ l|reverse|list }}{{ l|max }}{{ l|min }}{{ l|sum }}{{ [1,1,2]|unique|list }}",
    "{% for k, v in d|dictsort %}{{ k }},{% endfor %}{% for k, v in d.items() %}{{ k }}:{{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}",
    "{{ d.keys()|list }}{{ d.values()|list|length }}{{ d.get('q') }}{{ d.get('q', 'dflt') }}{{ d['items'] }}{{ d.z }}{{ d['a']['k'][0] }}",
    "{{ m|selectattr('r', 'equalto', 'u')|list|length }}{{ m|selectattr('c')|list|length }}{{ m|rejectattr('c', 'defined')|list }}{{ m|selectattr('c', 'defined')|map(attribute='c')|list }}",
    "{{ s is string }}{{ d is mapping }}{{ l is iterable }}{{ s is iterable }}{{ d is iterable }}{{ n is iterable }}{{ l is sequence }}{{ s is sequence }}{{ d is sequence }}",
    "{{ n is number }}{{ t is number }}{{ n is integer }}{{ t is integer }}{{ f is float }}{{ t is boolean }}{{ none_ is none }}{{ undefined_ is defined }}{{ undefined_ is none }}{{ t is true }}{{ n is odd }}",
    "{{ undefined_ is iterable }}{{ undefined_ is string }}{{ undefined_ is mapping }}{{ undefined_ is sequence }}{{ undefined_ == none }}{{ undefined_ == '' }}{{ not undefined_ }}",
    "{{ 'a' is in csv }}{{ n is eq 7 }}{{ n is divisibleby 7 }}{{ n is sameas 7 }}{{ d.z is not none }}{{ raise_exception is defined }}{{ raise_exception is callable }}",
    "{{ undefined_.x }}", "{{ undefined_ + 'a' }}", "{{ 'a' + 1 }}", "{{ d.missing.deeper }}", "{{ l.append(4) }}", "{{ unknown_() }}", "{{ s|unknown_ }}",
    "{% for x in undefined_ %}x{% else %}none{% endfor %}{{ undefined_|length }}{{ undefined_|default('d') }}{{ e|default('d') }}{{ e|default('d', true) }}{{ none_|d('d') }}",
    "{{ 'a' ~ 1 ~ none_ ~ t ~ f }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ 7 // 2 }}{{ 7 / 2 }}{{ -7 % 3 }}{{ 2 ** 3 }}{{ 6 / 2 }}",
    "{{ 'x' if false }}|{{ 'x' if e else 'y' }}|{{ e or 'z' }}|{{ none_ and 1 }}|{{ 1 < 2 < 3 }}|{{ not e }}",
    "{% set ns = namespace(a=1, l=[]) %}{% for x in l %}{% set ns.a = ns.a + x %}{% set ns.l = ns.l + [x] %}{% endfor %}{{ ns.a }}{{ ns.l }}",
    "{% set x = 1 %}{% for i in [1,2] %}{% set x = i %}{% endfor %}{{ x }}{% set a, b = 1, 'q' %}{{ a }}{{ b }}{% set c %}in {{ a }}{% endset %}{{ c }}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}{{ loop.length }}{% endfor %}",
    "{% for x in l %}{{ loop.previtem|default('-') }}{{ x }}{{ loop.nextitem|default('-') }}{{ loop.cycle('a', 'b') }}{{ loop.changed(x) }};{% endfor %}",
    "{% for x in l if x > 1 %}{{ x }}{{ loop.index }}{% else %}no{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}[{{ loop(x) }}]{% else %}{{ x }}{% endif %}{% endfor %}",
    "{% macro f(a, b=2, *args) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=3) }}{{ f(b=1, a=0) }}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{{ f(1, b=3) }}{% call f(5) %}in{% endcall %}",
    "{% filter upper %}abc{{ n }}{% endfilter %}{% with q = 4 %}{{ q }}{% endwith %}{{ q is defined }}",
    "{%- if true -%}\n  a\n  {%- endif %}\n  b {#- c -#}  d\n{% if true %}\n    e\n{% endif %}\n  {% if true %}x{% endif %}\n\n{{ n }}\n\nz\n",
    "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc\r\n\r\n",
    "{{ n|string + 'x' }}{{ '5'|int + 1 }}{{ 'x'|int(3) }}{{ f|round }}{{ f|int }}{{ 3|float }}{{ n|abs }}{{ l|list }}{{ s|list|length }}{{ 'a b'|title }}{{ 'abc'|upper|lower|capitalize|replace('A', 'z') }}",
    "{{ 'a\\nb'|indent }}{{ 'a\\nb\\n\\nc'|indent(2, true) }}{{ 'a\\nb'|indent(width=1) }}{{ l|batch(2)|list }}{{ m|groupby('r')|length }}{{ 'abc'|last }}{{ [none_, 0, '', 1]|select|list }}{{ words|map('upper')|list }}{{ l|map('string')|join('') }}",
    "{{ dict(a=1, b=2) }}{{ dict(a=1).items()|list }}{{ range(3)|list }}{{ range(1, 6, 2)|list }}{{ (1, 2) }}{{ (1,) }}{{ [1, 'a', none, true, 2.5] }}",
    "{{ {'a': 1, 'b': [1, 2]} }}{{ {'a': {'b': 'it\\'s'}} }}{{ 'it\\'s \"x\"' }}{{ ['it\\'s', 'say \"x\"', 'both \\' and \"'] }}",
    "{{ 'a' 'b' }}", "{{ s.isupper() }}{{ 'A'.isupper() }}{{ ' '.isspace() }}{{ 'é'.isalpha() }}{{ 'x'.join('abc') }}",
    "{{ messages|length }}{{ messages[0].role }}{{ messages[-1]['content'] }}{{ bos_token }}{{ unk_token }}{{ add_generation_prompt }}{{ tools }}{{ documents }}",
    "{{ raise_exception('no ' + s|trim) }}", "{{ 1 / 0 }}", "{% for x in n %}{% endfor %}", "{{ l[10] }}|{{ l['a'] }}|{{ d[1] }}", "{% if x %}", "{{ x }", "{% frob %}",
    "{{ csv.zfill(12) }}", "{{ 'abc'.center(9) }}|{{ 'abc'.center(6) }}|{{ 'abcd'.center(7, '-') }}|{{ '-5'.zfill(4) }}|{{ 'abc'.ljust(5) }}|{{ 'abc'.rjust(5) }}", "{{ 'abc'.index('c') }}{{ words.index('A') }}", "{{ s|wordcount }}",
    "{{ 'ẞß'.lower() }}{{ 'straße'.upper() }}{{ 'ŉ'|title }}",
    "{% set x = {'a': 1} %}{% set y = x.copy() %}{{ y }}", "{{ d.a.k.count(1) }}", "{{ '€'|length }}{{ 'a🙂b'[1] }}{{ '🙂'|tojson(ensure_ascii=true) }}",
    "{% set x = 'a=b' %}{{ x }}{% set y = (1 == 1) %}{{ y }}{% set z = x if y else '%}' %}{{ z }}{% set w = '%}' ~ \"}}\" %}{{ w }}",
    "{%- set a = 1 -%} {%+ set b = 2 +%} {{ a ~ b }}{% set set_ = 3 %}{{ set_ }}{% set upper_ | upper %}abc{% endset %}{{ upper_ }}",
]


def outcome(template, chat, options):
    chat = [{key: value for key, value in message.items() if value is not None} for message in chat]
    try:
        [text], _ = render_jinja_template(
            [chat],
            tools=options.get("tools"),
            chat_template=template,
            add_generation_prompt=options.get("add_generation_prompt", False),
            **{**TOKENS, **DATE},
            **options.get("variables", {}),
        )
        return {"text": text}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


cases = []
for path in sorted(HERE.glob("*.jinja")):
    source = path.read_text()
    for name, chat in CHATS.items():
        for number, options in enumerate(OPTIONS):
            if name == "parts" and path.stem != "parts":
                continue
            cases.append({"template": path.name, "chat": name, "options": number, **outcome(source, chat, options)})
expressions = [{"source": source, **outcome(source, CHATS["one"], {"variables": BAG})} for source in EXPRESSIONS]
out = {"tokens": TOKENS, "date": DATE, "chats": CHATS, "options": OPTIONS, "cases": cases, "bag": BAG, "expressions": expressions}
lines = [f"{json.dumps(key)}: " + ("[\n" + ",\n".join(json.dumps(x, ensure_ascii=False) for x in value) + "\n]" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)) for key, value in out.items()]
(HERE / "cases.json").write_text("{" + ",\n".join(lines) + "}\n")
print(len(cases), "chats,", sum("error" in case for case in cases), "refused;", len(expressions), "expressions,", sum("error" in case for case in expressions), "refused")
