"""Talk to a model in the terminal, words appearing as they are drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from .config import ChatConfig
from .engine import HybridEngine, SamplingConfig
from .rlhf import batching, conversations

HELP = "/new starts over, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"


class TextStream:
    """Turns tokens into text as they come. A character whose bytes are not all there yet waits for the next
    token.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], Any]) -> None:
        self.decode, self.write = decode, write
        self.tokens: list[int] = []
        self.shown = 0

    def on_token(self, _row: int, token: int) -> None:
        self.tokens.append(token)
        text = self.decode(self.tokens)
        if not text.endswith("\ufffd"):
            self._show(text)

    def close(self) -> str:
        """Write what waits; returns the whole text."""
        text = self.decode(self.tokens)
        self._show(text)
        return text

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.write(text[self.shown :])
            self.shown = len(text)


def chat(
    config: ChatConfig,
    model: Any,
    tokenizer: Any,
    *,
    source: TextIO | None = None,
    target: TextIO | None = None,
) -> None:
    """Read lines from `source`, write answers to `target`, until the end of input or /quit.

    A tokenizer without a chat template gets the lines as they are: each is a text to go on with.
    """
    source, target = source or sys.stdin, target or sys.stdout
    encoder = conversations.Encoder(tokenizer, config.system_prompt, config.model)
    engine = HybridEngine(
        model, backend=config.backend, rollout_weights=config.weights, kv_cache=config.kv_cache
    )
    templated = bool(tokenizer.chat_template)

    def write(text: str) -> None:
        target.write(text)
        target.flush()

    write(
        f"{config.model}: {HELP}"
        + ("" if templated else "; no chat template, so it goes on with your text")
        + "\n"
    )
    history: list[dict[str, str]] = []
    turn = 0
    while True:
        write("> ")
        line = source.readline()
        if not line or line.strip() == "/quit":
            write("\n")
            return
        line = line.strip()
        if line == "/new":
            history = []
            write("(a new conversation)\n")
            continue
        if not line or line == "/help":
            write(HELP + "\n")
            continue
        history.append({"role": "user", "content": line})
        ids = encoder.prompt(history if templated else line)
        room = engine.spec.context - config.max_new_tokens
        while templated and len(ids) > room and len(history) > 2:
            del history[:2]  # the oldest question and answer make room
            ids = encoder.prompt(history)
        stream = TextStream(encoder.decode, write)
        turn += 1
        sampling = SamplingConfig(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed + turn,
            eos_token_id=encoder.stop_ids,
            pad_token_id=encoder.pad_id,
        )
        tokens, mask = batching.pad([ids], encoder.pad_id, "left")
        try:
            engine.generate(tokens, mask, sampling, on_token=stream.on_token)
        except KeyboardInterrupt:
            write(" (stopped)")
        history.append({"role": "assistant", "content": stream.close()})
        write("\n")
