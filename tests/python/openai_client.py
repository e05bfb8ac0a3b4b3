"""What a user's program does with OpenAI's own client: chat, completion, streaming, errors.

    python openai_client.py BASE_URL MODEL

Run by the end-to-end test `openai_client`; fails with a traceback that shows what the client made of the answer.
"""
import inspect
import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="unused", max_retries=0, timeout=60)
model = sys.argv[2]
messages = [{"role": "user", "content": "What is a prefix cache?"}]
ANSWER = "A prefix cache reuses the KV blocks of a shared beginning, so that only the rest of the prompt is computed."


def models():
    assert [m.id for m in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def chat():
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=64)
    choice = answer.choices[0]
    assert answer.object == "chat.completion", answer
    assert choice.message.role == "assistant" and choice.message.content == ANSWER, answer
    assert choice.finish_reason == "stop", answer
    usage = answer.usage
    assert usage.prompt_tokens == 14 and usage.completion_tokens > 0, answer
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, answer


def chat_logprobs():
    answer = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_completion_tokens=4, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.finish_reason == "length", answer
    assert len(choice.logprobs.content) == 4, answer
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content), answer


def chat_stop():
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, stop=[" blocks"])
    assert answer.choices[0].message.content == ANSWER.split(" blocks")[0], answer
    assert answer.choices[0].finish_reason == "stop", answer


def chat_stream():
    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=64, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER, chunks
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop", chunks
    assert chunks[-1].usage.prompt_tokens == 14, chunks[-1]


def seeded():
    def draw(seed):
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Repeat:"}], temperature=2, seed=seed, max_tokens=32)
        return answer.choices[0].message.content

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(8)}) > 1


def choices():
    def ask(n, **arguments):
        return client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Repeat:"}], temperature=2, seed=7, max_tokens=16, n=n,
            **arguments)

    answer = ask(3)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3, answer
    assert answer.choices[0].message.content == ask(1).choices[0].message.content
    assert 3 <= answer.usage.completion_tokens <= 48, answer.usage
    streamed, ends = ["", "", ""], [None, None, None]
    for chunk in ask(3, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert streamed == texts and ends == [choice.finish_reason for choice in answer.choices], (streamed, ends, texts)
    assert chunk.usage.completion_tokens == answer.usage.completion_tokens, chunk
    plain = client.completions.create(model=model, prompt="Repeat:", temperature=2, seed=7, max_tokens=16, n=2, logprobs=1)
    assert [len(choice.logprobs.tokens) > 0 for choice in plain.choices] == [True, True], plain
    try:
        ask(17)
    except openai.BadRequestError as error:
        assert error.param == "n" and error.code == "above_max_value", error
    else:
        raise AssertionError("n=17 was accepted")


def tiers():
    for asked, said in [("auto", "default"), ("default", "default"), ("flex", "flex")]:
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=64, service_tier=asked)
        assert answer.service_tier == said and answer.choices[0].message.content == ANSWER, answer
    try:
        client.chat.completions.create(model=model, messages=messages, service_tier="priority")
    except openai.BadRequestError as error:
        assert error.param == "service_tier", error
    else:
        raise AssertionError("service_tier priority was accepted")


def penalties_and_biases():
    def write(**arguments):
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=24, logprobs=True, **arguments)
        return answer, [bytes(token.bytes) for token in answer.choices[0].logprobs.content]

    # A token is made impossible, then irresistible, then less so each time it is written.
    assert b" prefix" in write()[1] and b" prefix" not in write(logit_bias={"973": -100})[1]
    _, favoured = write(logit_bias={"973": 40})
    assert favoured == [b" prefix"] * 24, favoured
    _, tired = write(logit_bias={"973": 40}, frequency_penalty=2, presence_penalty=2)
    assert 2 < tired.count(b" prefix") < 24, tired
    answer, _ = write(extra_body={"min_tokens": 24, "min_p": 0.1, "repetition_penalty": 1.1})
    assert answer.usage.completion_tokens == 24 and answer.choices[0].finish_reason == "length", answer


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "green"]},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "colour", "parts"],
    "additionalProperties": False,
}


def follows_schema(text):
    value = json.loads(text)
    assert list(value) == ["name", "size", "colour", "parts"], text
    assert isinstance(value["name"], str) and len(value["name"]) <= 8, text
    assert 0 <= value["size"] <= 99 and value["colour"] in ("red", "green"), text
    assert 1 <= len(value["parts"]) <= 3 and all(isinstance(part, bool) for part in value["parts"]), text


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
    ended = 0
    for seed in range(6):
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=1.5, seed=seed, max_tokens=300, response_format=form)
        choice = answer.choices[0]
        if choice.finish_reason == "stop":
            follows_schema(choice.message.content)
            ended += 1
    assert ended >= 4, ended
    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=300, response_format=form, stream=True)
    follows_schema("".join(c.choices[0].delta.content or "" for c in stream))


def structured_extensions():
    def write(**form):
        answer = client.completions.create(
            model=model, prompt="What is a prefix cache?", temperature=1, seed=3, max_tokens=40, extra_body=form)
        assert answer.choices[0].finish_reason == "stop", answer
        return answer.choices[0].text

    assert write(guided_choice=["yes", "no"]) in ("yes", "no")
    code = write(guided_regex="[A-Z]{2}-[0-9]{3}")
    assert len(code) == 6 and code[2] == "-" and code[3:].isdigit(), code
    assert write(structured_outputs={"grammar": 'start: "a" "b"+ "."'}).strip("b.") == "a"


def structured_mistakes():
    for form, param in [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}},
         "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a(?=b)"}, "guided_regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ]:
        try:
            client.chat.completions.create(model=model, messages=messages, max_tokens=5, extra_body=form)
        except openai.BadRequestError as error:
            assert error.param == param, error
        else:
            raise AssertionError(f"{form} was accepted")


TOOLS = [
    {"type": "function", "function": {
        "name": "weather", "description": "The weather of a city", "parameters": {
            "type": "object", "additionalProperties": False, "required": ["city", "days"],
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}}}}},
    {"type": "function", "function": {"name": "now"}},
]


def follows_tool(function):
    arguments = json.loads(function.arguments)
    if function.name == "now":
        assert arguments == {}, function
    else:
        assert function.name == "weather" and list(arguments) == ["city", "days"], function
        assert len(arguments["city"]) <= 8 and 1 <= arguments["days"] <= 7, function


def tools():
    def ask(**arguments):
        return client.chat.completions.create(
            model=model, messages=messages, max_tokens=300, tools=TOOLS, parallel_tool_calls=False, **arguments)

    names = set()
    for seed in range(6):
        answer = ask(tool_choice="required", temperature=1.5, seed=seed)
        choice = answer.choices[0]
        if choice.finish_reason == "length":
            continue
        assert choice.finish_reason == "tool_calls" and choice.message.content is None, answer
        [call] = choice.message.tool_calls
        assert call.type == "function" and call.id.startswith("call_"), call
        follows_tool(call.function)
        names.add(call.function.name)
    assert names, "no call ended"

    named = {"type": "function", "function": {"name": "weather"}}
    call = ask(tool_choice=named, temperature=0).choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    follows_tool(call.function)
    with client.chat.completions.stream(
            model=model, messages=messages, max_tokens=300, tools=TOOLS, tool_choice=named, temperature=0) as stream:
        kinds = {event.type for event in stream}
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.delta" in kinds, kinds
    assert streamed.function.name == "weather" and streamed.function.arguments == call.function.arguments, streamed

    # The result goes back into the conversation.
    said = {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "Mild."}
    answer = client.chat.completions.create(
        model=model, messages=[*messages, said, result], tools=TOOLS, tool_choice="none", max_tokens=4)
    assert answer.choices[0].message.tool_calls is None, answer
    try:
        ask(tool_choice="auto")  # the demo model has no notation of calls
    except openai.BadRequestError as error:
        assert error.param == "tools", error
    else:
        raise AssertionError("tools were accepted for a model that can't call them")


RESPONSE_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]


def responses():
    arguments = dict(model=model, input=messages[0]["content"], temperature=0, max_output_tokens=64)
    answer = client.responses.create(**arguments, metadata={"a": "b"})
    assert answer.output_text == ANSWER and answer.status == "completed", answer
    assert answer.usage.input_tokens == 14 and answer.metadata == {"a": "b"} and answer.object == "response", answer
    kinds = []
    with client.responses.stream(**arguments) as stream:
        for event in stream:
            kinds.append(event.type)
        final = stream.get_final_response()
    assert final.output_text == ANSWER and final.usage.output_tokens == answer.usage.output_tokens, final
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed", kinds
    short = client.responses.create(**{**arguments, "max_output_tokens": 2})
    assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens", short

    # What was said goes back as items.
    again = client.responses.create(model=model, max_output_tokens=4, instructions="Be brief.", input=[
        {"role": "user", "content": "One?"}, *[item.model_dump(exclude_none=True) for item in answer.output],
        {"role": "user", "content": [{"type": "input_text", "text": "Two?"}]}])
    assert again.usage.input_tokens > 30, again

    form = {"type": "json_schema", "name": "thing", "strict": True, "schema": SCHEMA}
    shaped = client.responses.create(**{**arguments, "max_output_tokens": 300}, text={"format": form})
    follows_schema(shaped.output_text)

    called = dict(arguments, max_output_tokens=300, tools=RESPONSE_TOOLS, tool_choice={"type": "function", "name": "weather"})
    [call] = client.responses.create(**called).output
    assert call.type == "function_call" and call.name == "weather", call
    follows_tool(call)
    with client.responses.stream(**called) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments, pieces
    for refused in ({"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "conv_1"}, {"store": True}):
        try:
            client.responses.create(**arguments, **refused)
        except openai.BadRequestError as error:
            assert error.param in refused and error.code == "unsupported_parameter", error
        else:
            raise AssertionError(f"{refused} was accepted")


def every_field_is_known():
    """Each field that OpenAI's client can send is accepted, or refused as itself: never as unknown."""
    own = {"/chat/completions": {"messages": messages}, "/completions": {"prompt": "x"}, "/responses": {"input": "x"}}
    for create, path in [(client.chat.completions.create, "/chat/completions"), (client.completions.create, "/completions"),
                         (client.responses.create, "/responses")]:
        names = [name for name in inspect.signature(create).parameters if not name.startswith("extra_") and name != "timeout"]
        assert len(names) > 15, names
        for name in names:
            body = {"model": model, "max_tokens": 4, **own[path], name: {"odd": True}}
            if path == "/responses":
                del body["max_tokens"]
            try:
                client.post(path, body=body, cast_to=object)
            except openai.BadRequestError as error:
                known = error.code != "unknown_parameter" or "." in error.param
                assert error.param.split(".")[0] == name and known, error
            else:
                raise AssertionError(f"{path} took an odd {name}")


def completion():
    answer = client.completions.create(model=model, prompt="<|im_start|>user\nThank you!", temperature=0, max_tokens=5)
    assert answer.object == "text_completion" and answer.choices[0].text, answer
    assert answer.usage.completion_tokens <= 5, answer


def completion_stream():
    arguments = dict(model=model, prompt="The KV store keeps", temperature=0, max_tokens=5)
    whole = client.completions.create(**arguments).choices[0].text
    chunks = client.completions.create(**arguments, stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole


def unknown_model():
    try:
        client.chat.completions.create(model="no-such-model", messages=messages)
    except openai.NotFoundError as error:
        assert error.param == "model" and error.code == "model_not_found", error
    else:
        raise AssertionError("an unknown model was served")


def bad_parameter():
    try:
        client.chat.completions.create(model=model, messages=messages, temperature=-1)
    except openai.BadRequestError as error:
        assert error.param == "temperature", error
    else:
        raise AssertionError("a negative temperature was accepted")


for check in (models, chat, chat_logprobs, chat_stop, chat_stream, seeded, choices, tiers,
              penalties_and_biases, structured, structured_extensions, structured_mistakes, tools, responses, every_field_is_known, completion, completion_stream, unknown_model,
              bad_parameter):
    check()
    print("fine:", check.__name__)
