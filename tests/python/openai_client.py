"""What a user's program does with OpenAI's own client: chat, completion, streaming, errors.

    python openai_client.py BASE_URL MODEL

Run by the end-to-end test `openai_client`; fails with a traceback that shows what the client made of the answer.
"""
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


for check in (models, chat, chat_logprobs, chat_stop, chat_stream, seeded, completion, completion_stream, unknown_model,
              bad_parameter):
    check()
    print("fine:", check.__name__)
