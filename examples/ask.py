"""Ask a question, see which mix answered, and have exactly that answer again."""

import loramix
from loramix.engine import Sampling

QUESTION = "my card was stolen, what do I do?"
greedy = Sampling(temperature=0, max_tokens=48)

with loramix.open("pocket") as lm:
    reply = lm.ask(QUESTION, sampling=greedy)
    print(f"{reply.mix}: {reply.text}")
    for reason in reply.reasons:
        print(f"  because {reason}")

    again = lm.ask(QUESTION, mix=reply.mix, sampling=greedy)
    assert again.text == reply.text

    stream = lm.stream(QUESTION, mix="base", sampling=greedy)
    print(f"{stream.mix}: ", end="")
    for chunk in stream:
        print(chunk.text, end="", flush=True)
    print(f"\n  {stream.reply.usage.completion_tokens} tokens")
