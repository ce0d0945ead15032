"""`dschat serve`: OpenAI's bodies in and out, streams, shared batches, and errors that say what to do."""

from __future__ import annotations

import builtins
import copy
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient

from dschat import cli
from dschat.config import ConfigError, ServeConfig
from dschat.engine import HybridEngine, SamplingConfig
from dschat.rlhf import batching, conversations
from dschat.serve import Answer, create_app

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def tokenizer(stories_tokenizer):
    made = copy.deepcopy(stories_tokenizer)
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


@pytest.fixture(scope="module")
def client(stories_model, tokenizer):
    config = ServeConfig(model="tiny", window_ms=30.0, max_waiting=12, max_new_tokens=8, seed=5)
    with TestClient(create_app(config, stories_model, tokenizer)) as client:
        yield client


def post(client, path="completions", **body):
    return client.post(f"/v1/{path}", json=body)


def sse(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@pytest.fixture
def direct(stories_model, tokenizer):
    """The engine's own answers."""

    def run(prompt: str, **sampling) -> list[str]:
        encoder = conversations.Encoder(tokenizer)
        ids, mask = batching.pad([encoder.prompt(prompt)], encoder.pad_id, "left")
        sampling = {"max_new_tokens": 8, **sampling}
        rollout = HybridEngine(stories_model).generate(
            ids, mask, SamplingConfig(eos_token_id=encoder.stop_ids, **sampling)
        )
        rows = zip(rollout.completion_ids, rollout.completion_mask.bool(), strict=True)
        return [encoder.decode(r[m].tolist()) for r, m in rows]

    return run


def test_completion_is_the_engines(client, direct):
    got = post(client, prompt=PROMPT, temperature=0).json()
    assert got["choices"] == [
        {"index": 0, "finish_reason": "length", "text": direct(PROMPT, temperature=0)[0]}
    ]
    assert got["object"] == "text_completion" and got["model"] == "tiny" and got["id"].startswith("cmpl-")
    assert got["usage"]["completion_tokens"] == 8
    assert got["usage"]["total_tokens"] == got["usage"]["prompt_tokens"] + 8


def test_samples_and_seeds(client, direct):
    """n answers, the same for the same seed, other ones where no seed is given."""
    body = {"prompt": [PROMPT, "Tom"], "n": 2, "seed": 3, "temperature": 1.0, "max_tokens": 6}
    texts = [c["text"] for c in post(client, **body).json()["choices"]]
    assert texts == direct(PROMPT, n=2, seed=3, max_new_tokens=6) + direct(
        "Tom", n=2, seed=3, max_new_tokens=6
    )
    assert [c["text"] for c in post(client, **body).json()["choices"]] == texts
    free = {post(client, prompt=PROMPT, temperature=1.0).json()["choices"][0]["text"] for _ in range(4)}
    assert len(free) > 1


def test_tokens_as_prompt(client, tokenizer, direct):
    ids = conversations.Encoder(tokenizer).prompt(PROMPT)
    got = post(client, prompt=ids, temperature=0).json()
    assert got["choices"][0]["text"] == direct(PROMPT, temperature=0)[0]


def test_chat(client, tokenizer, direct):
    messages = [{"role": "user", "content": "Once upon"}, {"role": "user", "content": "a time"}]
    got = post(client, "chat/completions", messages=messages, temperature=0, max_completion_tokens=5).json()
    message = got["choices"][0]["message"]
    assert (
        message["role"] == "assistant"
        and got["object"] == "chat.completion"
        and got["usage"]["completion_tokens"] == 5
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (
        message["content"]
        == post(client, prompt=ids, temperature=0, max_tokens=5).json()["choices"][0]["text"]
    )


@pytest.mark.parametrize("chat", [False, True])
def test_streams_add_up(client, chat):
    """The pieces are the whole text, the reason comes last, the usage when asked for."""
    body = {"temperature": 0, "max_tokens": 20, "n": 2}
    body |= {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    path = "chat/completions" if chat else "completions"
    whole = post(client, path, **body).json()
    response = post(client, path, **body, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = sse(response)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    for i in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        texts = [c["delta"].get("content", "") if chat else c["text"] for c in mine]
        wanted = whole["choices"][i]
        assert "".join(texts) == (wanted["message"]["content"] if chat else wanted["text"]) and len(texts) > 5
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [wanted["finish_reason"]]
        if chat:
            assert mine[0]["delta"]["role"] == "assistant" and all("role" not in c["delta"] for c in mine[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client, direct, stream):
    whole = direct(PROMPT, temperature=0, max_new_tokens=30)[0]
    stop = whole[12:17]
    response = post(client, prompt=PROMPT, temperature=0, max_tokens=30, stop=["zzz", stop], stream=stream)
    if stream:
        choices = [c["choices"][0] for c in sse(response)]
        text, reason = "".join(c["text"] for c in choices), choices[-1]["finish_reason"]
    else:
        text, reason = (response.json()["choices"][0][k] for k in ("text", "finish_reason"))
    assert text == whole[: whole.index(stop)] and reason == "stop"


def test_a_stop_string_in_pieces_is_never_sent():
    """'ab' then 'c' of the stop 'abc': 'ab' is held until it is clear; what turns out otherwise is sent."""

    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    answer = Answer(Letters(), SamplingConfig(max_new_tokens=9, eos_token_id=0), ["abc"])  # type: ignore[arg-type]
    sent = [answer.add(ord(c)) for c in "xabzabc!"]
    assert sent == ["x", "", "", "abz", "", "", "", ""] and answer.text == "xabz" and answer.reason == "stop"
    answer = Answer(Letters(), SamplingConfig(max_new_tokens=3, eos_token_id=0), ["abc"])  # type: ignore[arg-type]
    assert [answer.add(ord(c)) for c in "xab"] == ["x", "", "ab"] and answer.reason == "length"


def test_requests_share_a_batch(client, direct):
    """Waiting requests of one sampling run together, and each gets what it would get alone."""
    service = client.app.state.service
    prompts = [PROMPT, "Tom", "The sun was", "Lily saw", "One day", "There was"]
    calls = []
    original = service.engine.generate

    def spy(ids, *args, **kw):
        calls.append(len(ids))
        time.sleep(0.2)
        return original(ids, *args, **kw)

    service.engine.generate = spy
    try:
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda p: post(client, prompt=p, temperature=0).json(), prompts))
    finally:
        service.engine.generate = original
    assert sum(calls) == 6 and len(calls) < 6, "they were batched"
    assert [g["choices"][0]["text"] for g in got] == [direct(p, temperature=0)[0] for p in prompts]


def test_equal_requests_with_a_seed_have_equal_answers(client, direct):
    """Also those that wait together, where the engine would draw further samples for the second."""
    service = client.app.state.service
    original, body = (
        service.engine.generate,
        {"prompt": PROMPT, "seed": 3, "temperature": 1.0, "max_tokens": 6},
    )

    def slow(*args, **kw):
        time.sleep(0.2)
        return original(*args, **kw)

    service.engine.generate = slow
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda _: post(client, **body).json()["choices"][0]["text"], range(4)))
    finally:
        service.engine.generate = original
    assert got == direct(PROMPT, seed=3, max_new_tokens=6) * 4
    twice = [c["text"] for c in post(client, **{**body, "prompt": [PROMPT] * 2}).json()["choices"]]
    assert twice == direct(PROMPT, n=2, seed=3, max_new_tokens=6), "of one request they are two samples"


def test_what_the_engine_would_refuse_fails_nobody_else(client, monkeypatch, tokenizer):
    """A prompt beyond the positions that are fused, and a text whose tokens the model has no embedding for."""
    service = client.app.state.service
    spec = copy.copy(service.engine.spec)
    monkeypatch.setattr(type(spec), "position_limit", lambda _: (8, "its frequencies change there"))
    monkeypatch.setattr(type(service.engine), "spec", spec)
    got = post(client, prompt=PROMPT, max_tokens=6)
    assert got.status_code == 400 and "together they must be 1 to 8" in got.json()["error"]["message"]
    object.__setattr__(spec, "vocab_size", 4)
    got = post(client, prompt="Tom", max_tokens=1)
    assert got.status_code == 400 and "outside the vocabulary of 4" in got.json()["error"]["message"]


def test_too_many_wait(client):
    """The queue is bounded: 429, and what is queued is answered nevertheless."""
    service = client.app.state.service
    gate = threading.Event()
    original = service.engine.generate

    def slow(*args, **kw):
        gate.wait(20)
        return original(*args, **kw)

    service.engine.generate = slow
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(post, client, prompt=PROMPT, temperature=0)
            time.sleep(0.3)  # it is out of the queue and generating
            waiting = pool.submit(post, client, prompt=["Tom"] * 12, temperature=0)
            time.sleep(0.3)
            refused = post(client, prompt=PROMPT, stream=True)
            assert (
                refused.status_code == 429 and "12 prompts wait already" in refused.json()["error"]["message"]
            )
            gate.set()
            assert first.result().status_code == 200 and len(waiting.result().json()["choices"]) == 12
    finally:
        gate.set()
        service.engine.generate = original


def test_an_error_of_the_engine_is_a_500_and_not_the_end(client):
    service = client.app.state.service
    original = service.engine.generate

    def broken(*args, **kw):
        raise MemoryError("no room")

    service.engine.generate = broken
    try:
        got = post(client, prompt=PROMPT)
    finally:
        service.engine.generate = original
    assert got.status_code == 500 and got.json()["error"]["message"] == "generation failed: no room"
    assert post(client, prompt=PROMPT).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {}, 400, "prompt must be a text, a list of texts, or tokens"),
        ("completions", {"prompt": ""}, 400, "it may not be empty"),
        ("completions", {"prompt": [1, 9999]}, 400, "outside the vocabulary of 512"),
        ("completions", {"prompt": PROMPT, "max_tokens": 600}, 400, "shorten the prompt or lower max_tokens"),
        ("completions", {"prompt": PROMPT, "max_tokens": 0}, 400, "generate at least 1 token"),
        (
            "completions",
            {"prompt": PROMPT, "max_tokens": 1.5},
            400,
            "max_tokens is 1.5, but it must be a whole",
        ),
        (
            "completions",
            {"prompt": PROMPT, "temperature": "hot"},
            400,
            "temperature is 'hot', but it must be a",
        ),
        ("completions", {"prompt": PROMPT, "temperature": -1}, 400, "temperature is -1"),
        ("completions", {"prompt": PROMPT, "top_p": 0}, 400, "top_p is 0"),
        ("completions", {"prompt": PROMPT, "seed": -1}, 400, "seed is -1"),
        ("completions", {"prompt": PROMPT, "stop": [3]}, 400, "stop is [3], but it must be a text"),
        ("completions", {"prompt": PROMPT, "stop": 3}, 400, "stop is 3, but it must be a text"),
        ("completions", {"prompt": PROMPT, "n": 10**8}, 400, "n is 100000000, but it must be at most 128"),
        ("completions", {"prompt": PROMPT, "logprobs": 3}, 400, "logprobs is 3, which is not supported"),
        (
            "completions",
            {"prompt": PROMPT, "model": "gpt"},
            404,
            "model 'gpt' is not served here, but 'tiny'",
        ),
        ("chat/completions", {}, 400, "messages is missing"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "which is no message"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "tools": [{}]},
            400,
            "tools is",
        ),
    ],
)
def test_bad_requests(client, path, body, status, message):
    got = client.post(f"/v1/{path}", json=body)
    assert got.status_code == status and message in got.json()["error"]["message"]


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity", "1" * 400])
@pytest.mark.parametrize("key", ["max_tokens", "temperature", "seed"])
def test_numbers_that_are_none(client, key, number):
    """JSON as Python reads it has them."""
    content = f'{{"prompt": "x", "{key}": {number}}}'
    got = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert got.status_code == 400 and got.json()["error"]["message"].startswith(f"{key} is ")


def test_bodies_that_are_no_object(client):
    for content in ("[1]", "{", ""):
        got = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert got.status_code == 400 and got.json()["error"]["message"] == "the body is no JSON object"


def test_models_and_health(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}


def test_model_without_a_template(stories_model, stories_tokenizer):
    app = create_app(ServeConfig(model="plain"), stories_model, stories_tokenizer)
    with TestClient(app) as client:
        got = post(client, "chat/completions", messages=[{"role": "user", "content": "x"}])
        assert got.status_code == 400 and "has no chat template" in got.json()["error"]["message"]
    assert not app.state.service.batcher.thread.is_alive(), "the thread ends with the server"


def test_loopback_by_default_and_missing_packages(monkeypatch, capsys, stories_model, stories_tokenizer):
    assert ServeConfig().host == "localhost"
    real = builtins.__import__

    def without(name, *args, **kw):
        if name.split(".")[0] == "fastapi":
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs FastAPI and uvicorn; run: pip install 'dschat\[serve\]'"):
        create_app(ServeConfig(), stories_model, stories_tokenizer)
    monkeypatch.undo()
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "uvicorn" else find(n, *a))
    assert cli.main(["serve", "--model", "nowhere"]) == 2
    assert (
        capsys.readouterr().err
        == "dschat: error: dschat serve needs uvicorn; run: pip install 'dschat[serve]'\n"
    )


def test_listens_where_it_is_told(monkeypatch, stories_model, stories_tokenizer):
    import uvicorn

    from dschat import serve

    seen = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **kw: seen.append(kw))
    serve.serve(ServeConfig(port=1234), stories_model, stories_tokenizer)
    with pytest.warns(UserWarning, match=r"listening on 0\.0\.0\.0 without authentication"):
        serve.serve(ServeConfig(host="0.0.0.0"), stories_model, stories_tokenizer)
    assert [(k["host"], k["port"]) for k in seen] == [("localhost", 1234), ("0.0.0.0", 8000)]
    assert torch.get_num_threads() > 0
