"""Instructions that a small chat model can follow, from templates: to train on, to measure on, and two tasks to check.

A prompt puts a topic into a frame, `Name two facts about honey.`, or asks for a sentence with a word, or for a capital.
What is held out, and the problems of the two tasks, share no topic, no word and no country with what is trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any


def _listed(text: str) -> list[str]:
    return text.replace("\n", " ").strip().split(", ")


TOPICS = _listed("""
apples, bread, honey, coffee, tea, rice, cheese, soup, salt, sugar, chocolate, lemons, carrots, onions, eggs, milk,
mountains, rivers, oceans, deserts, forests, islands, volcanoes, rain, snow, clouds, thunder, wind, rainbows, fire,
dogs, cats, horses, cows, sheep, chickens, rabbits, elephants, lions, whales, dolphins, sharks, owls, eagles, bees,
ants, spiders, butterflies, frogs, snakes, turtles, trees, flowers, grass, roses, mushrooms, seeds, corn, potatoes,
bicycles, trains, ships, airplanes, buses, bridges, roads, tunnels, lighthouses, windmills, elevators, engines,
books, letters, newspapers, libraries, schools, museums, gardens, kitchens, markets, farms, villages, cities, castles,
clocks, mirrors, candles, lamps, keys, chairs, tables, spoons, shoes, hats, umbrellas, scissors, pencils, paper,
music, drums, guitars, pianos, dancing, painting, singing, reading, cooking, swimming, running, sleeping, writing,
friendship, patience, kindness, courage, honesty, laughter, the moon, the sun, the stars, gravity, magnets,
electricity, computers, telephones, cameras, the internet, maps, money, holidays, birthdays, winter, summer, spring,
autumn, mornings, weekends
""")
FRAMES = (
    "What do you know about {topic}?",
    "Explain {topic} to a child.",
    "Name two facts about {topic}.",
    "Write a short sentence about {topic}.",
    "Write a short poem about {topic}.",
    "Why do people like {topic}?",
    "Give me a tip about {topic}.",
    "What words come to mind when you think of {topic}?",
    "Write a question about {topic}.",
    "Tell me a short story about {topic}.",
    "How would you describe {topic} to a friend?",
    "What is good about {topic}?",
    "Write a title for a book about {topic}.",
    "Say something nice about {topic}.",
    "What is a common mistake with {topic}?",
    "Write a short advertisement for {topic}.",
    "Compare {topic} with something else.",
    "What is the history of {topic}?",
    "List three things that go with {topic}.",
    "What would the world be without {topic}?",
    "Summarize what is known about {topic}.",
    "Write a riddle about {topic}.",
    "What surprised you about {topic}?",
    "Write the first line of a letter about {topic}.",
    "Who needs {topic}, and what for?",
)
WORDS = _listed("""
cat, dog, book, tree, house, car, apple, river, stone, garden, bottle, candle, flower, hammer, island, jacket, mirror,
pencil, rabbit, table, chair, spoon, bridge, window, door, lamp, clock, shoe, hat, coat, ring, box, bag, cup, plate,
knife, bed, wall, roof, road, hill, lake, beach, cloud, storm, star, moon, sun, bird, fish, horse, cow, sheep, goat,
mouse, lion, bear, wolf, fox, bee, song, dance, picture, story, letter, game, toy, ball, train, ship, plane, boat
""")
CAPITALS = dict(
    pair.split()
    for pair in _listed("""
France Paris, Hungary Budapest, Italy Rome, Denmark Copenhagen, Spain Madrid, Finland Helsinki, Germany Berlin,
Peru Lima, Japan Tokyo, Chile Santiago, China Beijing, Kenya Nairobi, Russia Moscow, Thailand Bangkok, Egypt Cairo,
Vietnam Hanoi, England London, Iran Tehran, Greece Athens, Iraq Baghdad, Ireland Dublin, Belgium Brussels,
Canada Ottawa, Romania Bucharest, India Delhi, Bulgaria Sofia, Australia Canberra, Serbia Belgrade, Sweden Stockholm,
Croatia Zagreb, Poland Warsaw, Scotland Edinburgh, Cuba Havana, Nepal Kathmandu, Austria Vienna, Turkey Ankara,
Portugal Lisbon, Indonesia Jakarta, Norway Oslo, Morocco Rabat
""")
)
# shorter than what the model's chat template puts there, and answers are cut off after a few dozen tokens
SYSTEM = "Answer briefly."
USE_WORD = "Use the word {topic} in a sentence."
CAPITAL_OF = "Which city is the capital of {topic}? Answer in one sentence."


def as_chat(text: str) -> list[dict[str, str]]:
    """A prompt as a conversation.

    Example:
        >>> as_chat("Why do people like honey?")[1]
        {'role': 'user', 'content': 'Why do people like honey?'}
    """
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def train_prompts(seed: int = 0) -> list[str]:
    """Every prompt to train on, in an order drawn from a seed.

    Example:
        >>> len(train_prompts()), set(train_prompts()) & set(heldout_prompts())
        (2606, set())
    """
    topics, words, countries = _split(TOPICS, 4)[0], _split(WORDS, 2)[0], _split(list(CAPITALS), 2)[0]
    prompts = [frame.format(topic=topic) for topic in topics for frame in FRAMES]
    prompts += [USE_WORD.format(topic=word) for word in words]
    prompts += [CAPITAL_OF.format(topic=country) for country in countries]
    random.Random(seed).shuffle(prompts)
    return prompts


def heldout_prompts() -> list[str]:
    """Prompts to measure a divergence on, of topics that no training prompt has: each topic in two frames.

    Example:
        >>> heldout_prompts()[:2], len(heldout_prompts())
        (['What do you know about apples?', 'Explain tea to a child.'], 70)
    """
    return _heldout(turns=(0, 1))


def validation_prompts() -> list[str]:
    """Prompts to choose settings on: the topics of `heldout_prompts` in a third frame.

    Example:
        >>> set(validation_prompts()) & {*train_prompts(), *heldout_prompts()}, len(validation_prompts())
        (set(), 35)
    """
    return _heldout(turns=(2,))


def _heldout(turns: Sequence[int]) -> list[str]:
    topics = _split(TOPICS, 4)[1]
    return [
        FRAMES[(place + turn) % len(FRAMES)].format(topic=topic) for turn in turns for place, topic in enumerate(topics)
    ]


def use_word() -> dict[str, Any]:
    """The task of a sentence with a given word; right where the word, or its plural, stands in it."""
    return {
        "problems": [(as_chat(USE_WORD.format(topic=word)), word) for word in _split(WORDS, 2)[1]],
        "prompt": "own",
        "check": partial(_mentions, ending="(s|es)?"),
        "max_new_tokens": 24,
    }


def capitals() -> dict[str, Any]:
    """The task of naming a country's capital."""
    return {
        "problems": [
            (as_chat(CAPITAL_OF.format(topic=country)), CAPITALS[country]) for country in _split(list(CAPITALS), 2)[1]
        ],
        "prompt": "own",
        "check": _mentions,
        "max_new_tokens": 24,
    }


def _mentions(response: str, answer: str, ending: str = "") -> bool:
    return re.search(rf"\b{re.escape(answer)}{ending}\b", response, re.IGNORECASE) is not None


def _split(values: Sequence[str], every: int) -> tuple[list[str], list[str]]:
    """Values to train on, and those that are held out: the first of every so many."""
    return [value for place, value in enumerate(values) if place % every], list(values[::every])
