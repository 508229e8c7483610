"""Questions about a scene and their answers: first what is asked (an `Ask`), then how it is put into words.

What is asked is common to training and benchmarks. The words are not: LLaVA's training conversations are phrased by this
file's templates, the benchmarks by their own (benchmarks.py), and no template is in both.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clips_core.world.captions import NUMBERS, RELATION_PHRASES, article, brief, describe, full_name, written
from clips_core.world.scenes import OPPOSITE, Scene, Thing, draw_name, relation
from clips_core.world.settings import Rules

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's own suffix
SHORT_SHARE = 0.85  # of the conversations; the others answer in sentences
DESCRIBE_BRIEFLY = (
    "Give a short description of this picture.", "Write a brief caption for the image.", "Summarize what the image shows.",
    "In one sentence, say what is in the picture.", "Provide a concise caption.", "What does this image show, in short?",
)  # fmt: skip
DESCRIBE = (
    "Describe this picture.", "What do you see in the image?", "Explain what the picture shows.", "Give a detailed description.",
)  # fmt: skip
TEMPLATES: dict[str, tuple[str, ...]] = {
    "exists": ("Is there {a_thing} here?", "Do you see {a_thing}?", "Can you find {a_thing} in this picture?",
               "Does the picture show {a_thing}?"),
    "has_colour": ("Is the {name} {colour}?", "Would you call the {name} {colour}?", "Is {colour} the color of the {name}?"),
    "colour": ("Which color does the {name} have?", "What is the color of the {name}?", "Tell me the color of the {name}.",
               "In which color is the {name} drawn?"),
    "colour_choice": ("Is the {name} {first} or {second}?", "Does the {name} look {first} or {second}?"),
    "of_colour": ("Which object is {colour}?", "What is drawn in {colour}?", "Name the object that is {colour}."),
    "count": ("How many objects are there?", "Count the objects in the picture.", "How many symbols do you see?"),
    "count_is": ("Does the picture have exactly {number} {symbols}?", "Do you count {number} {symbols} here?"),
    "count_of": ("How many {name}s are there?", "Count the {name}s in the picture."),
    "related_is": ("Is {first} {relation} {second}?", "Do you see {first} {relation} {second}?"),
    "related": ("Which object is {relation} {second}?", "What do you see {relation} {second}?"),
    "side": ("Is {thing} on the {first} or the {second}?", "Where is {thing}, {first} or {second}?"),
    "word": ("What word is printed here?", "What does the sign say?", "Read the word in the picture.",
             "Which text is printed in the image?"),
    "word_is": ("Does the sign say {word}?", "Is the printed word {word}?"),
}  # fmt: skip
SENTENCES: dict[str, str] = {  # answers where the question does not ask for a single word
    "exists yes": "Yes, there is {a_thing}.",
    "exists no": "No, there is not {a_thing} in the picture.",
    "has_colour yes": "Yes, the {name} is {colour}.",
    "has_colour no": "No, the {name} is not {colour}.",
    "colour": "The {name} is {answer}.",
    "colour_choice": "The {name} is {answer}.",
    "of_colour": "The {answer} is {colour}.",
    "count": "The picture has {answer} {symbols}.",
    "count_is yes": "Yes, there {verb} {number} {symbols}.",
    "count_is no": "No, there {verb} not {number} {symbols}.",
    "count_of": "The number of {name}s is {answer}.",
    "related_is yes": "Yes, {first} is {relation} {second}.",
    "related_is no": "No, {first} is not {relation} {second}.",
    "related": "The {answer} is {relation} {second}.",
    "side": "It is on the {answer}.",
    "word": "The sign says {answer}.",
    "word_is yes": "Yes, the sign says {word}.",
    "word_is no": "No, the sign does not say {word}.",
}


@dataclass(frozen=True)
class Ask:
    """What is asked, and the answer: `yes`, `no` or the word or number itself."""

    kind: str
    answer: str
    slots: dict[str, str] = field(default_factory=dict)

    def phrased(self, template: str) -> str:
        text = template.format(**self.slots)
        return f"{text[0].upper()}{text[1:]}"

    @property
    def short(self) -> str:
        """The answer in a word, as LLaVA's data and the benchmarks write it: Yes, No, red, 2."""
        return self.answer.capitalize() if self.answer in ("yes", "no") else self.answer

    @property
    def sentence(self) -> str:
        kind = f"{self.kind} {self.answer}" if self.answer in ("yes", "no") else self.kind
        text = SENTENCES[kind].format(**self.slots, answer=self.answer)
        return f"{text[0].upper()}{text[1:]}"


def yes_or_no(yes: bool) -> str:
    return "yes" if yes else "no"


# ---------------------------------------------------------------------------------------------------- what is asked
# The functions take the object that is asked about. They return None where the scene does not allow the question.


def ask_exists(words: str, yes: bool) -> Ask:
    """Is there a `words` (a name, or a colour and a name)?"""
    name = words.split()[-1]
    return Ask("exists", yes_or_no(yes), {"a_thing": article(words), "things": f"{words}s", "name": name})


def ask_has_colour(
    scene: Scene, thing: Thing, rules: Rules, rng: random.Random, yes: bool, *, training: bool
) -> Ask | None:
    if scene.names.count(thing.name) > 1:
        return None
    colour = thing.colour if yes else wrong_colour(scene, thing, rules, rng, training=training)
    return Ask("has_colour", yes_or_no(yes), {"name": thing.name, "colour": colour})


def ask_colour(scene: Scene, thing: Thing) -> Ask | None:
    return Ask("colour", thing.colour, {"name": thing.name}) if scene.names.count(thing.name) == 1 else None


def ask_colour_choice(scene: Scene, thing: Thing, rules: Rules, rng: random.Random, *, training: bool) -> Ask | None:
    if scene.names.count(thing.name) > 1:
        return None
    options = [thing.colour, wrong_colour(scene, thing, rules, rng, training=training)]
    rng.shuffle(options)
    return Ask("colour_choice", thing.colour, {"name": thing.name, "first": options[0], "second": options[1]})


def ask_of_colour(scene: Scene, thing: Thing) -> Ask | None:
    alone = sum(other.colour == thing.colour for other in scene.things) == 1
    return Ask("of_colour", thing.name, {"colour": thing.colour}) if alone else None


def ask_count(scene: Scene) -> Ask:
    return Ask("count", str(len(scene.things)), {"symbols": _symbols(len(scene.things))})


def ask_count_is(scene: Scene, rules: Rules, rng: random.Random, yes: bool) -> Ask:
    true = len(scene.things)
    others = [n for n in range(rules.level.min_objects, rules.level.max_objects + 1) if n != true] or [true + 1]
    number = true if yes else rng.choice(others)
    verb = "is" if number == 1 else "are"
    return Ask("count_is", yes_or_no(yes), {"number": NUMBERS[number], "symbols": _symbols(number), "verb": verb})


def ask_count_of(scene: Scene, thing: Thing) -> Ask:
    return Ask("count_of", str(scene.names.count(thing.name)), {"name": thing.name})


def ask_related_is(scene: Scene, thing: Thing, rng: random.Random, yes: bool) -> Ask | None:
    other = _related_to(scene, thing, rng)
    if other is None:
        return None
    found = relation(thing, other)
    assert found is not None
    words = RELATION_PHRASES[found if yes else OPPOSITE[found]][0]
    return Ask(
        "related_is", yes_or_no(yes), {"first": the(scene, thing), "relation": words, "second": the(scene, other)}
    )


def ask_related(scene: Scene, thing: Thing, rng: random.Random) -> Ask | None:
    """What is left of the …? Only where just one kind of object is, and clearly so."""
    other = _related_to(scene, thing, rng)
    if other is None:
        return None
    found = relation(thing, other)
    assert found is not None
    if any(
        relation(third, other) in (found, None) and third.name != thing.name for third in scene.things if third != other
    ):
        return None
    return Ask("related", thing.name, {"relation": RELATION_PHRASES[found][0], "second": the(scene, other)})


def ask_side(scene: Scene, thing: Thing, rng: random.Random) -> Ask | None:
    column, row = scene.zone(thing)
    options = [pair for pair, is_there in ((["left", "right"], column), (["top", "bottom"], row)) if is_there in pair]
    if not options:
        return None
    first, second = rng.sample(rng.choice(options), 2)
    answer = first if first in (column, row) else second
    return Ask("side", answer, {"thing": the(scene, thing), "first": first, "second": second})


def ask_word(scene: Scene) -> Ask | None:
    return Ask("word", scene.word) if scene.word else None


def ask_word_is(scene: Scene, rules: Rules, rng: random.Random, yes: bool) -> Ask | None:
    if not scene.word:
        return None
    word = scene.word if yes else rng.choice([w for w in rules.words if w != scene.word])
    return Ask("word_is", yes_or_no(yes), {"word": word})


def wrong_colour(scene: Scene, thing: Thing, rules: Rules, rng: random.Random, *, training: bool) -> str:
    """A colour that no object of this name has here; in training, none that would name a held-out pair."""
    taken = {colour for colour, name in scene.pairs if name == thing.name}
    return rng.choice([c for c in rules.colours_of(thing.name, training=training) if c not in taken])


def the(scene: Scene, thing: Thing) -> str:
    """A definite phrase that fits one object only."""
    return f"the {thing.name if scene.names.count(thing.name) == 1 else full_name(thing)}"


def _symbols(number: int) -> str:
    return "symbol" if number == 1 else "symbols"


def _related_to(scene: Scene, thing: Thing, rng: random.Random) -> Thing | None:
    others = [other for other in scene.things if other != thing and relation(thing, other)]
    return rng.choice(others) if others else None


# ---------------------------------------------------------------------------------------------------- training data


def align_record(key: str, scene: Scene, rng: random.Random) -> dict[str, Any]:
    """A picture and its caption, in the shape of LLaVA's stage 1 data; `image` is relative to the folder of the pictures.

    LLaVA aligns on short captions, and so does this: whatever can be worded in several ways costs a loss that no picture
    explains.
    """
    return _record(key, [(rng.choice(DESCRIBE_BRIEFLY), written([brief(scene, rng)]))])


def tune_record(key: str, scene: Scene, rules: Rules, rng: random.Random) -> dict[str, Any]:
    """A picture and 4 or 5 questions with answers, in the shape of LLaVA's stage 2 data.

    As there, a conversation is either of short answers, asked for once at its beginning, or of whole sentences; one of
    sentences ends in a description.
    """
    asks = _asks(scene, rules, rng, rng.randint(4, 5))
    rng.shuffle(asks)
    if rng.random() < 0.5:  # an earlier turn must not always give existence away
        asks.sort(key=lambda ask: ask.kind != "exists")
    questions = [ask.phrased(rng.choice(TEMPLATES[ask.kind])) for ask in asks]
    if rng.random() < SHORT_SHARE:
        questions[0] += SHORT_ANSWER
        return _record(key, list(zip(questions, [ask.short for ask in asks], strict=True)))
    turns = list(zip(questions, [ask.sentence for ask in asks], strict=True))
    turns.append((rng.choice(DESCRIBE), written(describe(scene, rng, 3, 4))))  # last: it answers everything else
    return _record(key, turns)


def _record(key: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages: list[dict[str, str]] = []
    for question, answer in turns:
        image = "" if messages else "<image>\n"
        messages += [{"from": "human", "value": image + question}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": f"{key}.png", "conversations": messages}


def _asks(scene: Scene, rules: Rules, rng: random.Random, number: int) -> list[Ask]:
    """Different questions: existence three times, then of count, colour, position and the printed word in any order.

    Whether the answer shall be yes is drawn before the question and kept while a question is sought that was not asked
    before; else `no`, which has more variants, would win.
    """

    def existence(yes: bool) -> Ask:
        return _training_existence(scene, rules, rng, yes)

    def count(yes: bool) -> Ask:
        thing = rng.choice(scene.things)
        return rng.choice((ask_count(scene), ask_count_is(scene, rules, rng, yes), ask_count_of(scene, thing)))

    def colour(yes: bool) -> Ask | None:
        thing = rng.choice(scene.things)
        match rng.randrange(4):
            case 0:
                return ask_colour(scene, thing)
            case 1:
                return ask_of_colour(scene, thing)
            case 2:
                return ask_colour_choice(scene, thing, rules, rng, training=True)
            case _:
                return ask_has_colour(scene, thing, rules, rng, yes, training=True)

    def position(yes: bool) -> Ask | None:
        thing = rng.choice(scene.things)
        options = (ask_related_is(scene, thing, rng, yes), ask_related(scene, thing, rng), ask_side(scene, thing, rng))
        return rng.choice(options)

    def reading(yes: bool) -> Ask | None:
        return ask_word(scene) if rng.random() < 0.6 else ask_word_is(scene, rules, rng, yes)

    topics: list[Callable[[bool], Ask | None]] = [count, colour, position, *([reading] if scene.word else [])]
    rng.shuffle(topics)
    pending = [existence, existence, existence, *topics]
    asks: list[Ask] = []
    while len(asks) < number:
        topic = pending.pop(0) if pending else rng.choice(topics)
        yes = rng.random() < 0.5
        for _ in range(10):  # a lone object in the middle has no side and no neighbour: then the next topic
            ask = topic(yes)
            if ask is not None and ask not in asks:
                asks.append(ask)
                break
    return asks


def _training_existence(scene: Scene, rules: Rules, rng: random.Random, yes: bool) -> Ask:
    """By name alone or with the colour. What is absent is drawn as objects are, so that the name does not give it away."""
    thing = rng.choice(scene.things)
    coloured = rng.random() < 0.5
    if yes:
        return ask_exists(full_name(thing) if coloured else thing.name, True)
    if coloured and rng.random() < 0.5:
        return ask_exists(f"{wrong_colour(scene, thing, rules, rng, training=True)} {thing.name}", False)
    name = draw_name(rng, rules, scene.names)
    if coloured:
        return ask_exists(f"{rng.choice(rules.colours_of(name, training=True))} {name}", False)
    return ask_exists(name, False)
