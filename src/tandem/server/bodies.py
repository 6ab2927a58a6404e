"""What calls may say: a class a body, read strictly. A field that nobody knows is an error and not ignored.

Fields that change nothing here are taken (user, metadata); those that would change what is drawn, and are not served,
are taken at their neutral value alone (demand.py), so that nobody believes that they were heard.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Natural = Annotated[int, Meta(ge=0)]
Above = Annotated[int, Meta(ge=1)]
Unit = Annotated[float, Meta(ge=0, le=1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Stops = str | Annotated[list[str], Meta(max_length=16)] | None


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all have."""


class Hints(Body):
    """What a caller knows of its program's next steps."""

    tools: Annotated[list[Name], Meta(max_length=64)] = []
    turns_left: Natural | None = None
    tool_s: Annotated[float, Meta(ge=0)] | None = None
    arguments: Annotated[str, Meta(max_length=256)] = ""


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Whose(Body):
    """Of a call that asks for generations."""

    model: str | None = None
    program_id: Name | None = None
    tenant: Name | None = None
    hints: Hints | None = None


class Drawing(Whose):
    """How tokens are drawn, in OpenAI's names, and vLLM's where OpenAI has none."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Unit | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    stop: Stops = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json_object: Any = None
    structured_outputs: Any = None
    response_format: Any = None


class Part(msgspec.Struct, kw_only=True):
    """Of a message's content; further keys are those of kinds that are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str = "{}"


class Called(Body):
    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"
    index: int | None = None


class Said(Body):
    """A message of a conversation; what OpenAI's client gives back of an answer is one."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Body):
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    function: Function
    type: Literal["function"] = "function"


class ChosenFunction(Body):
    name: str


class Chosen(Body):
    function: ChosenFunction
    type: Literal["function"] = "function"


class ChatBody(Drawing, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Said], Meta(min_length=1)]
    max_tokens: Above | None = None
    max_completion_tokens: Above | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class CompletionBody(Drawing, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]  # of one kind
    max_tokens: Natural | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Above | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Said], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class GenerateSampling(Body):
    """SGLang's names."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Unit = 1.0
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] = -1
    min_p: Unit = 0.0
    max_new_tokens: Above = 128
    stop: Stops = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Meta(ge=1, le=1024)] = 1
    sampling_seed: Seed | None = None
    noise_seed: Natural | None = None  # the sampler's own, which `sampling_seed` is made into; n is 1 then
    json_schema: str | None = None
    regex: str | None = None


class GenerateBody(Whose, kw_only=True):
    """POST /generate: token ids in and out."""

    input_ids: Annotated[list[TokenId], Meta(min_length=1)]
    sampling_params: GenerateSampling = msgspec.field(default_factory=GenerateSampling)
    return_logprob: bool = False
    return_kept: bool = False  # the tokens that each was drawn from, where a filter or a form left some out
    stream: bool = False
    rid: Name | None = None


class Spoken(msgspec.Struct, kw_only=True):
    """An item of a response's input: a message, a call of a function, what it gave, or reasoning."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class Declared(Body):
    """A function, as responses have it."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Named(Body):
    name: str
    type: Literal["function"] = "function"


class Form(Body):
    """How a text is to be written."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseBody(Whose, kw_only=True):
    """POST /v1/responses."""

    input: str | Annotated[list[Spoken], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Above | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Unit | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Declared], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Named | None = None
    parallel_tool_calls: bool | None = None
    text: Form | None = None
    include: list[str] | None = None
    reasoning: dict[str, Any] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    truncation: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    max_tool_calls: int | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class PauseBody(Body):
    """POST /pause_generation, SGLang's."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class AbortBody(Body):
    """POST /abort_requests, vLLM's, and /abort_request, SGLang's."""

    request_ids: list[str] | None = None
    rid: str | None = None
    abort_all: bool = False


class FinishBody(Body):
    """POST /finish_weight_update. digest: what the weights are to hash to."""

    weight_version: Name | None = None
    digest: str | None = None


class DiskBody(Body):
    """POST /update_weights_from_disk."""

    model_path: Name
    weight_version: Name | None = None
    digest: str | None = None
    abort_all_requests: bool = False


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter, vLLM's. lora_path: a folder in PEFT's format, or a run that trains an adapter."""

    lora_name: Name
    lora_path: Name
    load_inplace: bool = False


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter, vLLM's."""

    lora_name: Name


class CheckerBody(Body):
    """POST /weight_checker."""

    action: Literal["checksum"] = "checksum"
