"""What a body of /v1/chat/completions or /v1/completions asks for, checked field by field.

Fields of OpenAI's API are obeyed, or refused by name; those that change nothing here are accepted.
"""

from dataclasses import dataclass, field

from dataset.chat_rows import normalise_turns
from dataset.tools import parse_tools
from runtime.serving.api_error import APIError
from runtime.serving.fields import Fields
from runtime.serving.sampling import Sampling

MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, MAX_TOOLS = 128, 16, 20, 128
# A smaller temperature would make logits infinite, and draws as good as never anything else.
MIN_TEMPERATURE = 1e-3
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

SHARED = set(
    "model stream stream_options temperature top_p top_k min_p repetition_penalty presence_penalty"
    " frequency_penalty logit_bias seed n stop max_tokens logprobs".split()
)
# Without a meaning for the reply: accepted.
NOTES = set(
    "user metadata safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options".split()
)
CHAT = set(
    "messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls"
    " response_format chat_template_kwargs".split()
)
COMPLETION = {"prompt"}
MESSAGE = set(
    "role content name tool_calls tool_call_id reasoning_content refusal annotations audio"
    " function_call".split()
)
# Field of OpenAI's API -> (the values that change nothing, what to do instead).
REFUSED_ANYWHERE = {
    "store": ((False,), "nothing is stored here"),
    "service_tier": (("auto", "default"), "there is one tier"),
}
REFUSED_IN_CHATS = REFUSED_ANYWHERE | {
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "modalities": ((["text"],), "the model writes text"),
    "audio": ((), "the model writes text"),
    "prediction": ((), "leave it out"),
    "reasoning_effort": ((), 'use chat_template_kwargs {"enable_thinking": true or false}'),
    "moderation": ((), "there is none here"),
    "verbosity": (("medium",), "ask for it in a message"),
    "web_search_options": ((), "offer a tool for it"),
}
REFUSED_IN_COMPLETIONS = REFUSED_ANYWHERE | {
    "best_of": ((1,), "use n"),
    "echo": ((False,), "put the prompt before the text yourself"),
    "suffix": (("",), "the model writes from left to right"),
}


@dataclass(frozen=True)
class Parameters:
    """A request.

    Attributes:
        max_tokens: None: as many as fit.
        prompts: of /v1/completions, texts or ids.
        messages, tools: as `ChatCoder.encode_prompt` takes them.
        tool_choice: "none", "auto", "required"; ("function", name) of a named one.
        thinking: None: as the chat template does by itself.
        schema: of the JSON that the reply must be; None: any text.
    """

    sampling: Sampling
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    prompts: list[str | list[int]] = field(default_factory=list)
    messages: list[dict] = field(default_factory=list)
    tools: list[dict] | None = None
    tool_choice: str | tuple[str, str] = "none"
    parallel_tool_calls: bool = True
    thinking: bool | None = None
    schema: dict | None = None

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    @property
    def is_watched(self) -> bool:
        """Whether what is written may end the reply."""
        return bool(self.stop) or not self.parallel_tool_calls

    @property
    def forced_tools(self) -> list[dict]:
        """The functions one of which must be called; none of a free reply."""
        tools = self.tools or []
        if isinstance(self.tool_choice, tuple):
            named = self.tool_choice[1]
            return [tool for tool in tools if tool["function"]["name"] == named]
        return tools if self.tool_choice == "required" else []


def chat_parameters(fields: Fields) -> Parameters:
    """What a body of /v1/chat/completions asks for.

    Raises:
        APIError: the first field that is unknown, or has an impossible value.
    """
    refuse(fields, REFUSED_IN_CHATS)
    fields.check_known(SHARED | NOTES | CHAT | REFUSED_IN_CHATS.keys())
    wants_logprobs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS, None)
    if top is not None and not wants_logprobs:
        raise APIError("top_logprobs needs logprobs true", "top_logprobs")
    limits = {"max_tokens", "max_completion_tokens"} & fields.body.keys()
    if len(limits) > 1:
        raise APIError("max_tokens and max_completion_tokens: give one", "max_tokens")
    tools, choice = read_tools(fields)
    schema = read_response_format(fields)
    if schema is not None and choice != "none":
        raise APIError("response_format cannot be had with tools", "response_format")
    template = fields.object("chat_template_kwargs")
    template.check_known({"enable_thinking"})
    thinking = template.boolean("enable_thinking") if template.body else None
    return Parameters(
        **shared_parameters(fields, (top or 0) if wants_logprobs else None),
        max_tokens=fields.integer(limits.pop(), 1, 1 << 31, None) if limits else None,
        messages=read_messages(fields),
        tools=tools if choice != "none" else None,
        tool_choice=choice,
        parallel_tool_calls=fields.boolean("parallel_tool_calls", True),
        thinking=thinking,
        schema=schema,
    )


def completion_parameters(fields: Fields, vocab_size: int) -> Parameters:
    """What a body of /v1/completions asks for.

    Raises:
        APIError: the first field that is unknown, or has an impossible value.
    """
    refuse(fields, REFUSED_IN_COMPLETIONS)
    fields.check_known(SHARED | NOTES | COMPLETION | REFUSED_IN_COMPLETIONS.keys())
    top = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS, None)
    return Parameters(
        **shared_parameters(fields, top),
        max_tokens=fields.integer("max_tokens", 1, 1 << 31, None),
        prompts=read_prompts(fields, vocab_size),
    )


def refuse(fields: Fields, refused: dict) -> None:
    for name in fields.body.keys() & refused.keys():
        harmless, advice = refused[name]
        if fields.body[name] not in harmless:
            path = fields.path(name)
            fault = f"{path} is not supported: {advice}"
            raise APIError(fault, path, "unsupported_parameter")


def shared_parameters(fields: Fields, top_logprobs: int | None) -> dict:
    """The parameters that both kinds of requests have."""
    options = fields.object("stream_options")
    options.check_known({"include_usage", "include_obfuscation"})
    stream = fields.boolean("stream")
    if options.body and not stream:
        raise APIError("stream_options needs stream true", "stream_options")
    temperature = fields.number("temperature", 0, 2, 1.0)
    top_p = fields.number("top_p", 0, 1, 1.0)
    sampling = Sampling(
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_k=fields.integer("top_k", 0, 1 << 31, 0),
        top_p=max(top_p, 1e-9),  # 0 is the likeliest token alone
        min_p=fields.number("min_p", 0, 1, 0.0),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100, 1.0),
        presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
        logit_bias=read_bias(fields),
        seed=fields.integer("seed", -(2**63), 2**63 - 1, None),
        top_logprobs=top_logprobs,
    )
    return {
        "sampling": sampling,
        "n": fields.integer("n", 1, MAX_CHOICES, 1),
        "stop": read_stop(fields),
        "stream": stream,
        "include_usage": options.boolean("include_usage"),
    }


def read_bias(fields: Fields) -> dict[int, float]:
    """Token -> what is added to its logit."""
    biases = fields.object("logit_bias")
    for token in biases.body:
        if not (token.isascii() and token.isdecimal() and len(token) <= 9):
            must = f"keys of logit_bias are token ids, found {token[:60]!r}"
            raise APIError(must, "logit_bias")
    return {int(token): biases.number(token, -100, 100, 0.0) for token in biases.body}


def read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.body.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not fits or not all(isinstance(stop, str) and stop for stop in stops):
        raise fields.fail("stop", f"a string or a list of up to {MAX_STOPS} strings, none empty")
    return tuple(stops)


def read_messages(fields: Fields) -> list[dict]:
    """The messages as `normalise_turns` gives them."""
    fields.check_given("messages")
    turns = fields.list("messages", 1 << 16)
    if not turns:
        raise APIError("messages must have at least one message", "messages")
    for n, turn in enumerate(turns):
        at = f"messages[{n}]"
        if not isinstance(turn, dict):
            raise APIError(f"{at} must be an object", at)
        message = Fields(turn, at)
        message.check_known(MESSAGE)
        message.check_given("role")
        if message.body["role"] not in ROLES:
            raise message.fail("role", f"one of {', '.join(ROLES)}")
    try:
        return normalise_turns(turns, sharegpt=False)
    except ValueError as error:
        reason = str(error)
        turn = reason.removeprefix("turn ").split(":")[0].split(" ")[0]
        at = f"messages[{int(turn) - 1}]" if turn.isdecimal() else "messages"
        raise APIError(f"messages: {reason}", at) from None
    except RecursionError:
        raise APIError("messages: nested too deeply", "messages") from None


def read_tools(fields: Fields) -> tuple[list[dict], str | tuple[str, str]]:
    """The functions that may be called, and which of them must be."""
    tools = fields.list("tools", MAX_TOOLS)
    names = []
    for n, tool in enumerate(tools):
        at = f"tools[{n}]"
        if not isinstance(tool, dict):
            raise APIError(f"{at} must be an object", at)
        outer = Fields(tool, at)
        outer.check_known({"type", "function"})
        outer.one_of("type", ("function",), "function")
        outer.check_given("function")
        function = outer.object("function")
        function.check_known({"name", "description", "parameters", "strict"})
        pattern = r"[a-zA-Z0-9_.-]{1,64}"
        names.append(function.text("name", pattern, "up to 64 letters, digits, _ . -"))
        if "description" in function.body:
            function.text("description")
        function.object("parameters")
        function.boolean("strict")
    if len(set(names)) < len(names):
        raise APIError("tools: two functions have one name", "tools")
    try:
        tools = parse_tools(tools, "tools")
    except (ValueError, RecursionError) as error:
        raise APIError(str(error), "tools") from None
    return tools, read_tool_choice(fields, names)


def read_tool_choice(fields: Fields, names: list[str]) -> str | tuple[str, str]:
    choice = fields.body.get("tool_choice", "auto" if names else "none")
    if choice in ("none", "auto"):
        return choice if names else "none"
    if not names:
        raise APIError("tool_choice needs tools", "tool_choice")
    if choice == "required":
        return choice
    if not isinstance(choice, dict):
        raise fields.fail("tool_choice", '"none", "auto", "required" or a named function')
    outer = fields.object("tool_choice")
    outer.check_known({"type", "function"})
    outer.one_of("type", ("function",), "function")
    named = outer.object("function").text("name")
    if named not in names:
        path = "tool_choice.function.name"
        raise APIError(f"{path}: no function of tools is named {named[:64]!r}", path)
    return "function", named


def read_response_format(fields: Fields) -> dict | None:
    """The schema of the JSON that the reply must be; None: any text."""
    given = fields.object("response_format")
    if not given.body:
        return None
    given.check_given("type")
    kind = given.one_of("type", ("text", "json_object", "json_schema"), "")
    given.check_known({"type", "json_schema"} if kind == "json_schema" else {"type"})
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    given.check_given("json_schema")
    inner = given.object("json_schema")
    inner.check_known({"name", "description", "schema", "strict"})
    inner.text("name", r"[a-zA-Z0-9_-]{1,64}", "up to 64 letters, digits, _ -")
    inner.boolean("strict")
    inner.check_given("schema")
    inner.object("schema")
    return inner.body["schema"]  # with its nulls


def read_prompts(fields: Fields, vocab_size: int) -> list[str | list[int]]:
    """The prompts: one text or a list of them, ids or a list of those."""
    fields.check_given("prompt")
    value = fields.body["prompt"]
    if isinstance(value, str):
        return [value]
    must = "a string, a list of strings, token ids, or a list of those"
    if not isinstance(value, list) or not value:
        raise fields.fail("prompt", must)
    prompts: list[str | list[int]] = [value] if isinstance(value[0], int) else value
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not prompt:
            raise fields.fail("prompt", must)
        for token in prompt:
            is_id = isinstance(token, int) and not isinstance(token, bool)
            if not is_id or not 0 <= token < vocab_size:
                raise fields.fail("prompt", f"{must} below {vocab_size}")
    return prompts
