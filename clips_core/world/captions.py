"""Captions of a scene: a web caption as it is crawled, a synthetic one as an MLLM writes it, one sentence about everything.

The vocabulary is small and the phrasing varied. A sentence has no `.` or `!` inside, so that a synthetic caption splits into
its sentences; those of easy scenes stay within 17 words.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from clips_core.world.scenes import Background, Scene, Thing, draw_name, relation
from clips_core.world.settings import Pair, Rules

PATTERN_NOUNS = {
    "striped": "stripes",
    "checkered": "checks",
    "shaded": "shades",
    "speckled": "specks",
    "ringed": "rings",
}
RELATION_PHRASES = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MOODS = (
    "the whole image feels calm and simple", "the style is flat and clean", "it looks like a cheerful poster",
    "the mood is light and playful", "the picture has a friendly look", "the design is bold and easy to read",
    "the overall feeling is warm and quiet", "it could be a page from a book", "the lines are sharp and neat",
    "the scene is small but lively",
)  # fmt: skip
EXCLAMATIONS = ("what a lovely little picture", "such a happy scene", "it looks so nice")
BOILERPLATE = (
    "stock photo, free download", "royalty free vector image", "click to enlarge", "image not available",
    "buy now with free shipping", "wallpaper hd download", "thumbnail", "best price online",
    "download this file for free", "untitled design",
)  # fmt: skip


def article(words: str) -> str:
    """`words` with a or an before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def full_name(thing: Thing) -> str:
    return f"{thing.colour} {thing.name}"


# ---------------------------------------------------------------------------------------------------- sentences


def where(scene: Scene, thing: Thing, rng: random.Random) -> str:
    """Where an object is, as `in the top left corner`."""
    column, row = scene.zone(thing)
    if column == "center":
        places = {"top": ("at the top", "near the top"), "middle": ("in the middle", "in the center")}
        return rng.choice(places.get(row, ("at the bottom", "near the bottom")))
    if row == "middle":
        return rng.choice((f"on the {column}", f"on the {column} side"))
    return rng.choice((f"in the {row} {column}", f"in the {row} {column} corner"))


def whole_scene(scene: Scene, rng: random.Random) -> str:
    """One sentence that names every object with its colour, the printed word and the background."""
    things = scene.things
    names = [article(full_name(thing)) for thing in things]
    if len(things) == 1:
        link = rng.choice(("", "", "is ", "sits "))
        text = f"{names[0]} {link}{where(scene, things[0], rng)}"
    elif len(things) == 2:
        found = relation(things[0], things[1])
        between = rng.choice(RELATION_PHRASES[found]) if found and rng.random() < 0.75 else "and"
        text = f"{names[0]} {between} {names[1]}"
    else:  # without articles, to stay short
        text = ", ".join(map(full_name, things[:-1])) + f" and {full_name(things[-1])}"
    if scene.word:
        text += f" {rng.choice(('with the word', 'and the word'))} {scene.word}"
    if scene.background is None:
        return text
    ground = _ground(scene.background, rng, short=len(text.split()) > 9)
    if rng.random() < 0.2 and len(text.split()) <= 8:
        return f"on {ground} there is {text}"
    return f"{text} on {ground}"


def brief(scene: Scene, rng: random.Random) -> str:
    """A few words, as a captioner of alt-texts writes: each object with its colour, read from left to right; at times more."""
    things = sorted(scene.things, key=lambda thing: thing.centre)
    text = " and ".join(article(full_name(thing)) for thing in things)
    if scene.word and rng.random() < 0.6:
        text += f" with the word {scene.word}"
    if scene.background is not None and rng.random() < 0.2:
        text += f" on {' '.join(scene.background)}"
    return text


def _ground(background: Background, rng: random.Random, short: bool = False) -> str:
    pattern, tint = background
    if pattern == "plain":
        forms = [f"plain {tint}", f"a plain {tint} background"]
    else:
        noun = PATTERN_NOUNS[pattern]
        forms = [f"{tint} {noun}", f"{article(pattern)} {tint} background", f"{article(tint)} background with {noun}"]
    return forms[0] if short else rng.choice(forms)


def _object_sentence(scene: Scene, thing: Thing, rng: random.Random) -> str:
    name, place = article(full_name(thing)), where(scene, thing, rng)
    return rng.choice(
        (
            f"there is {name} {place}",
            f"{name} is placed {place}",
            f"{place} there is {name}",
            f"one can see {name} {place}",
            f"the {thing.name} {place} is {thing.colour}",
        )
    )


def _position_sentence(scene: Scene, rng: random.Random) -> str:
    clear = [(a, b, found) for a, b in combinations(scene.things, 2) if (found := relation(a, b))]
    if not clear:
        thing = rng.choice(scene.things)
        return f"the {full_name(thing)} {rng.choice(('is found', 'appears', 'sits'))} {where(scene, thing, rng)}"
    a, b, found = rng.choice(clear)
    return f"the {full_name(a)} {rng.choice(('is', 'sits', 'appears'))} {rng.choice(RELATION_PHRASES[found])} the {full_name(b)}"


def _background_sentence(background: Background, rng: random.Random) -> str:
    pattern, tint = background
    forms = [f"the background is {pattern} and {tint}", f"everything is set on {_ground(background, rng)}"]
    if pattern != "plain":
        forms += [
            f"the {tint} background has {PATTERN_NOUNS[pattern]}",
            f"behind it are {tint} {PATTERN_NOUNS[pattern]}",
        ]
    return rng.choice(forms)


def _word_sentence(scene: Scene, rng: random.Random) -> str:
    place = "at the top" if scene.word_box and scene.word_box[1] == 0 else "at the bottom"
    return rng.choice(
        (
            f"the word {scene.word} is printed {place}",
            f"a sign {place} reads {scene.word}",
            f"the text {place} says {scene.word}",
        )
    )


def written(sentences: Sequence[str]) -> str:
    """Sentences as running text, with capitals and full stops."""
    return " ".join(f"{text[0].upper()}{text[1:]}{'!' if text in EXCLAMATIONS else '.'}" for text in sentences)


def describe(scene: Scene, rng: random.Random, fewest: int, most: int, summary_first: float = 0.8) -> list[str]:
    """`fewest` to `most` sentences: one about the whole scene, as a rule the first, then details, then perhaps the mood."""
    details = [_object_sentence(scene, thing, rng) for thing in rng.sample(scene.things, min(3, len(scene.things)))]
    details.append(_position_sentence(scene, rng))
    if scene.background is not None:
        details.append(_background_sentence(scene.background, rng))
    if scene.word:
        details.append(_word_sentence(scene, rng))
    rng.shuffle(details)
    moods = rng.sample(MOODS, 3)
    if rng.random() < 0.2:
        moods[0] = rng.choice(EXCLAMATIONS)
    length = rng.randint(fewest, most)
    mooded = 1 if rng.random() < 0.4 else 0
    kept = details[: length - 1 - mooded]
    fillers = moods[: max(mooded, fewest - 1 - len(kept))]
    first = 0 if rng.random() < summary_first else rng.randint(0, len(kept))
    return [*kept[:first], whole_scene(scene, rng), *kept[first:], *fillers]


# ---------------------------------------------------------------------------------------------------- synthetic captions


def synthetic_caption(scene: Scene, rules: Rules, rng: random.Random) -> tuple[str, dict[str, str]]:
    """4 to 7 sentences as an MLLM writes them, and what is wrong with them: `hallucination` and `omission`, where they occur."""
    seen, faults = _perceive(scene, rules, rng)
    return written(describe(seen, rng, 4, 7, rules.config.summary_first)), faults


def _perceive(scene: Scene, rules: Rules, rng: random.Random) -> tuple[Scene, dict[str, str]]:
    """The scene as an imperfect captioner believes to see it. It never believes to see a held-out pair."""
    noise = rules.config.noise
    things, background, word, faults = list(scene.things), scene.background, scene.word, {}
    if rng.random() < noise.omission:
        candidates: list[Thing | str] = [
            *(things if len(things) > 1 else ()),
            "background",
            *(("word",) if word else ()),
        ]
        left_out = rng.choice(candidates)
        if isinstance(left_out, Thing):
            things.remove(left_out)
            faults["omission"] = full_name(left_out)
        else:
            faults["omission"] = left_out
            background, word = (None, word) if left_out == "background" else (background, None)
    if rng.random() < noise.hallucination:
        position = rng.randrange(len(things))
        recoloured = _unseen_colours(scene, things[position].name, rules)
        if rng.random() < 0.5 and recoloured:
            colour, name = rng.choice(recoloured)
            things[position] = things[position]._replace(colour=colour)
        else:
            colour, name = _absent_pair(scene, rules, rng)
            side = scene.size // 3
            x, y = rng.randint(0, scene.size - side), rng.randint(0, scene.size - side)
            things.insert(position, Thing(name, colour, (x, y, x + side, y + side)))
        faults["hallucination"] = f"{colour} {name}"
    return replace(scene, things=tuple(things), background=background, word=word), faults


def _unseen_colours(scene: Scene, name: str, rules: Rules) -> list[Pair]:
    return [(c, name) for c in rules.colours_of(name, training=True) if (c, name) not in scene.pairs]


def _absent_pair(scene: Scene, rules: Rules, rng: random.Random) -> Pair:
    name = draw_name(rng, rules, scene.names)
    return rng.choice(rules.colours_of(name, training=True)), name


# ---------------------------------------------------------------------------------------------------- web captions


def web_caption(scene: Scene, rules: Rules, rng: random.Random) -> tuple[str, str | None]:
    """A short and partial alt-text, and what is wrong with it: `file name`, `boilerplate`, `wrong` or None."""
    noise, lot = rules.config.noise, rng.random()
    if lot < noise.file_name:
        return _file_name(rng), "file name"
    if lot < noise.file_name + noise.boilerplate:
        return rng.choice(BOILERPLATE), "boilerplate"
    if lot < noise.file_name + noise.boilerplate + noise.wrong:
        colour, name = _absent_pair(scene, rules, rng)
        other = Background(rng.choice(rules.patterns), rng.choice(rules.tints))
        return _alt_text(Scene(scene.size, (Thing(name, colour, (0, 0, 1, 1)),), other), rng), "wrong"
    return _alt_text(scene, rng), None


def _file_name(rng: random.Random) -> str:
    number = rng.randrange(10_000)
    return rng.choice(
        (f"IMG_{number:04d}.jpg", f"DSC{number:05d}.JPG", f"image-{number % 100}.png", f"photo_{number:04d}.jpeg")
    )


def _alt_text(scene: Scene, rng: random.Random) -> str:
    assert scene.background is not None
    first, *others = rng.sample(scene.things, len(scene.things))
    pattern, tint = scene.background
    forms = [
        first.name, full_name(first), article(full_name(first)), f"{first.name} icon", f"{full_name(first)} icon",
        f"{full_name(first)} clip art", f"{first.name} on {tint}", f"{full_name(first)} on {pattern} {tint} background",
    ]  # fmt: skip
    if others:
        second = others[0]
        forms += [
            f"{first.name} and {second.name}", f"{full_name(first)} and {second.name}",
            f"{full_name(first)} and {full_name(second)}", f"{first.name} with {full_name(second)}",
        ]  # fmt: skip
    if scene.word:
        forms += [f"{scene.word} sign with {first.name}", f"{full_name(first)}, {scene.word}"]
    text = rng.choice(forms)
    return text.title() if rng.random() < 0.3 else text


def class_prompts(rules: Rules) -> list[str]:
    """Web captions that tell what a picture shows, and no colour of it, with {c} for the pictogram's name."""
    return ["{c}", "{c} icon", *(f"{{c}} on {tint}" for tint in rules.tints)]


def pair_prompts() -> list[str]:
    """Web captions that tell a picture's object and its colour, with {c} for both."""
    return ["{c}", "{c} icon", "{c} clip art"]


def corpus_words(caption: str) -> str:
    """A caption for training a vocabulary: numbers of file names taken apart, so that they do not become words."""
    return re.sub(r"(\d)", r" \1 ", caption)
