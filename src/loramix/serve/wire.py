"""What clients may send. A field that is not here is a 400: nothing is accepted and ignored.

A few fields are here with one value only: clients are known to send them, and that value says what
this server does anyway. `user`, `metadata` and their like are labels, which change no answer.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from loramix.chat import Call, Message
from loramix.engine import Sampling
from loramix.errors import BadRequest
from loramix.serve.failures import hint


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


async def require_known_query(request: Request) -> None:
    """BadRequest for a parameter of the query that the route does not have."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise BadRequest(f"{name[:80]} is no parameter of this query; {hint(name, known)}")


def _of_whole_characters(text: str) -> str:
    text.encode()  # a ValueError for half a character
    return text


Text = Annotated[str, AfterValidator(_of_whole_characters)]  # that is to be kept


class TextPart(Wire):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class FunctionCall(Wire):
    name: str
    arguments: str

    @model_validator(mode="after")
    def _is_object(self) -> FunctionCall:
        try:
            known = isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise ValueError("arguments must be a JSON object, as text")
        return self


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # sent back by clients that put a stream together


class SystemTurn(Wire):
    role: Literal["system", "developer"]
    content: Content
    name: None = None
    type: Literal["text"] | None = None  # lm_eval's

    def message(self) -> Message:
        return Message("system", _text(self.content))


class UserTurn(Wire):
    role: Literal["user"]
    content: Content
    name: None = None
    type: Literal["text"] | None = None

    def message(self) -> Message:
        return Message("user", _text(self.content))


class AssistantTurn(Wire):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    name: None = None
    type: Literal["text"] | None = None
    # What clients that send an answer back as it came add to it:
    refusal: None = None
    audio: None = None
    annotations: list[None] | None = None
    function_call: None = None
    provider_specific_fields: dict[str, None] | None = None

    def message(self) -> Message:
        calls = [Call(c.function.name, c.function.arguments, c.id) for c in self.tool_calls or ()]
        return Message("assistant", _text(self.content or ""), tuple(calls))


class ToolTurn(Wire):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None  # of the tool, which the call says too

    def message(self) -> Message:
        return Message("tool", _text(self.content), call_id=self.tool_call_id)


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class Function(Wire):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Wire):
    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Wire):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None  # the answer follows the schema either way


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and with no other")
        return self

    def schema(self) -> str | None:  # type: ignore[override]
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return '{"type": "object"}' if self.type == "json_object" else None


class StreamOptions(Wire):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class LoraScale(Wire):
    """llama.cpp's: an adapter by its number in GET /lora-adapters, or by name."""

    id: int | None = None
    name: str | None = None
    scale: float = 1.0


class MergedAdapters(Wire):
    """LoRAX's; "linear" is the weighted sum of the updates, exactly."""

    ids: list[str]
    weights: list[float]
    merge_strategy: Literal["linear"] | None = None


class Asked(Wire):
    """What chats and completions have in common."""

    model: str = Field(
        default="",
        description="The base's id, an adapter, base:adapter, a mix as a:0.45+b:0.55, or auto.",
    )
    mix: dict[str, float] | str | None = None
    lora: list[LoraScale] | None = None
    adapter_id: str | None = None
    adapter_source: Literal["local"] | None = None
    merged_adapters: MergedAdapters | None = None

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    user: str | None = None

    @property
    def count(self) -> int:
        return 1 if self.n is None else self.n

    def _sampling(self, default_tokens: int, **more: Any) -> Sampling:
        asked_tokens = more.pop("max_tokens", self.max_tokens)
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_bias(self.logit_bias or {}),
            seed=self.seed,
            stop=_stops(self.stop),
            max_tokens=default_tokens if asked_tokens is None else asked_tokens,
            fit=asked_tokens is None,
            **more,
        )

    @model_validator(mode="after")
    def _options_are_of_a_stream(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; send stream: true too")
        return self


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: list[Turn]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    def conversation(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self.messages)

    def sampling(self, default_tokens: int, schema: str | None) -> Sampling:
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise BadRequest("max_tokens is another name of max_completion_tokens; send one.")
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs is for answers with logprobs; send logprobs: true too.")
        longest = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        return self._sampling(
            default_tokens,
            max_tokens=longest,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            schema=schema,
        )

    def template(self) -> dict[str, Any]:
        """What the chat template is told besides the messages."""
        told = dict(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            if told.get("enable_thinking", self.enable_thinking) != self.enable_thinking:
                raise BadRequest("enable_thinking is said twice, and differently; say it once.")
            told["enable_thinking"] = self.enable_thinking
        if taken := told.keys() & {"messages", "tools", "add_generation_prompt", "tokenize"}:
            raise BadRequest(f"chat_template_kwargs is not for {sorted(taken)[0]!r}; leave it out.")
        if self.tools and self.tool_choice != "none":
            told["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return told


class CompletionAsked(Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: None = None

    def prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [tuple(token for token in self.prompt if isinstance(token, int))]
        texts = [part for part in self.prompt if isinstance(part, str)]
        return [*texts, *(tuple(part) for part in self.prompt if isinstance(part, list))]

    def sampling(self, default_tokens: int) -> Sampling:
        """With echo, max_tokens 0 is allowed: one is computed then, and not shown."""
        if self.best_of not in (None, self.count):
            raise BadRequest(f"best_of is {self.best_of}; expected n, as all answers are returned.")
        schema = self.response_format.schema() if self.response_format else None
        return self._sampling(
            default_tokens,
            max_tokens=1 if self.echo and self.max_tokens == 0 else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            schema=schema,
        )


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _bias(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise BadRequest("logit_bias is by token id; expected whole numbers as keys.") from error
