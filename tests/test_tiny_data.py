"""The training data of the packaged model: nothing held out is shown, the format is right; and the benchmark's judges."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys

import pytest

from benchmarks import tiny_skills
from qwen35_jax.text import ChatTemplate
from scripts import tiny_arithmetic, tiny_data, tiny_facts, tiny_stories, tiny_strings, tiny_tools
from scripts.tiny_arithmetic import Problem
from scripts.tiny_cases import held_out

# "37 + 58", "37+58", "37 plus 58": also what the model answers and thinks, which name the problem however it was asked.
EQUATION = re.compile(r"(?<!\d)(\d{1,2}) ?(\+|-|plus|minus) ?(\d{1,2})(?!\d)")
LINES = 6000


@pytest.fixture(scope="module")
def training() -> list[dict]:
    found = (itertools.islice(tiny_data.documents(0, mixture=mixture), LINES) for mixture in tiny_data.MIXTURES)
    return [line for _, line in itertools.chain.from_iterable(found)]


def _turns(lines: list[dict]):
    """(question, the message that answers it) of every pair of turns."""
    for line in lines:
        yield from itertools.pairwise(line.get("messages", ()))


def _texts(line: dict) -> list[str]:
    if "text" in line:
        return [line["text"]]
    texts = [m["content"] for m in line["messages"]] + [m.get("reasoning_content", "") for m in line["messages"]]
    calls = [call for m in line["messages"] for call in m.get("tool_calls", ())]
    return texts + [json.loads(call["function"]["arguments"]).get("expression", "") for call in calls]


def _problems(text: str) -> list[Problem]:
    return [Problem(int(a), "+" if sign in "+plus" else "-", int(b)) for a, sign, b in EQUATION.findall(text)]


def test_no_held_out_sum_or_difference_is_in_the_training_lines(training):
    found = [p for line in training for text in _texts(line) for p in _problems(text)]
    assert len(found) > 10_000
    assert not [p for p in found if p.held_out]
    assert Problem(37, "+", 58).held_out and Problem(58, "+", 37).held_out


def test_no_held_out_string_or_expression_is_in_the_training_lines(training):
    counts = {"copy": 0, "reverse": 0, "tool": 0}
    for question, answer in _turns(training):
        for skill, phrases in (("copy", tiny_strings.COPY), ("reverse", tiny_strings.REVERSE)):
            for phrase in phrases:
                start = phrase.removesuffix("{text}")
                if question["content"].startswith(start):
                    text = question["content"].removeprefix(start)
                    assert answer["content"] == (text if skill == "copy" else " ".join(text.split()[::-1]))
                    assert not held_out(f"{skill}:{text}")
                    counts[skill] += 1
        for call in answer.get("tool_calls", ()):
            text = json.loads(call["function"]["arguments"]).get("expression", "")
            if text and not EQUATION.fullmatch(text):  # sums and differences below 100 are held out under their own names
                assert not held_out(f"tool:{text}")
                counts["tool"] += 1
    assert min(counts.values()) > 150, counts


def test_no_fact_is_asked_in_its_held_out_phrasing(training):
    def plain(text: str) -> str:
        return text.casefold().rstrip("?.! ").replace(" times ", " * ").replace(" x ", " * ")

    asked = {(plain(q["content"]), a["content"]) for q, a in _turns(training)}
    left_out = {(plain(f.question(f.held_out_phrasing)), f.statement) for f in tiny_facts.FACTS}
    assert len(asked) > 3000 and not asked & left_out


def test_no_held_out_hero_is_in_the_training_lines(training):
    names = "|".join(tiny_stories.SHE + tiny_stories.HE)
    heroes = re.compile(rf"\b({'|'.join(tiny_stories.HEROES)}) named ({names})\b")
    found = [tiny_stories.Hero(*pair) for line in training for text in _texts(line) for pair in heroes.findall(text)]
    assert len(found) > 300 and not [h for h in found if held_out(h.case)]


def test_held_out_lines_are_of_the_other_side():
    lines = [line for _, line in itertools.islice(tiny_data.documents(0, held=True), 300)]
    answers = [a["content"] for _, a in _turns(lines) if re.fullmatch(r"\d+ [+-] \d+ = -?\d+", a["content"])]
    assert len(answers) > 100 and all(_problems(text)[0].held_out for text in answers)


def test_facts_have_one_answer_and_several_phrasings():
    statements: dict[str, set] = {}
    for f in tiny_facts.FACTS:
        assert f.statement.endswith(f"{f.answer}.")
        for phrasing in f.relation.phrasings:
            statements.setdefault(f.question(phrasing), set()).add(f.statement)
    assert len(tiny_facts.FACTS) >= 300
    assert [q for q, answers in statements.items() if len(answers) > 1] == []
    for relation in tiny_facts.RELATIONS:
        facts = [f for f in tiny_facts.FACTS if f.relation is relation]
        for phrasing in relation.phrasings:  # whoever meets it for the first time in the benchmark has seen it elsewhere
            assert any(f.held_out_phrasing != phrasing for f in facts)


def test_working_ends_in_the_right_result_and_its_steps_are_true():
    for a, b in itertools.product(range(100), repeat=2):
        for p in (Problem(a, "+", b), Problem(a, "-", b)):
            text = tiny_arithmetic.working(p)
            assert text.endswith(f"Result: {p.value}")
            for step in re.findall(r": ([\d +-]+) = (\d+)[,.]", text):
                assert tiny_tools.evaluate(step[0]) == int(step[1])
    assert tiny_arithmetic.working(Problem(37, "+", 58)) == (
        "Ones: 7 + 8 = 15, write 5, carry 1.\nTens: 3 + 5 + 1 = 9.\nResult: 95"
    )


def test_tool_results_are_the_value_of_the_call_and_the_answer_uses_them():
    rng = random.Random(0)
    for _ in range(300):
        question, call, result, answer = tiny_tools.calculation(rng, held=False, name="calculate")
        expression = json.loads(call["tool_calls"][0]["function"]["arguments"])["expression"]
        assert str(tiny_tools.evaluate(expression)) == result["content"]
        assert tiny_skills.last_number(answer["content"]) == int(result["content"])
        assert re.findall(r"\d+", question["content"])


def test_every_line_renders_and_the_thinking_ones_think(training):
    template = ChatTemplate.from_directory(tiny_data.TINY)
    thinking = 0
    for line in training[:600]:
        if "text" in line:
            assert line["text"].strip() == line["text"] != ""
            continue
        text = template.render(line["messages"], tools=line.get("tools"), add_generation_prompt=False)
        prompt = template.render(line["messages"][:-1], tools=line.get("tools"), enable_thinking=thinks(line))
        assert text.startswith(prompt) and text.endswith("<|im_end|>\n")
        thinking += thinks(line)
    assert 60 < thinking < 300


def thinks(line: dict) -> bool:
    return "reasoning_content" in line["messages"][-1]


def test_the_command_writes_the_same_bytes_every_time(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["tiny_data", "--out", str(tmp_path / name), "--size", "200"])
        tiny_data.main()
    for file in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert len((tmp_path / "one" / "train.jsonl").read_text("utf-8").splitlines()) == 200
    assert len((tmp_path / "one" / "eval.jsonl").read_text("utf-8").splitlines()) == tiny_data.EVAL_LINES
    assert "arithmetic" in capsys.readouterr().out


@pytest.mark.parametrize(
    "expression, value",
    [("12 + 34 * 5", 182), ("(12 + 34) * 5", 230), ("120 / 5", 24), ("1 / 4", 0.25), ("-3 - -4", 1), ("345*67", 23115)],
)
def test_expressions_are_evaluated(expression, value):
    assert tiny_tools.evaluate(expression) == value


@pytest.mark.parametrize("text", ["", "2 ** 9", "abs(1)", "1 / 0", "x", "1.5 + 1", "True + 1", "1 +", "9 * " * 30 + "9", "\0"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError):
        tiny_tools.evaluate(text)


GOOD_CALL = "<tool_call>\n<function=calculate>\n<parameter=expression>\n345 * 67\n</parameter>\n</function>\n</tool_call>"


def test_calls_are_judged_by_form_and_value():
    assert tiny_skills.parse_call(GOOD_CALL) == ("calculate", {"expression": "345 * 67"})
    assert tiny_skills.right_calculation(GOOD_CALL, 23115)
    assert tiny_skills.right_calculation(GOOD_CALL.replace("345 * 67", "67 * 345"), 23115)
    wrong = (
        None,
        "23115",
        GOOD_CALL.replace("345", "344"),
        GOOD_CALL.replace("345 * 67", "what"),
        GOOD_CALL.replace("calculate", "compute"),
        GOOD_CALL.replace("=expression", "=text"),
        GOOD_CALL.replace("</function>\n", ""),
        GOOD_CALL + GOOD_CALL,
    )
    assert not any(tiny_skills.right_calculation(text, 23115) for text in wrong)


def test_the_use_of_a_result_is_judged():
    case = tiny_skills.Case(tiny_skills.ask("What is 345 * 67?"), lambda text: True, "23115")
    follow_up = tiny_skills.with_result(case, GOOD_CALL)
    assert [m["role"] for m in follow_up.messages] == ["user", "assistant", "tool"]
    assert follow_up.right("The answer is 23115.")
    assert not follow_up.right("The answer is 23116.") and not follow_up.right(None)


def test_answers_in_numbers_are_judged():
    direct = tiny_skills.arithmetic_case(Problem(37, "-", 58), "", False)
    assert direct.right("37 - 58 = -21") and direct.right("-21") and direct.right("The answer is -21.")
    assert not any(direct.right(text) for text in ("37 - 58 = 21", "", None, "-21 or 5", "<think>\n</think>\n-21"))
    thinking = tiny_skills.arithmetic_case(Problem(37, "+", 58), "", True)
    assert thinking.right("Ones: 15\n</think>\n\n37 + 58 = 95")
    assert not any(thinking.right(text) for text in ("37 + 58 = 95", "</think>\n\n95", "95\n</think>\n\n37 + 58 = 94"))


def test_facts_are_judged_by_their_last_words():
    assert tiny_skills.ends_with("The capital of India is New Delhi.", "New Delhi")
    assert tiny_skills.ends_with("new delhi", "New Delhi")
    assert not tiny_skills.ends_with("The day after Tuesday is Wednesday.", "Tuesday")
    assert not tiny_skills.ends_with("", "Tuesday") and not tiny_skills.ends_with("Delhi", "New Delhi")


def test_stories_of_the_data_are_coherent_and_spoilt_ones_are_not():
    rng = random.Random(0)
    for _ in range(500):
        hero = tiny_stories.hero(rng)
        assert tiny_skills.story_faults(tiny_stories.story(rng, hero), hero) == []
    text, other = tiny_stories.story(rng, hero), "Ben" if hero.name != "Ben" else "Tom"
    first, rest = text.split(". ", 1)
    spoilt = (
        "",
        "Hello.",
        rest,
        text.replace(hero.name, other),
        f"{text} {first}.",
        text[:-1],
        f"{text} Ben met Rosa, Tom and Ida.",
    )
    assert all(tiny_skills.story_faults(t, hero) for t in spoilt)


def test_the_data_s_own_answers_score_in_full_and_noise_scores_nothing():
    for name, target, make, thinking in tiny_skills.PLAIN_SKILLS:
        cases = tiny_skills.distinct(make, name, 20)
        assert len(cases) == 20 and target <= 100
        if name != "story":
            said = [(f"So it is.\n</think>\n\n{case.expected}" if thinking else case.expected, True) for case in cases]
            assert tiny_skills.score(name, target, cases, said).percent == 100
            assert tiny_skills.score(name, target, cases, [(text, False) for text, _ in said]).right == 0
        assert tiny_skills.score(name, target, cases, [("noise", True)] * 20).right == 0


def test_no_choice_of_tool_is_right_for_noise():
    cases = tiny_skills.distinct(tiny_skills.choice, "tool choice", 30)
    assert len(cases) == 30 and not any(case.right("noise") or case.right(None) for case in cases)
