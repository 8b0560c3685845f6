"""Fit a router from a few queries of each adapter; no model is needed."""

from loramix.chat import Message
from loramix.route.gate import GateRouter
from loramix.route.ngrams import NgramEncoder

QUERIES = {
    "weather": [f"{ask} in {city}" for ask in ("will it rain", "how warm is it", "is it windy")
                for city in ("Oslo", "Rome", "Lima", "Cairo", "Riga", "Quito", "Accra", "Kobe")],
    "kitchen": [f"how long do I {verb} {food}" for verb in ("boil", "bake", "fry")
                for food in ("an egg", "potatoes", "a fish", "rice", "beans", "cake", "tofu")],
}  # fmt: skip

router = GateRouter.fit(QUERIES, encoder=NgramEncoder())
for query in ("how long do I bake rice", "is it windy in Lima", "sing me a song"):
    decision = router.route([Message("user", query)])
    print(f"{query!r} -> {decision.mix}  (none: {decision.none:.0%})")
