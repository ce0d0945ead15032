"""From columns to token ids: prompts, answers, conversations, and the chat template.

Columns: `prompt` is a text, or a list of chat messages {role, content}; `chosen`, `rejected`, `completion`,
`response` are texts, or messages, which may begin with the prompt's; `messages` is a whole conversation whose last
message is the response. Of an answer of several messages the assistant's are learnt. Texts are taken literally;
messages go through the tokenizer's chat template. All other columns are kept and reach reward functions by name.

Pairs without a prompt share one: the messages, or the text, that chosen and rejected both begin with. A prompt that
is a text beside whole conversations is read out of them, in the same way.

A completion ends with the token that ends a turn, so that stopping is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import token_cache
from .reading import DataError

Message = Mapping[str, str]
PromptText = str | list[dict[str, str]]
Answer = str | list[dict[str, str]]
"""A text, or the messages of several turns, of which the first and the last are the assistant's."""
MARKER = "dschat-marker"  # stands for an assistant's words, to see what a chat template puts behind them


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        raise DataError(f"{name} is the text {shown(value)}, but it must be a list of messages")
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{name} is {shown(value)}, which is neither a text nor a list of messages")
    for message in value:
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise DataError(
                f"{name} holds {shown(message)}, which is no message with the texts role and content"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def answer_text(value: Any, name: str) -> str:
    """The text of a completion column: itself, or the content of its last message."""
    if isinstance(value, str):
        return value
    return _messages(value, name)[-1]["content"]


def prompt_of(columns: Mapping[str, Any], answer: str | None = None) -> PromptText:
    """The prompt of a row: its prompt column, or what precedes the assistant's last message in the `answer` or
    messages column; all of it where the assistant has yet to speak.
    """
    value = columns.get("prompt")
    if isinstance(value, str):
        if not value:
            raise DataError("prompt is empty")
        return value
    have = [name for name in columns if columns[name] is not None]
    if "prompt" in have:
        return _messages(value, "prompt")
    sources = [
        n for n in (answer, "messages") if n in have and (n != answer or not isinstance(columns[n], str))
    ]
    if not sources:
        raise DataError(
            f"there is neither a prompt nor a messages column, but {', '.join(have) or 'nothing'}; add a prompt"
        )
    conversation = _messages(columns[str(sources[0])], str(sources[0]))
    if conversation[-1]["role"] != "assistant":
        return conversation
    if len(conversation) < 2:
        raise DataError(f"{sources[0]} holds a single message, so there is no prompt before it; add a prompt")
    return conversation[:-1]


def _turns(value: Any, name: str) -> list[dict[str, str]]:
    """Messages that end with an answer."""
    turns = _messages(value, name)
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"{name} ends with a message of {turns[-1]['role']!r}, so it has no answer; end with one of the assistant"
        )
    return turns


def _is_whole(prompt: Any, turns: Sequence[Message]) -> bool:
    """Whether messages hold the prompt too, because the row has none or only the text of one."""
    return prompt is None or (isinstance(prompt, str) and turns[0]["role"] != "assistant")


def _behind(prompt: PromptText, turns: list[dict[str, str]], name: str) -> Answer:
    """The answer to a prompt that messages, which may begin with it, give."""
    n = len(prompt)
    answer = turns[n:] if len(turns) > n and turns[:n] == prompt else turns
    if answer[0]["role"] != "assistant":
        raise DataError(
            f"{name} does not go on from the prompt but begins with another message of {answer[0]['role']!r}; begin it "
            "with the prompt's messages or with one of the assistant"
        )
    return answer[0]["content"] if len(answer) == 1 else answer


def answered(columns: Mapping[str, Any], name: str) -> tuple[PromptText, Answer]:
    """Prompt and answer of a row whose answer is in column `name`."""
    value = columns[name]
    if isinstance(value, str):
        return prompt_of(columns), value
    turns = _turns(value, name)
    whole = _is_whole(columns.get("prompt"), turns)
    prompt = prompt_of({name: turns}, name) if whole else prompt_of(columns)
    return prompt, _behind(prompt, turns, name)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many of the first items of both are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pair_of(columns: Mapping[str, Any]) -> tuple[PromptText, Answer, Answer]:
    """Prompt, chosen and rejected of a row; without a prompt it is what the two share at their beginning."""
    chosen, rejected, prompt = columns["chosen"], columns["rejected"], columns.get("prompt")
    if chosen == rejected:
        raise DataError("chosen and rejected are equal, so nothing can be learnt from them")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None or columns.get("messages") is not None:
            return prompt_of(columns), chosen, rejected
        # As in TRL: the space before the first words that differ is theirs.
        shared = chosen[: _common(chosen, rejected)].removesuffix(" ")
        if not shared:
            raise DataError(
                "there is neither a prompt nor a messages column, and chosen and rejected share no beginning; add a "
                "prompt"
            )
        return shared, chosen[len(shared) :], rejected[len(shared) :]
    if isinstance(chosen, str) or isinstance(rejected, str):
        return prompt_of(columns), *(
            v if isinstance(v, str) else _behind(prompt_of(columns), _turns(v, name), name)
            for name, v in (("chosen", chosen), ("rejected", rejected))
        )  # type: ignore[return-value]
    both = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    given: PromptText
    if _is_whole(prompt, both[0]):
        n = min(_common(*both), *(len(turns) - 1 for turns in both))
        if not n or any(turns[n]["role"] != "assistant" for turns in both):
            raise DataError(
                "chosen and rejected answer differing prompts; let both begin with the same messages, up to the "
                "assistant's where they part"
            )
        given = both[0][:n]
    else:
        given = prompt_of(columns)
    answers = _behind(given, both[0], "chosen"), _behind(given, both[1], "rejected")
    return given, *answers


class Encoder:
    """Token ids of prompts and completions for one tokenizer.

    system_prompt: put before conversations that have no system message; None leaves it to the template.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None, name: str = "the tokenizer") -> None:
        self.tokenizer, self.system_prompt, self.name = tokenizer, system_prompt, name
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{name} has no EOS token, so no end of an answer could be learnt; set tokenizer.eos_token"
            )
        self.eos_id = int(tokenizer.eos_token_id)
        # Any id does for padding, because nothing here looks at it; masks say what is real.
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id)
        self.end_id = self._end_of_turn() if tokenizer.chat_template else self.eos_id

    def _end_of_turn(self) -> int:
        """The token with which the chat template ends an assistant's turn (Llama 3: <|eot_id|>, not EOS)."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARKER}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{self.name} has a chat template that fails on a question and its answer: {reason}; mend "
                "tokenizer.chat_template, or set it to None for plain texts"
            ) from error
        if MARKER not in text:
            raise DataError(
                f"{self.name} has a chat template that leaves out what the assistant says, so no end of a turn can "
                "be found; mend tokenizer.chat_template, or set it to None for plain texts"
            )
        after = self.tokenizer(text[text.rfind(MARKER) + len(MARKER) :], add_special_tokens=False)[
            "input_ids"
        ]
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        return int(after[0]) if after and after[0] in special else self.eos_id

    def settings(self) -> dict[str, Any]:
        """What decides the ids that come out, as plain values."""
        return {"tokenizer": token_cache.fingerprint(self.tokenizer), "system_prompt": self.system_prompt}

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which an answer ends: the end of a turn and EOS."""
        return sorted({self.end_id, self.eos_id})

    def prompt(self, prompt: PromptText) -> list[int]:
        """Ids of a text (with the tokenizer's own BOS rule) or of messages up to where the assistant
        speaks.
        """
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
            return ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_id else ids
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.name} has no chat template, which messages need; use texts as prompts")
        if self.system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self.system_prompt}, *prompt]
        try:
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise DataError(f"the chat template refuses the prompt: {str(error).splitlines()[0]}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def completion(self, text: str) -> list[int]:
        """Ids of an answer, the token that ends the turn included."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def answer(self, said: Answer) -> list[int]:
        """Ids of an answer, the tokens that end its turns included; ~id where others speak, which is not learnt."""
        if isinstance(said, str):
            return self.completion(said)
        ids: list[int] = []
        others: list[Message] = []
        for message in said:
            if message["role"] != "assistant":
                others.append(message)
                continue
            if ids:
                ids += [~i for i in self._between(others, "answer", ended=True)]
            ids += self.completion(message["content"])
            others = []
        return ids

    def observation(self, said: str | Message, chat: bool, ended: bool) -> list[int]:
        """Ids of what an environment answers, up to where the policy speaks again.

        In a chat: the message (a text is the user's) as the template puts it behind an assistant's turn, whose end
        is added where the turn did not end by itself. In plain text: the text as it is.
        """
        if not chat:
            if not isinstance(said, str):
                raise DataError(
                    f"the observation is {shown(said)}, but the prompt is a text; answer with a text"
                )
            return list(self.tokenizer(said, add_special_tokens=False)["input_ids"])
        message = (
            {"role": "user", "content": said}
            if isinstance(said, str)
            else _messages([said], "observation")[0]
        )
        return self._between([message], "observation", ended)

    def _between(self, messages: Sequence[Message], what: str, ended: bool) -> list[int]:
        """Ids from the end of an assistant's turn, without the token that ends it where it has `ended`, through the
        messages of others up to the next turn."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARKER}, *messages]
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.name} has no chat template, which messages need; use texts")
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise DataError(f"the chat template refuses the {what}: {str(error).splitlines()[0]}") from None
        ids = self.tokenizer(text[text.rfind(MARKER) + len(MARKER) :], add_special_tokens=False)["input_ids"]
        return list(ids[1:] if ended and ids and ids[0] == self.end_id else ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
