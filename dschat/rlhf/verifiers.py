"""Rewards that a program can check, ready to be named in a config:

    reward: [dschat.rlhf.verifiers:number]

    number           1 where the answer's last number is that of the column `answer` (GSM8K, SVAMP), else 0
    marked_number    the same, but only a marked number counts: after ####, in \\boxed{} or after "answer is"
    text             1 where the answer is the text of the column `answer`, apart from case, articles and punctuation
    marked           1 where the answer has exactly one marked number, at its end: a format, whatever the number
    think_tags       1 where the answer is <think>...</think><answer>...</answer> and nothing else
    ifeval           share of the instructions (columns `instruction_id_list`, `kwargs`) that the answer follows
    ifeval_all       1 where it follows all of them, else 0

All are called as every reward function is (dschat.rlhf.rewards), with texts or with conversations; a row without the
columns scores None. The
instructions are those of IFEval (Zhou et al. 2023), checked here by their description; the language of an
answer is not recognised, so `language:response_language` counts neither way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

Score = list[float | None]

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])({NUMBER})")
_MARKED = re.compile(
    rf"####\s*\$?\s*({NUMBER})|\\boxed\{{\s*\\?\$?\s*({NUMBER})[^}}]*\}}|answer is:?\s*\**\$?\s*({NUMBER})",
    re.IGNORECASE,
)


# ----------------------------------------------------------------------------------------------- exact answers


def parse_number(text: Any) -> Decimal | None:
    """The number that a text is: 1,234.50 and $7 and 12% as people write them; None for anything else."""
    try:
        value = Decimal(re.sub(r"[,\s$%€£]", "", str(text)))
        return value if value.is_finite() else None
    except InvalidOperation:
        return None


def last_number(text: str, marked: bool = False) -> Decimal | None:
    """The last number in a text, or the last marked one."""
    found = (
        [next(g for g in groups if g) for groups in _MARKED.findall(text)]
        if marked
        else _NUMBER.findall(text)
    )
    return parse_number(found[-1]) if found else None


def texts(completions: Sequence[Any]) -> list[str]:
    """Completions as texts: themselves, or the content of their last message."""
    return [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]


def _numbers(completions: Sequence[Any], answers: Sequence[Any], marked: bool) -> Score:
    out: Score = []
    for completion, answer in zip(texts(completions), answers, strict=True):
        wanted = parse_number(answer) if answer is not None else None
        out.append(None if wanted is None else float(last_number(completion, marked) == wanted))
    return out


def number(prompts: Sequence[Any], completions: Sequence[Any], answer: Any = None, **columns: Any) -> Score:
    """1 where the last number of the completion equals the answer exactly (12.50 = 12.5), else 0."""
    return _numbers(completions, _column(answer, completions), marked=False)


def marked_number(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Any = None, **columns: Any
) -> Score:
    """1 where the last *marked* number equals the answer, else 0."""
    return _numbers(completions, _column(answer, completions), marked=True)


def text(prompts: Sequence[Any], completions: Sequence[Any], answer: Any = None, **columns: Any) -> Score:
    """1 where completion and answer are the same words, else 0."""
    pairs = zip(texts(completions), _column(answer, completions), strict=True)
    return [None if a is None else float(_words(c) == _words(str(a))) for c, a in pairs]


def _words(value: str) -> list[str]:
    return [w for w in re.findall(r"\w+", value.lower()) if w not in ("a", "an", "the")]


def _column(values: Any, completions: Sequence[Any]) -> Sequence[Any]:
    """A column of the data, or one None a completion where there is none."""
    return [None] * len(completions) if values is None else values


# ------------------------------------------------------------------------------------------------------ formats


def marked(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Score:
    """1 where exactly one number is marked and nothing but punctuation follows it, else 0."""
    out: Score = []
    for completion in texts(completions):
        found = list(_MARKED.finditer(completion))
        out.append(float(len(found) == 1 and not re.search(r"\w", completion[found[0].end() :])))
    return out


def think_tags(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Score:
    """1 where the completion is one thought and one answer, each in its tags, in this order, else 0."""
    pattern = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
    out: Score = []
    for completion in texts(completions):
        match = pattern.fullmatch(completion)
        nested = match and any(re.search(r"</?(think|answer)>", part) for part in match.groups())
        out.append(float(bool(match) and not nested))
    return out


# ------------------------------------------------------------------------------------------------------- IFEval


def ifeval(
    prompts: Sequence[Any], completions: Sequence[Any], instruction_id_list: Any = None, kwargs: Any = None,
    **columns: Any,
) -> Score:  # fmt: skip
    """Share of the row's instructions that the completion follows."""
    out: Score = []
    rows = zip(
        texts(completions),
        _column(instruction_id_list, completions),
        _column(kwargs, completions),
        strict=True,
    )
    for completion, names, settings in rows:
        found = [] if names is None else followed(completion, names, settings or [{}] * len(names))
        judged = [x for x in found if x is not None]
        out.append(sum(judged) / len(judged) if judged else None)
    return out


def ifeval_all(
    prompts: Sequence[Any], completions: Sequence[Any], instruction_id_list: Any = None, kwargs: Any = None,
    **columns: Any,
) -> Score:  # fmt: skip
    """1 where the completion follows all of the row's instructions, else 0."""
    shares = ifeval(prompts, completions, instruction_id_list, kwargs)
    return [None if s is None else float(s == 1) for s in shares]


def followed(
    completion: str, names: Sequence[str], settings: Sequence[Mapping[str, Any]]
) -> list[bool | None]:
    """Whether each instruction is followed; None for one that is not known here."""
    out: list[bool | None] = []
    for name, given in zip(names, settings, strict=True):
        check = INSTRUCTIONS.get(name)
        # Columns that went through a table have every key of every row, with None where a row lacks it.
        known = {k: v for k, v in (given or {}).items() if v is not None}
        out.append(None if check is None else bool(completion.strip()) and bool(check(completion, **known)))
    return out


def _compare(count: int, limit: int, relation: str) -> bool:
    return count < limit if relation == "less than" else count >= limit


def _paragraphs(answer: str, divider: str) -> list[str]:
    return [p for p in re.split(divider, answer) if p.strip()]


def _count_word(answer: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE))


def _sentences(answer: str) -> int:
    """Sentences as people count them: ends of . ! ? before a space and a new start, abbreviations apart."""
    plain = re.sub(r"\b(Mr|Mrs|Ms|Dr|Prof|St|e\.g|i\.e|etc|vs|U\.S)\.", lambda m: m.group(0)[:-1], answer)
    return len([s for s in re.split(r"(?<=[.!?])[\"'”’)*]*\s+|\n{2,}", plain) if re.search(r"\w", s)])


def _is_json(answer: str) -> bool:
    body = re.sub(r"^```(?:json)?\s*|\s*```$", "", answer.strip(), flags=re.IGNORECASE)
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def _cased(answer: str, upper: bool) -> bool:
    letters = [c for c in answer if c.isalpha()]
    return bool(letters) and (answer == (answer.upper() if upper else answer.lower()))


def _first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = _paragraphs(answer, r"\n\n+")
    if len(parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    match = re.search(r"[\w'-]+", parts[nth_paragraph - 1])
    return bool(match) and match.group(0).lower() == first_word.lower()  # type: ignore[union-attr]


def _two_responses(answer: str) -> bool:
    parts = [p.strip() for p in answer.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _postscript(answer: str, postscript_marker: str = "P.S.") -> bool:
    letters = [c for c in postscript_marker.lower() if c.isalpha()]
    return bool(re.search(r"(?:^|\s)" + r"\.?\s?".join(letters) + r"\b", answer, re.IGNORECASE))


def _highlights(answer: str) -> int:
    return len(re.findall(r"\*\*[^\n*]*[^\s*][^\n*]*\*\*|(?<!\*)\*[^\n*]*[^\s*][^\n*]*\*(?!\*)", answer))


INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "change_case:capital_word_frequency": lambda a, capital_frequency, capital_relation: _compare(
        sum(w.isupper() for w in re.findall(r"[^\W\d_][\w'-]*", a)), capital_frequency, capital_relation
    ),
    "change_case:english_capital": lambda a: _cased(a, True),
    "change_case:english_lowercase": lambda a: _cased(a, False),
    "combination:repeat_prompt": lambda a, prompt_to_repeat: a.strip().lower().startswith(
        prompt_to_repeat.strip().lower()
    ),
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": lambda a, num_placeholders: (
        len(re.findall(r"\[[^\[\]]+\]", a)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda a: any(
        f"My answer is {x}." in a for x in ("yes", "no", "maybe")
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": lambda a, section_spliter, num_sections: (
        len(re.findall(rf"(?:^|\s){re.escape(section_spliter.strip())}\s?\d+", a)) >= num_sections
    ),
    "detectable_format:number_bullet_lists": lambda a, num_bullets: (
        len(re.findall(r"^\s*(?:\*(?!\*)|-)\s*\S", a, re.MULTILINE)) == num_bullets
    ),
    "detectable_format:number_highlighted_sections": lambda a, num_highlights: _highlights(a) >= num_highlights,
    "detectable_format:title": lambda a: re.search(r"<<[^\n<>]*[^\s<>][^\n<>]*>>", a),
    "keywords:existence": lambda a, keywords: all(re.search(re.escape(k), a, re.IGNORECASE) for k in keywords),
    "keywords:forbidden_words": lambda a, forbidden_words: not any(_count_word(a, w) for w in forbidden_words),
    "keywords:frequency": lambda a, keyword, frequency, relation: _compare(
        len(re.findall(re.escape(keyword), a, re.IGNORECASE)), frequency, relation
    ),
    "keywords:letter_frequency": lambda a, letter, let_frequency, let_relation: _compare(
        a.lower().count(letter.lower()), let_frequency, let_relation
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": lambda a, num_paragraphs: (
        len(_paragraphs(a, r"\s?\*\*\*\s?")) == num_paragraphs
    ),
    "length_constraints:number_sentences": lambda a, num_sentences, relation: _compare(
        _sentences(a), num_sentences, relation
    ),
    "length_constraints:number_words": lambda a, num_words, relation: _compare(
        len(re.findall(r"\w+", a)), num_words, relation
    ),
    "punctuation:no_comma": lambda a: "," not in a,
    "startend:end_checker": lambda a, end_phrase: a.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": lambda a: len(a.strip()) > 1 and a.strip()[0] == a.strip()[-1] == '"',
}  # fmt: skip
