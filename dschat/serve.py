"""A model behind OpenAI's HTTP interface: /v1/completions, /v1/chat/completions (both with streaming), /v1/models.

Requests that wait while the engine generates are answered together in its next batch, if they ask for the same
sampling. A row's tokens depend only on weights, prompt, sampling and seed, so sharing a batch changes no answer.
There is no authentication: it listens on this machine alone unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .chat import TextStream
from .config import ConfigError, ServeConfig
from .engine import HybridEngine, SamplingConfig
from .rlhf import batching, conversations

# Fields of OpenAI's interface that would change an answer and are not here; a value that changes nothing passes.
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "echo": (None, False), "frequency_penalty": (None, 0), "function_call": (None,),
    "functions": (None, []), "logit_bias": (None, {}), "logprobs": (None, False), "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}), "suffix": (None, ""), "tool_choice": (None, "none"),
    "tools": (None, []), "top_logprobs": (None, 0),
}  # fmt: skip


MOST_SAMPLES = 128
"""Of a prompt, as OpenAI's: every one is a row that the engine makes room for."""


class RequestError(ValueError):
    """A request that cannot be answered; the message is one sentence, the status HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------- batching


@dataclass
class Job:
    """One prompt of a request (`request` numbers them) that waits for its answers. on_token(sample, token) and
    on_end(error) are called by the batching thread.
    """

    request: int
    ids: list[int]
    sampling: SamplingConfig
    seeded: bool
    on_token: Callable[[int, int], None]
    on_end: Callable[[Exception | None], None]


class Batcher:
    """A thread that runs waiting jobs of one sampling together.

    window: seconds that the first job of a batch waits for company.
    """

    def __init__(self, engine: HybridEngine, pad_id: int, limit: int, window: float, seed: int) -> None:
        self.engine, self.pad_id, self.limit, self.window = engine, pad_id, limit, window
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.stopped = False
        self.seed, self.batches = seed, 0
        self.thread = threading.Thread(target=self._loop, name="dschat-batcher", daemon=True)
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; raises RequestError where too many wait already."""
        with self.changed:
            if self.stopped:
                raise RequestError("the server is shutting down", 503)
            if len(self.waiting) + len(jobs) > self.limit:
                raise RequestError(f"{len(self.waiting)} prompts wait already; try again later", 429)
            self.waiting.extend(jobs)
            self.changed.notify()

    def stop(self) -> None:
        """End after the batch that runs; jobs that still wait get an error."""
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.thread.join()
        for job in self.waiting:
            job.on_end(RequestError("the server is shutting down", 503))
        self.waiting.clear()

    def _take(self) -> list[Job]:
        """The next batch: the oldest job and all that ask for the same; empty when it is time to stop."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or bool(self.waiting))
            if self.stopped:
                return []
        time.sleep(self.window)
        with self.changed:
            first = self.waiting[0]
            batch: list[Job] = []
            rest: deque[Job] = deque()
            asked: dict[tuple[int, ...], int] = {}  # prompt -> the request that asks it in this batch
            for job in self.waiting:
                together = job.sampling == first.sampling and job.seeded == first.seeded
                if together and job.seeded:
                    # In one batch the second of two equal prompts draws other samples than it would alone.
                    together = asked.setdefault(tuple(job.ids), job.request) == job.request
                (batch if together else rest).append(job)
            self.waiting = rest
            return batch

    def _loop(self) -> None:
        while batch := self._take():
            self.batches += 1
            sampling = batch[0].sampling
            if not batch[0].seeded:
                sampling = replace(sampling, seed=self.seed + self.batches)
            ids, mask = batching.pad([job.ids for job in batch], self.pad_id, "left")
            error: Exception | None = None
            try:
                self.engine.generate(ids, mask, sampling, on_token=_route(batch, sampling.n))
            except Exception as caught:  # a bad batch may not end the thread
                error = caught
            for job in batch:
                job.on_end(error)


def _route(batch: Sequence[Job], n: int) -> Callable[[int, int], None]:
    """The samples of a prompt are neighbours among the rows."""
    return lambda row, token: batch[row // n].on_token(row % n, token)


# ------------------------------------------------------------------------------------------------------ answers


class Answer:
    """One sample as it grows: text that is certain, stop strings, why it ended."""

    def __init__(
        self, encoder: conversations.Encoder, sampling: SamplingConfig, stops: Sequence[str]
    ) -> None:
        self.stops, self.eos, self.limit = stops, set(sampling.eos_ids), sampling.max_new_tokens
        self.stream = TextStream(encoder.decode, self._more)
        self.text, self.sent, self.tokens = "", 0, 0
        self.reason: str | None = None

    def _more(self, piece: str) -> None:
        self.text += piece

    def add(self, token: int) -> str:
        """Take one token; returns the text that can be sent now."""
        if self.reason is not None:
            return ""
        self.tokens += 1
        self.stream.on_token(0, token)
        if token in self.eos:
            self.reason = "stop"
        elif self.tokens == self.limit:
            self.reason = "length"
        if self.reason is not None:
            self.stream.close()
        places = [at for at in (self.text.find(s) for s in self.stops) if at >= 0]
        if places:
            self.text, self.reason = self.text[: min(places)], "stop"
        held = 0 if self.reason else self._held()
        piece = self.text[self.sent : len(self.text) - held]
        self.sent += len(piece)
        return piece

    def _held(self) -> int:
        """Characters at the end that may turn out to be the start of a stop string."""
        return max(
            (k for s in self.stops for k in range(1, len(s)) if self.text.endswith(s[:k])), default=0
        )  # fmt: skip


@dataclass
class Request:
    """What a body asks for, checked."""

    prompts: list[list[int]]
    sampling: SamplingConfig
    seeded: bool
    stops: list[str]
    stream: bool
    usage: bool


class Service:
    """Bodies in, answers out; nothing of HTTP."""

    def __init__(self, config: ServeConfig, model: Any, tokenizer: Any) -> None:
        self.config, self.name = config, config.name or config.model
        self.numbers = itertools.count()  # of requests
        self.encoder = conversations.Encoder(tokenizer, config.system_prompt, config.model)
        self.engine = HybridEngine(
            model, backend=config.backend, max_slots=config.max_batch, rollout_weights=config.weights,
            kv_cache=config.kv_cache,
        )  # fmt: skip
        self.batcher = Batcher(
            self.engine, self.encoder.pad_id, config.max_waiting, config.window_ms / 1000, config.seed
        )

    def parse(self, body: dict[str, Any], chat: bool) -> Request:
        """Raises RequestError for what cannot be answered."""
        for key, harmless in NOT_HERE.items():
            if body.get(key) not in harmless:
                raise RequestError(f"{key} is {body[key]!r}, which is not supported; leave it out")
        if body.get("model") not in (None, self.name):
            raise RequestError(f"model {body['model']!r} is not served here, but {self.name!r}", 404)
        limit = _number(body, "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens",
                        self.config.max_new_tokens, int)  # fmt: skip
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise RequestError(f"stop is {stops!r}, but it must be a text or a list of texts")
        seed = _number(body, "seed", None, int)
        try:
            sampling = SamplingConfig(
                max_new_tokens=limit,
                temperature=_number(body, "temperature", self.config.temperature, float),
                top_p=_number(body, "top_p", self.config.top_p, float),
                top_k=_number(body, "top_k", 0, int),
                min_p=_number(body, "min_p", 0.0, float),
                n=_number(body, "n", 1, int),
                seed=seed or 0,
                eos_token_id=tuple(self.encoder.stop_ids),
                pad_token_id=self.encoder.pad_id,
            )
            prompts = [self._messages(body)] if chat else self._prompts(body)
        except (ValueError, TypeError) as error:
            raise error if isinstance(error, RequestError) else RequestError(str(error)) from None
        if sampling.n > MOST_SAMPLES:
            raise RequestError(f"n is {sampling.n}, but it must be at most {MOST_SAMPLES}")
        # What the engine would refuse is refused here: there it would fail the others of its batch too.
        room, vocabulary = self.engine.spec.context, self.engine.spec.vocab_size
        for ids in prompts:
            if not ids or len(ids) + limit > room:
                raise RequestError(
                    f"the prompt has {len(ids)} tokens and max_tokens is {limit}, "
                    f"but together they must be 1 to {room}; shorten the prompt or lower max_tokens"
                )
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise RequestError(f"prompt holds a token outside the vocabulary of {vocabulary}")
        options = body.get("stream_options") or {}
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return Request(prompts, sampling, seed is not None, stops, bool(body.get("stream")), usage)

    def _messages(self, body: dict[str, Any]) -> list[int]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages is missing; give a list of {role, content}")
        return self.encoder.prompt(conversations.prompt_of({"prompt": messages}))

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        prompt = body.get("prompt")
        prompts = (
            prompt if isinstance(prompt, list) and not all(isinstance(p, int) for p in prompt) else [prompt]
        )
        rows = []
        for p in prompts:
            if isinstance(p, str) and p:
                rows.append(self.encoder.prompt(p))
            elif isinstance(p, list) and p and all(isinstance(i, int) for i in p):
                rows.append(list(p))
            else:
                raise RequestError("prompt must be a text, a list of texts, or tokens; it may not be empty")
        return rows

    async def events(self, request: Request) -> AsyncIterator[tuple[int, str, Answer]]:
        """(number of the answer, new text, the answer so far) as they come, until all have ended."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, int | Exception | None]] = asyncio.Queue()

        def put(index: int, item: int | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(queue.put_nowait, (index, item))

        n, number = request.sampling.n, next(self.numbers)
        answers = [
            Answer(self.encoder, request.sampling, request.stops) for _ in range(n * len(request.prompts))
        ]
        self.batcher.submit([
            Job(number, ids, request.sampling, request.seeded,
                lambda sample, token, first=i * n: put(first + sample, token),  # type: ignore[misc]
                lambda error, first=i * n: put(first, error))  # type: ignore[misc]
            for i, ids in enumerate(request.prompts)
        ])  # fmt: skip
        while any(a.reason is None for a in answers):
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise (
                    item
                    if isinstance(item, RequestError)
                    else RequestError(f"generation failed: {item}", 500)
                )
            if item is None:
                if any(a.reason is None for a in answers[index : index + n]):
                    raise RequestError("generation ended before the answer did", 500)
            elif answers[index].reason is None:
                yield index, answers[index].add(item), answers[index]

    def usage(self, request: Request, answers: Sequence[Answer]) -> dict[str, int]:
        prompt, completion = sum(map(len, request.prompts)), sum(a.tokens for a in answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _number(body: dict[str, Any], key: str, default: Any, kind: type) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError, ValueError):  # infinities, NaN and what no float can hold
            number = kind(value)
            if number == value and math.isfinite(number):
                return number
    raise RequestError(
        f"{key} is {value!r}, but it must be {'a whole number' if kind is int else 'a number'}"
    )


# --------------------------------------------------------------------------------------------------------- HTTP


def create_app(config: ServeConfig, model: Any, tokenizer: Any) -> Any:
    """The FastAPI application. Raises ConfigError where FastAPI is not installed."""
    try:
        from fastapi import FastAPI
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse, StreamingResponse
    except ImportError:
        raise ConfigError(
            "dschat serve needs FastAPI and uvicorn; run: pip install 'dschat[serve]'"
        ) from None
    service = Service(config, model, tokenizer)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        service.batcher.stop()

    app = FastAPI(title="dschat", lifespan=lifespan)
    app.state.service = service

    def failure(message: str, status: int) -> Any:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)

    app.add_exception_handler(RequestError, lambda _, error: failure(str(error), error.status))
    app.add_exception_handler(RequestValidationError, lambda *_: failure("the body is no JSON object", 400))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": len(service.batcher.waiting)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "dschat"}]}

    async def answer(body: dict[str, Any], chat: bool) -> Any:
        request = service.parse(body, chat)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }
        if request.stream:
            events = service.events(request)
            first = await anext(events)  # a full queue is a status code, not a broken stream
            return StreamingResponse(
                _stream(service, request, head, chat, first, events), media_type="text/event-stream"
            )
        answers: dict[int, Answer] = {}
        async for index, _, so_far in service.events(request):
            answers[index] = so_far
        rows = [answers[i] for i in sorted(answers)]
        choices = [
            {"index": i, "finish_reason": a.reason,
             **({"message": {"role": "assistant", "content": a.text}} if chat else {"text": a.text})}
            for i, a in enumerate(rows)
        ]  # fmt: skip
        kind = "chat.completion" if chat else "text_completion"
        return {**head, "object": kind, "choices": choices, "usage": service.usage(request, rows)}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: dict[str, Any]) -> Any:
        return await answer(body, chat=False)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: dict[str, Any]) -> Any:
        return await answer(body, chat=True)

    return app


async def _stream(
    service: Service, request: Request, head: dict[str, Any], chat: bool, first: Any, events: Any
) -> AsyncIterator[str]:
    """Server-sent events: a chunk for every piece of text, the usage if it was asked for, [DONE]."""
    head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}
    answers: dict[int, Answer] = {}

    def chunks(event: tuple[int, str, Answer]) -> Iterator[str]:
        index, piece, so_far = event
        new = index not in answers
        answers[index] = so_far
        if not (piece or so_far.reason or (new and chat)):
            return
        body: dict[str, Any] = {"text": piece}
        if chat:
            role = {"role": "assistant"} if new else {}
            body = {"delta": {**role, **({"content": piece} if piece else {})}}
        choice = {"index": index, "finish_reason": so_far.reason, **body}
        yield f"data: {json.dumps({**head, 'choices': [choice]}, ensure_ascii=False)}\n\n"

    for text in chunks(first):
        yield text
    try:
        async for event in events:
            for text in chunks(event):
                yield text
    except RequestError as error:  # the status is sent already
        yield f"data: {json.dumps({'error': {'message': str(error), 'code': error.status}})}\n\n"
    if request.usage:
        usage = service.usage(request, list(answers.values()))
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def serve(config: ServeConfig, model: Any, tokenizer: Any) -> None:
    """Listen until interrupted."""
    app = create_app(config, model, tokenizer)
    try:
        import uvicorn
    except ImportError:
        raise ConfigError(
            "dschat serve needs FastAPI and uvicorn; run: pip install 'dschat[serve]'"
        ) from None
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        warnings.warn(
            f"listening on {config.host} without authentication: whoever reaches it can use it", stacklevel=2
        )
    uvicorn.run(app, host=config.host, port=config.port, log_level="info")
