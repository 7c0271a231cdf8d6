"""What the packaged tiny model can do, on cases that its training data leaves out; prints one table."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterable

from absl import flags

import qwen35_jax
from qwen35_jax import command
from qwen35_jax.errors import UserError
from scripts import tiny_arithmetic, tiny_facts, tiny_scenes, tiny_stories, tiny_strings, tiny_tools
from scripts.tiny_arithmetic import Problem

USAGE = """
Scores the skills of the tiny model on held-out cases, greedily; what it sees too, if it does.

  python -m benchmarks.tiny_skills
  python -m benchmarks.tiny_skills --checkpoint DIR --cases 64 --show 3
  python -m benchmarks.tiny_skills --checkpoint DIR_IN_FP8 --keep_fp8 --fp8_activations
"""
CHECKPOINT = flags.DEFINE_string("checkpoint", "tiny", "directory of a checkpoint; default: the packaged model")
MESH = flags.DEFINE_string("mesh", "1x1", "DATAxMODEL or REPLICAxDATAxMODEL")
KEEP_FP8 = flags.DEFINE_bool("keep_fp8", False, "keep the weights of an FP8 checkpoint in FP8")
FP8_ACTIVATIONS = flags.DEFINE_bool("fp8_activations", False, "with --keep_fp8: multiply them with activations in FP8 too")
CASES = flags.DEFINE_integer("cases", 256, "the most cases of a skill", lower_bound=1)
DRAW = flags.DEFINE_integer("draw", 0, "which cases: 0 are those by which the packaged weights were chosen", lower_bound=0)
SHOW = flags.DEFINE_integer("show", 0, "print so many wrong answers of each skill", lower_bound=0)
JSON = flags.DEFINE_bool("json", False, "one JSON object in place of the table")

BATCH = 64
# With prompts of up to 64 tokens, or of up to 512 with tools, these fit one cache size each: fewer programs to compile.
NEW_TOKENS, NEW_TOKENS_WITH_TOOLS = 192, 64
_VALUE = r"(?:(?!</parameter>).)*"
CALL = re.compile(
    rf"<tool_call>\n<function=([\w-]+)>\n((?:<parameter=[\w-]+>\n{_VALUE}\n</parameter>\n)*)</function>\n</tool_call>", re.S
)
PARAMETER = re.compile(r"<parameter=([\w-]+)>\n(.*?)\n</parameter>\n", re.S)
Said = tuple[str, bool]  # a text, and whether it came to an end
SHE_WORDS, HE_WORDS = {"she", "her"}, {"he", "his", "him"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A chat and the judge of what the model says: `right(text)`, thinking included; `text` is None if it did not end."""

    messages: list[dict]
    right: Callable[[str | None], bool]
    expected: str
    scene: str = ""  # what is shown

    @property
    def question(self) -> str:
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else content[-1]["text"]

    @property
    def key(self) -> str:
        """What tells cases apart."""
        return f"{self.question} {self.scene}".rstrip()


@dataclasses.dataclass(frozen=True)
class Score:
    """How many of a skill's cases are right, and the answers that are not: (question, expected, said)."""

    skill: str
    target: float
    cases: int
    right: int
    wrong: list[tuple[str, str, str]]

    @property
    def percent(self) -> float:
        return 100 * self.right / self.cases


def final_answer(text: str | None, thinking: bool = False) -> str:
    """What is said after thinking, or "" if nothing was said or, with `thinking`, nothing thought."""
    if text is None or ("</think>" in text) != thinking:
        return ""
    thought, _, answer = text.rpartition("</think>")
    return answer.strip() if thought.strip() or not thinking else ""


def last_number(text: str) -> int | None:
    """The last whole number of a text: 95 of "37 + 58 = 95."."""
    found = re.findall(r"(?<!\d)-?\d+", text)
    return int(found[-1]) if found else None


def ends_with(text: str, answer: str) -> bool:
    """Whether the last words of a text are the answer, whatever the case and the final mark."""
    words, wanted = text.casefold().rstrip(".! ").split(), answer.casefold().split()
    return words[-len(wanted) :] == wanted


def parse_call(text: str | None) -> tuple[str, dict[str, str]] | None:
    """(tool, arguments) of an answer that is exactly one call in Qwen's XML format, else None."""
    match = CALL.fullmatch((text or "").strip())
    return (match[1], dict(PARAMETER.findall(match[2]))) if match else None


def right_calculation(text: str | None, value: float) -> bool:
    """Whether the answer is a call of the calculator, with an expression of this value and nothing else."""
    call = parse_call(text)
    if call is None or call[0] != tiny_tools.NAME or set(call[1]) != {"expression"}:
        return False
    try:
        return tiny_tools.evaluate(call[1]["expression"]) == value
    except ValueError:
        return False


def story_faults(text: str, hero: tiny_stories.Hero) -> list[str]:
    """What is wrong with a story: empty if it is about the hero, stays with one friend, thing and place, and ends."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    words = re.findall(r"\w+", text)
    others = (set(tiny_stories.SHE + tiny_stories.HE) & set(words)) - {hero.name}
    things = set(tiny_stories.THINGS) & set(words)
    foreign = HE_WORDS if hero.name in tiny_stories.SHE else SHE_WORDS
    faults = {
        "fewer than five sentences": len(sentences) < 5,
        "does not end": not text.rstrip().endswith((".", "!")),
        "a sentence twice": len(set(sentences)) < len(sentences),
        "the hero's kind is not said at the start": not {hero.kind, hero.name} <= set(re.findall(r"\w+", sentences[0])),
        "the hero is forgotten": sum(hero.name in s for s in sentences) < 3,
        "he and she are mixed up": bool(foreign & {word.lower() for word in words}),
        "other friends than one": len(others) != 1,
        "other things than one": len(things) != 1 or words.count(next(iter(things), "")) < 2,
        "more than one place": len(set(tiny_stories.PLACES) & set(words)) > 1,
    }
    return [fault for fault, found in faults.items() if found]


def ask(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def distinct(make: Callable[[random.Random], Case], name: str, number: int) -> list[Case]:
    """Up to `number` cases with different questions, the same in every run."""
    rng, found = random.Random(name), {}
    for _ in range(20 * number):
        if len(found) == number:
            break
        case = make(rng)
        found.setdefault(case.key, case)
    return list(found.values())


def arithmetic_case(p: Problem, question: str, thinking: bool) -> Case:
    return Case(ask(question), lambda text: last_number(final_answer(text, thinking)) == p.value, str(p.value))


def arithmetic(sign: str, thinking: bool) -> Callable[[random.Random], Case]:
    def make(rng: random.Random) -> Case:
        p = tiny_arithmetic.problem(rng, held=True, sign=sign)
        return arithmetic_case(p, tiny_arithmetic.exchange(rng, p).question, thinking)

    return make


def strings(skill: str) -> Callable[[random.Random], Case]:
    def make(rng: random.Random) -> Case:
        found = tiny_strings.exchange(rng, held=True, skill=skill)
        return Case(ask(found.question), lambda text: final_answer(text) == found.answer, found.answer)

    return make


def fact(rng: random.Random, chosen: tiny_facts.Fact | None = None) -> Case:
    chosen = chosen or rng.choice(tiny_facts.FACTS)
    question = tiny_facts.exchange(rng, held=True, fact=chosen).question
    return Case(ask(question), lambda text: ends_with(final_answer(text), chosen.answer), chosen.answer)


def story(rng: random.Random) -> Case:
    hero = tiny_stories.hero(rng, held=True)
    return Case(ask(tiny_stories.asked_by_name(rng, hero)), lambda text: not story_faults(final_answer(text), hero), hero.name)


def calculation(rng: random.Random) -> Case:
    expression = tiny_tools.expression(rng, held=True)
    value = tiny_tools.evaluate(expression)
    question = tiny_tools.question(rng, expression)
    return Case(ask(question), lambda text: right_calculation(text, value), str(value))


def choice(rng: random.Random) -> Case:
    """The weather tool for the weather, the calculator for arithmetic, neither for facts that are no products."""
    kind = rng.randrange(3)
    if kind == 0:
        return calculation(rng)
    if kind == 1:
        question, call, *_ = tiny_tools.weather(rng, held=True)
        arguments = json.loads(call["tool_calls"][0]["function"]["arguments"])
        return Case([question], lambda text: parse_call(text) == ("get_weather", arguments), arguments["city"])
    chosen = rng.choice(tiny_facts.FACTS)
    case = fact(rng, chosen)
    if chosen.relation.name == "product":  # arithmetic is a call where there is a calculator (scripts/tiny_tools.py)
        return dataclasses.replace(case, right=lambda text: right_calculation(text, int(chosen.answer)))
    return case


def shown(skill: str, kind: str) -> Callable[[random.Random], Case]:
    """Held-out scenes of a kind (see `tiny_scenes`) with the question about a skill; right is the answer, word for word."""

    def make(rng: random.Random) -> Case:
        scene = tiny_scenes.scene(rng, held=True, kind=kind)
        (asked,) = [a for a in scene.asked if a.skill == skill]
        content = [scene.part(lambda image: image), {"type": "text", "text": asked.question}]
        messages = [{"role": "user", "content": content}]
        return Case(messages, lambda text: final_answer(text) == asked.answer, asked.answer, scene.name)

    return make


def with_result(case: Case, text: str) -> Case:
    """The chat after a right call, with the tool's result; right is an answer that says it."""
    arguments = parse_call(text)[1]
    messages = tiny_tools.call_messages(case.messages[0]["content"], tiny_tools.NAME, arguments, case.expected, "")[:-1]
    return Case(messages, lambda said: str(last_number(final_answer(said))) == case.expected, case.expected)


# (skill, target in percent, maker of cases, whether the model thinks first)
PLAIN_SKILLS = (
    ("sum", 98, arithmetic("+", False), False),
    ("sum, thinking", 98, arithmetic("+", True), True),
    ("difference", 98, arithmetic("-", False), False),
    ("difference, thinking", 98, arithmetic("-", True), True),
    ("copy", 95, strings("copy"), False),
    ("reverse", 95, strings("reverse"), False),
    ("fact in new words", 95, fact, False),
    ("story", 90, story, False),
)
# (skill, target in percent, kind of scene)
PICTURE_SKILLS = (
    ("colour", 97, "single"),
    ("shape", 97, "single"),
    ("colour and shape", 95, "single"),
    ("digit", 97, "digit"),
    ("count to five", 95, "counted"),
    ("place", 95, "placed"),
    ("what is where", 90, "paired"),
    ("tallest bar", 90, "charted"),
    ("shortest bar", 90, "charted"),
    ("number of bars", 95, "charted"),
    ("direction of motion", 95, "moving"),
    ("first colour", 95, "changing"),
    ("last colour", 95, "changing"),
)
DEFAULT_PROMPT = arithmetic_case(Problem(37, "+", 58), "What is 37 + 58?", False)


class Bench:
    """Runs the cases of a draw through a model, `rows` at a time."""

    def __init__(self, lm: qwen35_jax.LanguageModel, rows: int, draw: int = 0):
        self.lm, self.rows, self.draw = lm, rows, draw

    def cases(self, make: Callable[[random.Random], Case], name: str, number: int) -> list[Case]:
        return distinct(make, f"{name}, draw {self.draw}" if self.draw else name, number)

    def answers(self, cases: list[Case], **options) -> list[Said]:
        """What the model says to each."""
        said: list[Said] = []
        length = NEW_TOKENS_WITH_TOOLS if options.get("tools") else NEW_TOKENS
        for i in range(0, len(cases), self.rows):
            batch = [case.messages for case in cases[i : i + self.rows]]
            full = batch + batch[:1] * (self.rows - len(batch))  # one number of rows is one compilation
            completions = self.lm.generate(full, temperature=0.0, max_new_tokens=length, **options)
            said += [(c.text, c.finish_reason == "stop") for c in completions[: len(batch)]]
        return said

    def plain(self, number: int) -> Iterable[Score]:
        for name, target, make, thinking in PLAIN_SKILLS:
            cases = self.cases(make, name, number)
            yield score(name, target, cases, self.answers(cases, enable_thinking=thinking))
        yield score("What is 37 + 58?", 100, [DEFAULT_PROMPT], self.answers([DEFAULT_PROMPT], enable_thinking=False))

    def pictures(self, number: int) -> Iterable[Score]:
        if self.lm.vision is None:
            return
        for name, target, kind in PICTURE_SKILLS:
            cases = self.cases(shown(name, kind), name, number)
            yield score(name, target, cases, self.answers(cases, enable_thinking=False))

    def tools(self, number: int) -> Iterable[Score]:
        cases, options = self.cases(calculation, "tool call", number), {"enable_thinking": False, "tools": [tiny_tools.CALCULATE]}
        said = self.answers(cases, **options)
        yield score("tool call", 98, cases, said)
        # An answer can only use the result of a call that was right: the others count as wrong.
        called = [with_result(case, text) for case, (text, ended) in zip(cases, said, strict=True) if ended and case.right(text)]
        used = score("tool call and answer", 98, called, self.answers(called, **options))
        yield dataclasses.replace(used, cases=len(cases))
        cases = self.cases(choice, "tool choice", number)
        options["tools"] = [tiny_tools.CALCULATE, tiny_tools.WEATHER_TOOL]
        yield score("choice of tool", 95, cases, self.answers(cases, **options))


def score(skill: str, target: float, cases: list[Case], said: list[Said]) -> Score:
    """Judges what was said to each case."""
    wrong = [
        (case.key, case.expected, text if ended else f"{text} … (no end)")
        for case, (text, ended) in zip(cases, said, strict=True)
        if not case.right(text if ended else None)
    ]
    return Score(skill, target, len(cases), len(cases) - len(wrong), wrong)


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: options start with --")
    forms = {"keep_fp8": KEEP_FP8.value, "fp8_activations": FP8_ACTIVATIONS.value}
    bench, scores = Bench(qwen35_jax.load(CHECKPOINT.value, MESH.value, **forms), min(BATCH, CASES.value), DRAW.value), []
    if not JSON.value:
        print(f"{CHECKPOINT.value}, held-out cases (draw {DRAW.value}), greedy, mesh {MESH.value}\n")
        print("| skill | cases | right | percent | target |\n|---|---|---|---|---|", flush=True)
    for part in (bench.plain, bench.tools, bench.pictures):
        for s in part(CASES.value):
            scores.append(s)
            if not JSON.value:
                print(f"| {s.skill} | {s.cases} | {s.right} | {s.percent:.1f} | {s.target} |", flush=True)
    if JSON.value:
        rows = {s.skill: {"cases": s.cases, "right": s.right, "percent": s.percent, "target": s.target} for s in scores}
        print(json.dumps({"checkpoint": CHECKPOINT.value, "skills": rows}))
        return
    for s in scores if SHOW.value else ():
        for question, expected, text in s.wrong[: SHOW.value]:
            print(f"\n{s.skill}: {question!r}\n  expected {expected!r}\n  said     {text!r}")


if __name__ == "__main__":
    command.run(main, USAGE)
