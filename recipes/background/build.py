"""Make src/loramix/route/background.txt: queries that belong to no adapter.

    python recipes/background/build.py [DATA] > src/loramix/route/background.txt

Three parts: everyday questions and remarks, put together here from frames and subjects of our own;
questions from public-domain books (Standard Ebooks, CC0), for plain English of no subject; user
requests of the Berkeley function-calling leaderboard (Apache-2.0). DATA is the folder that has
`text/standardebooks` and `bfcl`; without it only the first part is made. Deterministic.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# Frames by kind of subject, and the subjects. Broad on purpose, and nothing tuned to a test set.
FRAMES: dict[str, tuple[str, str]] = {
    "animals": (
        "what do {} eat|how long do {} live|are {} dangerous|where do {} sleep|can {} swim|"
        "why do {} migrate|do {} make good pets|how many kinds of {} are there|"
        "are {} endangered",
        "elephants|owls|dolphins|foxes|penguins|wolves|bees|spiders|horses|tigers|parrots|"
        "frogs|sharks|kangaroos|hamsters|squirrels|crocodiles|butterflies|camels|goldfish",
    ),
    "places": (
        "what is the population of {}|what language is spoken in {}|how far away is {}|"
        "what is there to see in {}|is it cold in {} at this time of year|"
        "what time is it in {}|who is the mayor of {}|which river runs through {}|"
        "when was {} founded|tell me about {}|how big is {}|what food is {} famous for|"
        "do i need a visa for {}",
        "norway|rome|kenya|texas|sydney|peru|montreal|egypt|vietnam|berlin|iceland|brazil|"
        "scotland|chicago|morocco|poland|hawaii|dublin|mongolia|lisbon",
    ),
    "people": (
        "who was {}|when did {} die|what is {} best known for|was {} ever married|"
        "what nationality was {}|how old is {} now|where did {} go to school|"
        "did {} win any prizes|what did {} discover",
        "mozart|marie curie|napoleon|leonardo da vinci|cleopatra|isaac newton|gandhi|beethoven|"
        "florence nightingale|galileo|julius caesar|rembrandt|agatha christie|pele|confucius",
    ),
    "science": (
        "what is {}|how does {} work|who discovered {}|explain {} in simple words|"
        "why is {} important|what causes {}|is {} dangerous|"
        "what is the difference between {} and magnetism|can you teach me about {}|"
        "what are the effects of {}",
        "gravity|photosynthesis|radiation|electricity|evaporation|inflation|osmosis|lightning|"
        "dna|static electricity|global warming|sound|an earthquake|a solar eclipse|"
        "machine learning|a vaccine|quantum physics|an ice age|friction|the water cycle",
    ),
    "health": (
        "what are the symptoms of {}|how do i treat {}|is {} hereditary|can children get {}|"
        "what should i eat if i have {}|should i see a doctor about {}|how common is {}",
        "asthma|a cold|diabetes|migraines|a sprained ankle|insomnia|hay fever|"
        "high blood pressure|anxiety|food poisoning|sunburn|anemia|back pain|measles",
    ),
    "house": (
        "how do i clean {}|what is the best way to fix {}|how often should i replace {}|"
        "why is {} making a noise|how much does {} weigh|where should i put {}|can i paint {}|"
        "who invented {}|what is {} made of|how do i get rid of {}",
        "my oven|a carpet|the gutters|a leaking tap|a mattress|the washing machine|a rug|"
        "my bicycle|a lawn mower|the roof|a ceiling fan|leather shoes|the dishwasher|"
        "a wooden table|mold|ants",
    ),
    "food": (
        "how do i cook {}|what goes well with {}|is {} healthy|how many calories are in {}|"
        "can you freeze {}|what can i use instead of {}|how long does {} keep in the fridge|"
        "give me a recipe for {}|where does {} come from|add {} to my shopping list",
        "rice|salmon|lentil soup|butter|pancakes|garlic|avocado|sourdough bread|honey|"
        "mushrooms|lasagna|coconut milk|cheese|chili|oatmeal|coffee",
    ),
    "arts": (
        "who wrote {}|who painted {}|when was {} made|what is {} about|"
        "recommend something like {}|how long is {}|where can i buy tickets for {}|play {}|"
        "what is the meaning of {}|which museum has {}|is there a sequel to {}",
        "hamlet|the mona lisa|the four seasons|moby dick|swan lake|the odyssey|starry night|"
        "the nutcracker|war and peace|a midsummer night's dream|the magic flute|don quixote",
    ),
    "sport": (
        "who won the {} last year|when does the {} start|what are the rules of {}|"
        "how do you score in {}|who is the best {} player ever|when was {} invented|"
        "how many people play {}|what equipment do i need for {}|is {} an olympic sport",
        "tennis|world cup|baseball|marathon|golf|volleyball|tour de france|cricket|rugby|"
        "ice hockey|table tennis|boxing|badminton|chess",
    ),
    "devices": (
        "how do i reset my {}|why is my {} so slow|which {} should i get|"
        "how do i connect my {} to wifi|turn off the {}|what is the newest {}|"
        "how do i update my {}|is it worth repairing a {}|my {} will not turn on|"
        "take a picture with my {}",
        "laptop|printer|tablet|phone|television|router|smart watch|camera|game console|"
        "keyboard|speaker|thermostat|e-reader|drone",
    ),
    "work": (
        "how do i become a {}|how much does a {} earn|what does a {} do all day|"
        "do you need a degree to be a {}|is there a {} near me|"
        "write a cover letter for a {} job|what questions should i ask a {}|"
        "what tools does a {} use",
        "nurse|plumber|lawyer|pilot|teacher|carpenter|firefighter|dentist|translator|"
        "journalist|chef|librarian|farmer|scientist|musician|detective",
    ),
    "asking": (
        "please {}|can you {}|could you {} for me|i want you to {}|help me {}|i need to {}|"
        "i would like to {}|what is the easiest way to {}|is it hard to {}|remind me to {}",
        "write a poem about autumn|tell me a joke|set an alarm for seven|"
        "translate this into french|learn the guitar|plan a birthday party|call my mother|"
        "find a good book|lose weight|write a letter to my landlord|book a table for two|"
        "sleep better|name my new puppy|summarize this article|pick a color for the kitchen|"
        "train for a race|sell my old car|fix a flat tire|tie a tie|stop biting my nails|"
        "save energy at home|make new friends|spell necessary|rename a file|"
        "write a python function|debug this program",
    ),
    "facts": (
        "what is the {}|do you know the {}|tell me the {}|i wonder what the {} is|what was the {}",
        "tallest mountain in the world|speed of light|longest river|capital of sweden|"
        "boiling point of water|largest ocean|oldest city|smallest planet|fastest animal|"
        "deepest lake|chemical symbol for gold|square root of two|first day of spring|"
        "next full moon|most spoken language|national anthem|minimum voting age|"
        "size of the moon|distance to the sun|loudest instrument|weather forecast|news today|"
        "date tomorrow|meaning of life|traffic like on the highway",
    ),
}
REMARKS = (
    "hello there|good morning|how are you|thanks a lot|that is very funny|i do not understand|"
    "who made you|are you a robot|what can you do|where do you live|do you like music|"
    "i am bored|never mind|say that again|speak louder|yes please|no thank you|maybe later|"
    "see you tomorrow|it was raining all day|my brother is coming to visit|the sky is blue|"
    "i had a strange dream|we went to the beach yesterday|her garden is full of roses|"
    "it is getting late|i am so tired|what a lovely day|the train was late again|"
    "my neighbor has three dogs|is anybody there|let us talk about something else|"
    "i lost my keys|they live in the mountains|sing me a song|flip a coin|roll a die|"
    "what is your name|how old are you|tell me something interesting|the quick brown fox|"
    "lorem ipsum|asdf|test|why|what|hm|ok|who|left or right|purple|tomorrow"
)
QUESTIONS, REQUESTS = 1500, 1000  # from books; of users


def everyday() -> Iterator[str]:
    """Every frame with every subject of its kind, and the remarks."""
    for frames, subjects in FRAMES.values():
        for frame, subject in itertools.product(frames.split("|"), subjects.split("|")):
            yield frame.format(subject)
    yield from REMARKS.split("|")


def book_questions(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.txt.gz")):
        text = gzip.decompress(path.read_bytes()).decode()
        yield from re.findall(r"[A-Z][^.?!\"\n]{15,120}\?", text)


def user_requests(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("BFCL_*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            for message in json.loads(line)["question"][0]:
                text = " ".join(message["content"].split())
                if message["role"] == "user" and 10 < len(text) <= 160:
                    yield text


def some(texts: Iterable[str], count: int) -> list[str]:
    """A fixed random choice, without repetition."""
    found = list(dict.fromkeys(texts))
    random.Random(0).shuffle(found)
    return found[:count]


def main() -> None:
    parts = {"Everyday questions and remarks, written for this project.": some(everyday(), 2500)}
    if len(sys.argv) > 1:
        data = Path(sys.argv[1])
        books = book_questions(data / "text" / "standardebooks")
        parts["Questions from public-domain books (Standard Ebooks, CC0)."] = some(books, QUESTIONS)
        users = user_requests(data / "bfcl")
        parts["Requests of the Berkeley function-calling leaderboard (Apache-2.0)."] = some(
            users, REQUESTS
        )
    for title, texts in parts.items():
        print(f"# {title}", *texts, sep="\n")


if __name__ == "__main__":
    main()
