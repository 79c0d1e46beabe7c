"""The server as OpenAI's own client library sees it: a real server process, real calls."""

import asyncio
import json
from typing import Literal

import pytest
from running import ROOT, run_script
from serving import CALL, FACTS, NAME, THOUGHT, TOOLS, Server, train_by_heart, user

openai = pytest.importorskip("openai", reason="pip install openai")
for package in ("starlette", "uvicorn", "httptools"):
    pytest.importorskip(package, reason="pip install -r requirements-serve.txt")

KEY = "a-key-for-tests"
NAMED = {"type": "function", "function": {"name": "get_time"}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return train_by_heart(tmp_path_factory.mktemp("by_heart"))


@pytest.fixture(scope="module")
def server(weights):
    running = Server(weights.parent, env={"MINIMIND_API_KEY": KEY})
    yield running
    text = running.log
    running.close()
    assert "Traceback" not in text, text


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ask(client):
    """ask(question, **parameters) -> the answer, greedy."""

    def ask(question: str, **parameters):
        messages = parameters.pop("messages", [user(question)])
        given = {"temperature": 0, "max_tokens": 60, **parameters}
        return client.chat.completions.create(model=NAME, messages=messages, **given)

    return ask


def joined(chunks, field: str = "content") -> str:
    deltas = (chunk.choices[0].delta for chunk in chunks if chunk.choices)
    return "".join(getattr(delta, field, None) or "" for delta in deltas)


def asynchronous(server, use):
    """Run `use(client)` with the asynchronous client."""

    async def run():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            return await use(client)

    return asyncio.run(run())


# --------------------------------------------------------------------------------------------------
# Replies
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", FACTS)
def test_a_reply(question, ask):
    answer = ask(question)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (FACTS[question], "stop")
    assert (choice.message.role, choice.message.tool_calls, choice.logprobs) == (
        "assistant",
        None,
        None,
    )
    assert (answer.object, answer.model) == ("chat.completion", NAME)
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens > 0 and usage.prompt_tokens_details.cached_tokens >= 0


@pytest.mark.parametrize("question", FACTS)
def test_a_stream(question, ask):
    chunks = list(ask(question, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == FACTS[question]
    *others, last = chunks
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in others)
    assert others[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in others]
    assert reasons == [None] * (len(others) - 1) + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1


@pytest.mark.parametrize("question", FACTS)
def test_the_asynchronous_client(question, server):
    async def use(client):
        how = {"model": NAME, "messages": [user(question)], "temperature": 0}
        whole = client.chat.completions.create(**how)
        stream = await client.chat.completions.create(**how, stream=True)
        chunks = [chunk async for chunk in stream]
        return (await whole).choices[0].message.content, joined(chunks)

    assert asynchronous(server, use) == (FACTS[question], FACTS[question])


def test_many_at_once_get_what_each_gets_alone(server, ask):
    def parameters(n: int) -> dict:
        question = [*FACTS][n % len(FACTS)]
        how = {"temperature": n % 2, "seed": n, "max_tokens": 30}
        return {"model": NAME, "messages": [user(question)], **how}

    async def use(client):
        calls = [client.chat.completions.create(**parameters(n)) for n in range(24)]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    together = asynchronous(server, use)
    for n in range(0, 24, 3):
        how = parameters(n)
        del how["model"]
        assert ask("", **how).choices[0].message.content == together[n]


@pytest.mark.parametrize("question", [*FACTS, THOUGHT[0]])
def test_the_text_is_that_of_eval_model(question, ask, weights):
    flags = ["--out_dir", weights.parent, "--device", "cpu", "--prompt", question]
    printed = run_script(ROOT / "eval_model.py", *flags).stdout
    message = ask(question).choices[0].message
    thought = getattr(message, "reasoning_content", None)
    text = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    assert text + message.content + "\n" == printed


def test_thinking(ask):
    question, thought, answer = THOUGHT
    message = ask(question).choices[0].message
    assert (message.reasoning_content, message.content) == (thought, answer)
    chunks = list(ask(question, stream=True))
    assert (joined(chunks, "reasoning_content"), joined(chunks)) == (thought, answer)


def test_thinking_that_the_prompt_opens(ask):
    message = (
        ask("6*7", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
        .choices[0]
        .message
    )
    assert (message.reasoning_content, message.content) == THOUGHT[1:]


# --------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------


def test_n(ask):
    answer = ask("hi", n=3, temperature=1.5, seed=7, max_tokens=8)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == ask("hi").usage.prompt_tokens
    second = ask("hi", temperature=1.5, seed=8, max_tokens=8).choices[0].message.content
    assert texts[1] == second


def test_n_streamed(ask):
    chunks = list(ask("hi", n=2, stream=True))
    for index in (0, 1):
        own = [c for c in chunks if c.choices[0].index == index]
        assert joined(own) == FACTS["hi"] and own[-1].choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_text(ask):
    how = {"temperature": 2, "max_tokens": 20}
    texts = [ask("hi", seed=seed, **how).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "stop, text", [("you", "Hello, "), (["lo, y"], "Hel"), ("!", "Hello, you"), ("xyz", None)]
)
def test_stop_strings_are_never_shown(stop, text, streams, ask):
    text = FACTS["hi"] if text is None else text
    if streams:
        chunks = list(ask("hi", stop=stop, stream=True))
        assert joined(chunks) == text and chunks[-1].choices[0].finish_reason == "stop"
    else:
        (choice,) = ask("hi", stop=stop).choices
        assert (choice.message.content, choice.finish_reason) == (text, "stop")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(name, ask):
    how = {name: 2} if name == "max_tokens" else {name: 2, "max_tokens": None}
    answer = ask("who are you?", **how)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 2


def test_logprobs(ask):
    content = ask("hi", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == FACTS["hi"]
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert bytes(entry.bytes).decode() == entry.token


def test_logprobs_streamed(ask):
    whole = ask("who are you?", logprobs=True).choices[0].logprobs.content
    chunks = ask("who are you?", logprobs=True, stream=True)
    logprobs = [chunk.choices[0].logprobs for chunk in chunks]
    entries = [entry for logprob in logprobs if logprob for entry in logprob.content]
    assert [entry.bytes for entry in entries] == [entry.bytes for entry in whole]
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode() == FACTS["who are you?"]
    assert all(entry.top_logprobs == [] for entry in entries)


def test_logit_bias(ask):
    first = ask("hi", max_tokens=1, logprobs=True, top_logprobs=2).choices[0]
    assert first.message.content == "Hello"
    bias = ask("hi", max_tokens=1, logit_bias={"2": 100}).choices[0]  # the end of a turn
    assert (bias.message.content, bias.finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_p": 0.0, "temperature": 1},
        {"top_p": 0.5, "temperature": 0.7},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"user": "someone", "metadata": {"a": "b"}, "store": False},
        {"response_format": {"type": "text"}},
        {"stop": None, "seed": None, "n": None},
        {"service_tier": "auto", "parallel_tool_calls": False},
        {"extra_body": {"top_k": 1}, "temperature": 1},
        {"extra_body": {"min_p": 0.9}, "temperature": 1},
        {"extra_body": {"repetition_penalty": 1.01}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    ],
    ids=str,
)
def test_parameters_that_leave_the_reply_as_it_is(parameters, ask):
    assert ask("hi", **parameters).choices[0].message.content == FACTS["hi"]


def test_content_in_parts_and_a_conversation(ask):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert ask("", messages=[{"role": "user", "content": parts}]).choices[0].message.content
    turns = [user("hi"), {"role": "assistant", "content": FACTS["hi"]}, user("2+3")]
    first = ask("", messages=turns)
    again = ask("", messages=turns)
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1


# --------------------------------------------------------------------------------------------------
# Tools and JSON
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
def test_a_tool_call(choice, ask):
    if choice != "auto":
        pytest.importorskip("llguidance", reason="pip install llguidance")
    (answer,) = ask("time in Paris?", tools=TOOLS, tool_choice=choice).choices
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name) == ("function", CALL["name"])
    assert json.loads(call.function.arguments) == CALL["arguments"]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    turns = [
        user("time in Paris?"),
        answer.message.model_dump(include={"role", "content", "tool_calls"}),
        {"role": "tool", "tool_call_id": call.id, "content": "12:00"},
    ]
    assert ask("", messages=turns, tools=TOOLS).choices[0].message.content == "It is noon."


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_tool_call_streamed(choice, ask):
    if choice != "auto":
        pytest.importorskip("llguidance", reason="pip install llguidance")
    chunks = list(ask("time in Paris?", tools=TOOLS, tool_choice=choice, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert calls[0].id and calls[0].function.name == CALL["name"]
    assert all(call.id is None and call.function.name is None for call in calls[1:])
    assert json.loads("".join(c.function.arguments for c in calls)) == CALL["arguments"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert joined(chunks) == ""


def test_no_tool_is_called(ask):
    assert ask("hi", tools=TOOLS, tool_choice="none").choices[0].message.content == FACTS["hi"]


def test_a_tool_that_has_to_be_called(ask):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    parameters = {**SCHEMA, "$defs": {"A": {"type": "integer", "minimum": 0, "maximum": 9}}}
    parameters["properties"] = {**SCHEMA["properties"], "n": {"$ref": "#/$defs/A"}}
    function = {"name": "set_age", "parameters": {**parameters, "required": ["name", "age", "n"]}}
    tools = [*TOOLS, {"type": "function", "function": function}]
    choice = {"type": "function", "function": {"name": "set_age"}}
    answer = ask("hi", tools=tools, tool_choice=choice, max_tokens=400, temperature=1, seed=1)
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "set_age" and arguments["name"] in ("Ann", "Bob")
    assert 0 <= arguments["n"] <= 9


@pytest.mark.parametrize("streams", [False, True])
def test_json_schema(streams, ask):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = ask("hi", response_format=form, temperature=1, seed=3, max_tokens=400, stream=streams)
    text = joined(answer) if streams else answer.choices[0].message.content
    person = json.loads(text)
    assert person["name"] in ("Ann", "Bob") and person["age"] <= 99


def test_json_of_several_choices(ask):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = ask("hi", response_format=form, temperature=1, seed=3, max_tokens=400, n=3)
    for choice in answer.choices:
        assert json.loads(choice.message.content)["age"] <= 99


def test_json_object(ask):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    answer = ask("hi", response_format={"type": "json_object"}, logit_bias={"96": 50})
    assert answer.choices[0].message.content.startswith("{")


def test_structured_outputs_of_the_client(client):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    pydantic = pytest.importorskip("pydantic", reason="pip install pydantic")
    fields = {"name": (Literal["Ann", "Bob"], ...), "is_old": (bool, ...)}
    Person = pydantic.create_model("Person", **fields)
    answer = client.chat.completions.parse(
        model=NAME, messages=[user("hi")], response_format=Person, temperature=1, seed=5
    )
    person = answer.choices[0].message.parsed
    assert person.name in ("Ann", "Bob") and isinstance(person.is_old, bool)


@pytest.mark.parametrize("tools", [openai.omit, TOOLS])
def test_the_client_puts_a_stream_together(tools, client):
    question = "who are you?" if tools is openai.omit else "time in Paris?"
    how = {"model": NAME, "messages": [user(question)], "temperature": 0, "tools": tools}
    with client.chat.completions.stream(**how) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0]
    whole = client.chat.completions.create(**how).choices[0]
    assert streamed.finish_reason == whole.finish_reason and "chunk" in kinds
    if tools is openai.omit:
        assert streamed.message.content == whole.message.content
    else:
        functions = [c.message.tool_calls[0].function for c in (streamed, whole)]
        assert functions[0].name == functions[1].name
        assert functions[0].arguments == functions[1].arguments


# --------------------------------------------------------------------------------------------------
# /v1/completions, /v1/models
# --------------------------------------------------------------------------------------------------


def complete(client, prompt, **parameters):
    given = {"temperature": 0, "max_tokens": 6, **parameters}
    return client.completions.create(model=NAME, prompt=prompt, **given)


def test_completions_of_texts_and_ids(client, tokenizer):
    ids = tokenizer.encode("hi there", add_special_tokens=False)
    texts = [
        [choice.text for choice in complete(client, prompt).choices]
        for prompt in ("hi there", ["hi there"], ids, [ids, ids])
    ]
    assert texts[0] == texts[1] == texts[2] and texts[3] == texts[0] * 2
    answer = complete(client, ["hi", "ho"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.object == "text_completion" and answer.usage.completion_tokens <= 24


def test_completions_streamed(client):
    whole = complete(client, "hi there").choices[0].text
    chunks = list(complete(client, "hi there", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_completions_with_logprobs(client):
    (choice,) = complete(client, "hi", logprobs=2).choices
    logprobs = choice.logprobs
    count = len(logprobs.tokens)
    assert count == len(logprobs.token_logprobs) == len(logprobs.text_offset) <= 6
    assert all(len(top) <= 2 for top in logprobs.top_logprobs)


def test_models(client):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.context_length, card.thinking) == (NAME, "model", 512, True)
    assert client.models.retrieve(NAME).parameters == card.parameters > 0
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, param",
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"six": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [user("hi"), {"role": "system", "content": "x"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
         "tool_choice.function.name"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "nothing"}}}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"extra_body": {"top_q": 1}}, "top_q"),
        ({"messages": [user("x " * 2000)]}, "messages"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_parameters_are_named(parameters, param, ask):
    if param == "response_format":
        pytest.importorskip("llguidance", reason="pip install llguidance")
    with pytest.raises(openai.BadRequestError) as error:
        ask("hi", **parameters)
    assert error.value.param == param and param.split(".")[0].split("[")[0] in str(error.value)
    assert error.value.type == "invalid_request_error"


def test_a_prompt_that_does_not_fit(ask):
    with pytest.raises(openai.BadRequestError) as error:
        ask("x " * 2000)
    assert error.value.code == "context_length_exceeded"


def test_an_unknown_model_and_a_wrong_key(server, client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=[user("hi")])
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    for key in ("wrong", KEY[:-1], KEY + "x"):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as other:
            with pytest.raises(openai.AuthenticationError, match="API key is wrong"):
                other.models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_is_too_much_work_is_an_error_not_half_a_reply(ask, stream):
    kinds = [
        {"type": "object", "properties": {f"k{n}": {}}, "required": [f"k{n}"]} for n in range(3000)
    ]
    schema = {"name": "s", "schema": {"anyOf": kinds}}
    with pytest.raises(openai.APIError) as refused:
        answer = ask(
            "hi", response_format={"type": "json_schema", "json_schema": schema}, stream=stream
        )
        list(answer)
    assert "2000" in str(refused.value)
