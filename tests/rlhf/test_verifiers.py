"""Verifiable rewards: what counts as the answer, what as the format, and every IFEval instruction both ways."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from dschat.rlhf import reading, rewards
from dschat.rlhf import verifiers as V

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "tests" / "data" / "verifiable"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text().splitlines()]


def call(fn, completions, **columns):
    return fn(prompts=["p"] * len(completions), completions=completions, **columns)


@pytest.mark.parametrize(
    ("text", "lenient", "strict"),
    [
        ("3 + 4 = 7", 7, None),
        ("#### 1,234", 1234, 1234),
        ("So #### 5\nand 6 more", 6, 5),
        ("The answer is $12.50.", Decimal("12.5"), Decimal("12.5")),
        ("the answer is: **-3**", -3, -3),
        (r"thus \boxed{42} apples of 50", 50, 42),
        (r"\boxed{\$18}", 18, 18),
        ("2024-05", 5, None),  # a minus needs no number before it: this is no -5
        ("10%", 10, None),
        ("no number", None, None),
        ("", None, None),
        ("x2 and v1.5b", None, None),
        (".5 of it", Decimal("0.5"), None),
        ("1,23 is two numbers", 23, None),
        ("it is 7.", 7, None),
    ],
)
def test_which_number_is_the_answer(text, lenient, strict):
    found = V.last_number(text)
    assert found == lenient or (found is not None and lenient is not None and abs(found) == abs(lenient))
    assert V.last_number(text, marked=True) == strict


def test_gsm8k_rows():
    """The worked solutions score 1, the same with another number 0, whatever stands around the number."""
    for row in rows("gsm8k"):
        a = row["answer"]
        good = [row["solution"], f"#### {a}", f"The answer is ${int(a):,}.00", f"That makes {a}."]
        assert call(V.number, good, answer=[a] * 4) == [1.0] * 4
        assert call(V.marked_number, good, answer=[a] * 4)[1:] == [1.0, 1.0, 0.0]
        bad = [f"#### {int(a) + 1}", f"{a} apples and 3 more", "I do not know", ""]
        assert call(V.number, bad, answer=[a] * 4) == [0.0] * 4 or a == "3"


def test_svamp_rows_through_the_reward_of_a_run():
    """As PPO calls it: by name, with the columns of the recipe's data."""
    records, _ = reading.read([str(ROOT / "recipes/data/svamp/test.jsonl.gz")], 20)
    fn = rewards.load_function("dschat.rlhf.verifiers:number")
    columns = {"answer": [r.columns["answer"] for r in records], "type": [r.columns["type"] for r in records]}
    for shift in (0, 1):
        texts = [f"It is {Decimal(a) + shift} in all." for a in columns["answer"]]
        scores = rewards.call_function(fn, ["p"] * 20, texts, columns)
        assert scores.tolist() == [1.0 - shift] * 20


def test_conversations_score_as_their_texts():
    """Every ready-made function gives a conversation what it gives the text of its last message."""
    texts = ["<think>a</think><answer>7</answer>", "#### 7", "The answer is 8.", ""]
    chats = [[{"role": "assistant", "content": t}] for t in texts]
    names = [["punctuation:no_comma", "length_constraints:number_words"]] * 4
    given = [[{}, {"num_words": 2, "relation": "at least"}]] * 4
    columns = {"answer": ["7"] * 4, "instruction_id_list": names, "kwargs": given}
    functions = ["number", "marked_number", "text", "marked", "think_tags", "ifeval", "ifeval_all"]
    for name in functions:
        fn = getattr(V, name)
        assert call(fn, chats, **columns) == call(fn, texts, **columns), name
        through = rewards.call_function(fn, [[{"role": "user", "content": "?"}]] * 4, texts, columns)
        assert through.tolist() == call(fn, texts, **columns), name


def test_rows_without_the_column_say_nothing():
    assert call(V.number, ["1"]) == call(V.text, ["1"]) == call(V.ifeval, ["1"]) == [None]
    assert call(V.number, ["1", "2"], answer=[None, "2"]) == [None, 1.0]
    assert call(V.number, ["x"], answer=["not a number"]) == [None]


def test_texts_and_formats():
    assert call(V.text, ["The  cat, sat!", "cats"], answer=["a cat sat", "cat"]) == [1.0, 0.0]
    assert call(V.marked, ["a\n#### 3", "#### 3.", "#### 3 or #### 4", "3", "#### 3 apples"]) == [
        1,
        1,
        0,
        0,
        0,
    ]
    good = "<think>a\nb</think>\n<answer>3</answer>"
    bad = [good + "x", "<answer>3</answer>", good * 2, good.replace("think", "thing"), ""]
    assert call(V.think_tags, [good, f" {good}\n", *bad]) == [1.0, 1.0, *[0.0] * 5]


EXAMPLES = {  # instruction: (settings, followed, not followed)
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2}, "AN old MAN", "AN old Man"),
    "change_case:english_capital": ({}, "HELLO 5!", "HELLo"),
    "change_case:english_lowercase": ({}, "hello 5!", "Hello"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "say HI. Hi!", "Hi! Say hi."),
    "combination:two_responses": ({}, "One.\n******\nTwo.", "One.\n******\nOne."),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] and [b c]", "[a] and []"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "x\nP.P.S. y", "x\nP.S. y"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "x\n* a\n* b", "* a\n* b\n* c"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a b* and **c**", "*a* and **"),
    "detectable_format:title": ({}, "<<A title>>\nx", "<< >>\nx"),
    "keywords:existence": ({"keywords": ["mom", "dad"]}, "Mom and DAD", "mom"),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "category", "The Cat."),
    "keywords:frequency": ({"relation": "less than", "keyword": "war", "frequency": 2}, "war", "war WAR"),
    "keywords:letter_frequency": ({"let_relation": "at least", "letter": "o", "let_frequency": 3}, "ooO", "oo"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "a b\n\n\"So it is", "so\n\nit is"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "length_constraints:number_sentences": (
        {"relation": "less than", "num_sentences": 3}, "Mr. X ran 1.5 km. He won!", "A b. C d? E f."),
    "length_constraints:number_words": ({"relation": "at least", "num_words": 3}, "one two three", "one two"),
    "punctuation:no_comma": ({}, "a b", "a, b"),
    "startend:end_checker": ({"end_phrase": "Bye."}, 'x "bye."', "Bye. x"),
    "startend:quotation": ({}, '"all of it"', '"part" of it'),
}  # fmt: skip


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_instructions(name):
    settings, good, bad = EXAMPLES[name]
    assert V.followed(good, [name], [settings]) == [True]
    assert V.followed(bad, [name], [settings]) == [False]
    assert V.followed("  ", [name], [settings]) == [False], "an empty answer follows nothing"


def test_every_instruction_of_the_data_is_known():
    assert set(EXAMPLES) == set(V.INSTRUCTIONS)
    names = {n for row in rows("ifeval") for n in row["instruction_id_list"]}
    assert names - set(V.INSTRUCTIONS) == {"language:response_language"}
    for row in rows("ifeval"):
        found = V.followed("word " * 50, row["instruction_id_list"], row["kwargs"])
        assert len(found) == len(row["instruction_id_list"]), "every row's settings fit its instructions"


def test_ifeval_scores():
    names = [["punctuation:no_comma", "change_case:english_lowercase", "language:response_language"]] * 2
    kwargs = [[{}, {"unused": None}, {"language": "kn"}]] * 2
    columns = {"instruction_id_list": names, "kwargs": kwargs}
    assert call(V.ifeval, ["Hello", "hello"], **columns) == [0.5, 1.0]
    assert call(V.ifeval_all, ["Hello", "hello"], **columns) == [0.0, 1.0]
    assert call(V.ifeval, ["x"], instruction_id_list=[["language:response_language"]], kwargs=[[{}]]) == [
        None
    ]


def test_names_in_the_docstring_are_the_functions():
    named = [
        line.split()[0] for line in V.__doc__.splitlines() if line.startswith("    ") and "  " in line.strip()
    ]
    assert named == ["number", "marked_number", "text", "marked", "think_tags", "ifeval", "ifeval_all"]
    assert all(callable(rewards.load_function(f"dschat.rlhf.verifiers:{name}")) for name in named)
