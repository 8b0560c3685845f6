"""One batch, many mixes: fade from the bare base to an adapter and beyond."""

import loramix
from loramix.chat import Message
from loramix.engine import Request, Sampling

QUESTION = (Message("user", "a film so dull that I counted the seats"),)
greedy = Sampling(temperature=0, max_tokens=16)

with loramix.open("pocket") as lm:
    lm.engine.add(lm.library.load("sentiment"))
    mixes = [loramix.Mix({"sentiment": weight}) for weight in (0, 0.25, 0.5, 0.75, 1, 1.25)]
    answers = lm.engine.generate([Request(QUESTION, mix, greedy) for mix in mixes])
    for mix, answer in zip(mixes, answers, strict=True):
        print(f"{mix!s:16} {answer.text!r}")
