"""A server in the background, asked by OpenAI's own client: the model's name is a mix."""

import threading
import time

import openai

import loramix
from loramix.serve.app import server
from loramix.serve.service import Service

with loramix.open("pocket") as lm:
    serving = server(Service(lm), port=0)  # any free port
    thread = threading.Thread(target=serving.run)
    thread.start()
    while not serving.started:
        time.sleep(0.01)
    port = serving.servers[0].sockets[0].getsockname()[1]

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    for model in ("auto", "base", "banking:0.7+support:0.3"):
        question = [{"role": "user", "content": "my card was stolen"}]
        answer = client.chat.completions.create(model=model, messages=question, temperature=0)
        print(f"{model}: {answer.model} says {answer.choices[0].message.content!r}")

    client.close()
    serving.should_exit = True
    thread.join()
