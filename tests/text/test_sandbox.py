"""Chat templates are untrusted programs: what they may use, and what becomes of those that go further."""

import datetime

import pytest

from qwen35_jax.errors import UserError
from qwen35_jax.text import ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]


def render(text, **extra):
    return ChatTemplate(text, source="under/test").render(HELLO, **extra)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ messages.__class__ }}",
        "{{ messages[0]['role'].__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ dict.__globals__ }}",
        "{{ dict().__class__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ (messages | attr('__class__')) }}",
        "{{ ['x'] | map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('{0.__class__}' | attr('format'))(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._Namespace__attrs = 1 %}",
        "{% set ns = namespace(x=1) %}{{ ns._Namespace__attrs }}{{ ns.__dict__ }}",
    ],
)
def test_attempts_to_leave_the_sandbox(text):
    with pytest.raises(UserError, match="under/test tries to leave its sandbox") as caught:
        render(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ messages[0].content.no_such_method() }}", "no_such_method"),
        ("{{ nothing() }}", "undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages | items | list }}", "TypeError"),
        ("{{ 'a' | int(base=99) + nothing.x }}", "under/test"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'other' %}", "under/test"),
        ("{% import 'os' as os %}", "under/test"),
        ("{{ namespace | tojson }}", "TypeError"),
    ],
)
def test_failures_are_one_line_errors(text, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        render(text)
    assert "\n" not in str(caught.value) and "under/test" in str(caught.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{{ {'a': '<é>\\u2028'} | tojson }}", '{"a": "<é>\u2028"}'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true) }}", '{"a": "\\u00e9", "b": 1}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ {'a': [1]} | tojson(separators=(',', ':')) }}", '{"a":[1]}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% generation %}x{{ messages[0].role }}{% endgeneration %}", "xuser"),
        ("{{ dict(a=1).a }}{{ dict([('b', 2)]).b }}", "12"),
        ("{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}", "8"),
        ("{{ documents is none and tools is none and enable_thinking is undefined }}", "True"),
        ("{{ image }}|{{ flag }}|{{ numbers }}", "<Picture>|True|[1, 2.5]"),
    ],
)
def test_what_templates_may_use(text, expected):
    class Picture:
        pass

    class Number(float):
        pass

    assert render(text, image=Picture(), flag=True, numbers=(1, Number(2.5))) == expected


def test_strftime_now():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.datetime.now().year + i) for i in (-1, 0)}


def test_endless_nesting_is_refused():
    nested = []
    nested.append(nested)
    for arguments in ({"tools": [{"a": nested}]}, {"other": nested}):
        with pytest.raises(UserError, match="nested too deeply"):
            render("x", **arguments)
    with pytest.raises(UserError, match="cannot be compiled"):
        render("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")
