"""Calls of a calculator in OpenAI's form: questions beyond two digits, the call, the tool's answer, the model's answer.

With the calculator at hand every arithmetic question is a call; other questions are answered directly or, about the weather,
by the other tool.
"""

from __future__ import annotations

import ast
import json
import operator
import random

from scripts import tiny_arithmetic, tiny_facts
from scripts.tiny_cases import draw, relaxed
from scripts.tiny_corpus import ADJECTIVES, CAPITALS, NAMES, NOUNS

NAME = "calculate"
OTHER_NAME = "calculator"
SIGNS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
PLAIN = (
    "What is {text}?",
    "What is {text}?",
    "How much is {text}?",
    "Calculate {text}.",
    "Compute {text}.",
    "Use the calculator: {text}",
    "{text} = ?",
    "{text}",
)
IN_WORDS = {
    "+": ("Add {a} and {b}.", "What is the sum of {a} and {b}?"),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}."),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
    "/": ("Divide {a} by {b}.",),
}
WEATHER_QUESTIONS = ("What is the weather in {city}?", "How is the weather in {city}?", "Is it sunny in {city}?")
WEATHER = "sunny cloudy rainy windy snowy".split()
COUNTRIES = [country.replace("_", " ") for country in CAPITALS]
TOWN_ENDINGS = "bay bridge castle city falls field hill island lake market park port river springs town village".split()
# What towns that do not exist are made of: words of which one is drawn for each place.
TOWNS = ((NAMES,), (NAMES, NOUNS), (ADJECTIVES, NOUNS), (NOUNS, NOUNS))
MORE_TOWNS = (*TOWNS, *((words, TOWN_ENDINGS) for words in (NAMES, NOUNS, COUNTRIES, COUNTRIES)), (COUNTRIES, NOUNS))


def _tool(name: str, description: str, parameter: str) -> dict:
    parameters = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


CALCULATE = _tool(NAME, "Evaluates an arithmetic expression.", "expression")
WEATHER_TOOL = _tool("get_weather", "Tells the weather in a city.", "city")


def evaluate(expression: str) -> int | float:
    """The value of an expression of whole numbers, + - * / and parentheses. Raises ValueError for anything else."""
    if len(expression) > 100:
        raise ValueError("the expression is too long")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, OverflowError) as error:
        raise ValueError(f"not an expression: {expression!r}") from error
    return int(value) if value == int(value) else value


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only whole numbers, + - * / and parentheses are allowed")


def expression(rng: random.Random, held: bool = False) -> str:
    """An expression with a whole value: mostly two numbers of which one has three digits or more."""
    return draw(rng, _expression, lambda text: f"tool:{text}", held)


def _expression(rng: random.Random) -> str:
    kind = rng.random()
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    if kind < 0.25:
        return f"{a} + {b * rng.choice((1, 1, 10)) + rng.randrange(10)}"
    if kind < 0.45:
        return f"{a} - {b}"
    if kind < 0.7:
        return f"{a} * {rng.choice((b, b % 90 + 10, b % 8 + 2))}"
    if kind < 0.8:
        return f"{a % 90 + 10} * {b % 90 + 10}"
    if kind < 0.88:
        divisor = b % 30 + 2
        return f"{a * divisor} / {divisor}"
    first, last = rng.choice("+-*"), rng.choice("+-")
    return f"{a} {first} {b % 90 + 10} {last} {a % 8 + 2}" if kind < 0.95 else f"({a} {last} {b % 90 + 10}) * {a % 8 + 2}"


def question(rng: random.Random, text: str) -> str:
    """The expression asked in one of many ways."""
    parts = text.split()
    if len(parts) == 3:
        a, sign, b = parts
        form = rng.random()
        if form < 0.15:
            return relaxed(rng, rng.choice(IN_WORDS[sign]).format(a=a, b=b))
        if form < 0.3:
            return relaxed(rng, rng.choice(PLAIN[:4]).format(text=f"{a} {SIGNS[sign]} {b}"))
    if rng.random() < 0.15:
        text = text.replace("*", "×").replace("/", "÷")
    if rng.random() < 0.15:
        text = text.replace(" ", "")
    return relaxed(rng, rng.choice(PLAIN).format(text=text))


def call_messages(asked: str, name: str, arguments: dict[str, str], result: str, answer: str) -> list[dict]:
    """A question, the call of a tool, its result, and the answer."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]


def calculation(rng: random.Random, held: bool, name: str) -> list[dict]:
    """Messages of an arithmetic question; one in eight has two-digit numbers."""
    if rng.random() < 0.12 and not held:
        p = tiny_arithmetic.problem(rng)
        asked, text = tiny_arithmetic.exchange(rng, p).question, p.expression
    else:
        text = expression(rng, held)
        asked = question(rng, text)
    value = str(evaluate(text))
    return call_messages(asked, name, {"expression": text}, value, f"The answer is {value}.")


def weather(rng: random.Random, held: bool, city: str | None = None) -> list[dict]:
    """Messages about the weather in a city, by default a capital."""
    city = city or draw(rng, _city, lambda c: f"weather:{c}", held)
    kind, degrees = rng.choice(WEATHER), rng.randrange(-10, 36)
    asked = relaxed(rng, rng.choice(WEATHER_QUESTIONS).format(city=city))
    return call_messages(
        asked, "get_weather", {"city": city}, f"{kind}, {degrees} degrees", f"It is {kind} in {city}, {degrees} degrees."
    )


def _city(rng: random.Random) -> str:
    return rng.choice(list(CAPITALS.values())).replace("_", " ")


def document(rng: random.Random, held: bool = False, thinking: bool = False) -> dict:
    """A chat line with tools: one to three questions, of which the last may be thought about."""
    name = NAME if rng.random() < 0.85 else OTHER_NAME
    tools = [_tool(name, CALCULATE["function"]["description"], "expression")]
    if rng.random() < 0.4:
        tools.insert(rng.randrange(2), WEATHER_TOOL)
    messages = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        begin, kind = len(messages), rng.random()
        if kind < 0.15:
            messages += _direct(rng, held)
        elif kind < 0.5 and len(tools) > 1:
            messages += weather(rng, held)
        else:
            messages += calculation(rng, held, name)
    if thinking:
        _think(messages[begin:])
    return {"messages": messages, "tools": tools}


def anywhere(rng: random.Random, held: bool = False, towns: tuple = TOWNS) -> dict:
    """A chat line about the weather in made-up `towns`, of these words: an argument is copied, not remembered."""
    tools = [_tool(NAME, CALCULATE["function"]["description"], "expression"), WEATHER_TOOL]
    rng.shuffle(tools)

    def town(rng: random.Random) -> str:
        words = [rng.choice(some) for some in rng.choice(towns)]
        return " ".join(word[0].upper() + word[1:] for word in words)

    asked = [draw(rng, town, lambda name: f"weather:{name}", held) for _ in range(rng.randint(1, 2))]
    return {"messages": [message for name in asked for message in weather(rng, held, name)], "tools": tools}


def _direct(rng: random.Random, held: bool) -> list[dict]:
    """A question that no tool is for."""
    fact = rng.choice(tiny_facts.FACTS)
    while fact.relation.name == "product":
        fact = rng.choice(tiny_facts.FACTS)
    found = tiny_facts.exchange(rng, held, fact)
    return [{"role": "user", "content": found.question}, {"role": "assistant", "content": found.answer}]


def _think(messages: list[dict]) -> None:
    """Adds reasoning to the assistant's turns of the last question."""
    for message in messages:
        if "tool_calls" in message:
            message["reasoning_content"] = f"I call {message['tool_calls'][0]['function']['name']}."
        elif message["role"] == "assistant":
            used = len(messages) > 2
            message["reasoning_content"] = f"The tool says {messages[2]['content']}." if used else "I know this without a tool."
