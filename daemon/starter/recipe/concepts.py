"""The held-out concepts: eight captioned pictures and twenty prompts each, from art that nothing was trained on.

concepts.json holds the 15 of the main runs, concepts64.json these and 49 more. In captions and prompts `{c}`
stands for the concept: its tokens and class word when the concept is trained or asked for, the class word
alone for pictures of the prior.
"""
import random
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import art
import world
from common import read_json, write_json

FLUENT, CC0, NOTO, TWEMOJI = "MIT", "CC0-1.0", "Apache-2.0", "CC-BY-4.0"
ANSIMUZ = "free to use, modify and redistribute (Luis Zuno, @ansimuz)"
IMAGES = "kenney/arcade/resources/assets/images/"
POSES = "idle walk0 jump walk2 fall walk4 walk6 walk7".split()

CHARACTERS = [("girl_adventurer", "female_adventurer/femaleAdventurer", "woman"),
              ("woman_green", "female_person/femalePerson", "woman"),
              ("boy_adventurer", "male_adventurer/maleAdventurer", "man"),
              ("man_moustache", "male_person/malePerson", "man"), ("zombie", "zombie/zombie", "person")]
SUBJECTS = [("poodle", "noto", "poodle", "dog"), ("service_dog", "twemoji", "service_dog", "dog"),
            ("brown_dog_3d", "fluent3d", "dog", "dog"), ("black_cat", "twemoji", "black_cat", "cat"),
            ("teddy", "noto", "teddy_bear", "bear")]
STYLE_NOUNS = "cat car apple owl house penguin guitar mushroom".split()
MORE_3D = """bear rabbit fox_face=fox panda_face=panda lion_face=lion cow pig frog monkey_face=monkey turtle octopus
    crab elephant fish whale bee butterfly rocket bus train airplane boat robot_face=robot ghost alien snowman
    crown""".split()
MORE_FLAT = """dog tiger=animal koala=animal unicorn_face=animal parrot=animal flamingo=animal tent tulip=plant cactus
    umbrella hamburger doughnut pizza balloon soccer=soccer+ball princess=woman""".split()
MORE_KENNEY = [("blue_robot", [f"animated_characters/robot/robot_{p}" for p in POSES], "robot"),
               ("blue_alien", [f"alien/alienBlue_{p}" for p in ("front", "walk1", "jump", "climb1")], "alien"),
               ("blue_slime", ["enemies/slimeBlue", "enemies/slimeBlue_move"], "animal"),
               ("orange_ship", ["space_shooter/playerShip1_orange"], "rocket"),
               ("pink_worm", ["enemies/wormPink"], "snake"), ("gold_star", ["items/star"], "star")]
TILES = [("enemies/frog", "frog", "grass"), ("enemies/bee", "bee", "grass"), ("enemies/ladybug", "ladybug", "sand"),
         ("enemies/fishPink", "fish", "snow"), ("items/keyYellow", "key", "stone"), ("items/gemRed", "diamond", "dirt"),
         ("tiles/cactus", "cactus", "sand"), ("enemies/mouse", "animal", "snow")]

RECONTEXT = ["a {c} on the beach", "a {c} in the snow", "a {c} on a red background", "a {c} under the night sky",
             "a {c} in the city", "a {c} in a room"]
INTERACTION = ["a {c} and a cat", "a {c} next to a car in the city", "a {c} and a house in a meadow",
               "a tree and a {c} on a blue background", "a {c} left of an umbrella on the beach"]
STYLED = ["a {c}, noto style", "a {c}, twemoji style", "a {c} in a meadow, noto style",
          "a {c} on a white background, twemoji style"]
PROPERTY = ["a small {c} on a yellow background", "a big {c} in the mountains", "a small {c} on the left in the snow",
            "a big {c} on a pink background", "a small {c} on the right on the sea"]
KINDS = ["recontext"] * 6 + ["interaction"] * 5 + ["style"] * 4 + ["property"] * 5
IN_SCENE = {
    "recontext": ["the {c}", "a picture of the {c}", "a dog {p} the {c}", "a rocket {p} the {c}", "a penguin {p} the {c}",
                  "a woman {p} the {c}"],
    "interaction": ["a cat and a car {p} the {c}", "a man and a dog {p} the {c}", "a tree next to a house {p} the {c}",
                    "a robot and an alien {p} the {c}", "a bus left of a bear {p} the {c}"],
    "style": ["a cat {p} the {c}, noto style", "a cat {p} the {c}, twemoji style", "a car {p} the {c}, noto style",
              "a car {p} the {c}, twemoji style"],
    "property": ["a small dog {p} the {c}", "a big dog {p} the {c}", "a small car on the left {p} the {c}",
                 "a big ghost {p} the {c}", "a small star on the right {p} the {c}"]}
IN_STYLE = {
    "recontext": ["a dog on the beach, {c}", "a rocket under the night sky, {c}", "a woman in the snow, {c}",
                  "a fish on the sea, {c}", "a bear in a meadow, {c}", "a robot in the city, {c}"],
    "interaction": ["a cat and a balloon, {c}", "a man and a dog on a blue background, {c}", "a tree next to a house, {c}",
                    "a lion and a crown on a red background, {c}", "a bus left of a tree in the city, {c}"],
    "style": ["a cat, {c}", "a car, {c}", "an owl, {c}", "an elephant, {c}"],
    "property": ["a small car on the left, {c}", "a big pizza, {c}", "a small fox on a green background, {c}",
                 "a big turtle in the snow, {c}", "a small train in the mountains, {c}"]}


class Concept:
    """`draw(rng, i)` -> picture and caption; `i` numbers the eight pictures (poses, nouns)."""

    def __init__(self, name, kind, word, source, licence, draw, prompts, kinds=tuple(KINDS)):
        self.name, self.kind, self.word, self.source, self.licence = name, kind, word, source, licence
        self.draw, self.prompts, self.kinds = draw, prompts, list(kinds)

    def pictures(self, count, seed):
        """Deterministic; a further seed gives unseen real pictures of the same concept."""
        rng = random.Random(zlib.crc32(self.name.encode()) + seed)
        return [self.draw(rng, i) for i in range(count)]


def subject(name, kind, word, source, licence, sprites, size, turn):
    """Cut-outs over the world's backgrounds; mirrored, turned, small to large."""
    def draw(rng, i):
        dark = name in ("black_cat",)
        while True:
            canvas, phrase, _ = world.background(rng, size, "solid" if i % 4 == 0 else "scene")
            if not (dark and ("black" in phrase or "night" in phrase)):
                break
        sprite = sprites[i % len(sprites)]
        if rng.random() < .5:
            sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
        sprite = art.squared(sprite.rotate(rng.uniform(-turn, turn), Image.BICUBIC, expand=True))
        layout = "big" if i % 3 == 1 else "normal"
        world.place(canvas, sprite, layout, world.LEFT[layout][""], rng, .06)
        return canvas, f"a {{c}} {phrase}"
    return Concept(name, kind, word, source, licence, draw, RECONTEXT + INTERACTION + STYLED + PROPERTY)


def place_concept(name, word, preposition, layers, crop, sprites, size, folder):
    """A parallax background at a random offset: five times empty, three times with an object of the world."""
    opened = [sprites.open_raw(folder + f) for f in layers]
    guests = [("dog", "noto"), ("car", "twemoji"), ("man", "noto")]

    def draw(rng, i):
        view = Image.new("RGBA", (crop, crop))
        for layer in opened:
            x, y = int(rng.uniform(0, layer.width)), layer.height - crop
            wide = Image.new("RGBA", (layer.width * 3, layer.height))
            for k in range(3):
                wide.paste(layer, (k * layer.width, 0))
            view.alpha_composite(wide.crop((x, y, x + crop, y + crop)))
        canvas = view.convert("RGB").resize((size, size), Image.LANCZOS)
        if i % 8 < 5:
            return canvas, "a picture of the {c}" if i % 2 else "the {c}"
        noun, style = guests[i % 8 - 5]
        world.place(canvas, sprites.get(style, noun), "small", rng.choice([0.0, .25, .5]))
        return canvas, f"a {noun} {preposition} the {{c}}, {style} style"
    prompts = [p.replace("{p}", preposition) for kind in IN_SCENE.values() for p in kind]
    return Concept(name, "scene", word, "arcade 3.3.3, " + folder.split("/")[-2 if "layers" not in folder else -3],
                   ANSIMUZ, draw, prompts)


def style_concept(name, set_name, licence, sprites, size):
    opened = [(noun, sprites.get(set_name, noun)) for noun in STYLE_NOUNS]

    def draw(rng, i):
        noun, sprite = opened[i % len(opened)]
        canvas, phrase, _ = world.background(rng, size)
        world.place(canvas, sprite, "normal", .125, rng, .06)
        return canvas, f"{world.article(noun)} {phrase}, {{c}}"
    return Concept(name, "style", "style", "Fluent Emoji, " + set_name, licence, draw, sum(IN_STYLE.values(), []))


def tiles_concept(sprites, size):
    opened = [(noun, sprites.open(sprites.art / IMAGES / f"{f}.png"),
               sprites.open_raw(IMAGES + f"tiles/{ground}Mid.png")) for f, noun, ground in TILES]

    def draw(rng, i):
        noun, sprite, tile = opened[i % len(opened)]
        big = size * 4
        canvas = Image.new("RGB", (big, big), world.jitter(rng, (208, 240, 250), 10))
        side, left, top = int(big * .38), -rng.randint(0, big // 4), int(big * rng.uniform(.66, .74))
        for k in range(5):
            canvas.paste(tile.resize((side, side)), (left + k * (side - 1), top), tile.resize((side, side)))
        w = int(big * .62)
        cut = sprite.resize((w, w), Image.LANCZOS)
        canvas.paste(cut, (rng.randint(int(big * .1), int(big * .28)), top + 3 - cut.getbbox()[3]), cut)
        return canvas.resize((size, size), Image.BOX), f"{world.article(noun)}, {{c}}"
    return Concept("platform_tiles", "style", "style", "Kenney platformer, arcade 3.3.3", CC0, draw,
                   sum(IN_STYLE.values(), []))


class ConceptSprites(art.Sprites):
    def open_raw(self, path):
        self.open(self.art / path)                       # notes the digest
        return Image.open(self.art / path).convert("RGBA")


def all_concepts(art_folder, size):
    """-> the 15 and the 49 more, and the digests of every held-out sprite."""
    sprites = ConceptSprites(art_folder)
    kenney = lambda paths: [sprites.open(sprites.art / IMAGES / f"{p}.png") for p in paths]
    concepts = [subject(name, "person", word, f"Kenney {f.split('/')[0]}, arcade 3.3.3", CC0,
                        kenney([f"animated_characters/{f}_{p}" for p in POSES]), size, 4)
                for name, f, word in CHARACTERS]
    licences = {"noto": NOTO, "twemoji": TWEMOJI, "fluent3d": FLUENT, "fluentflat": FLUENT}
    sources = {"noto": "Noto Emoji", "twemoji": "Twemoji", "fluent3d": "Fluent Emoji 3D", "fluentflat": "Fluent Emoji flat"}
    one = lambda name, s, short, word: subject(name, "subject", word, f"{sources[s]}, {short}", licences[s],
                                               [sprites.get(s, short)], size, 10)
    concepts += [one(*c) for c in SUBJECTS]
    folder = IMAGES + "cybercity_background/"
    concepts.append(place_concept("cyber_city", "city", "in", ["far-buildings.png", "back-buildings.png", "foreground.png"],
                                  176, sprites, size, folder))
    folder = IMAGES + "miami_synth_parallax/layers/"
    concepts.append(place_concept("miami_sunset", "beach", "on", [f"{x}.png" for x in ("back", "sun", "buildings", "palms", "highway")],
                                  224, sprites, size, folder))
    concepts += [style_concept("glossy_3d", "fluent3d", FLUENT, sprites, size),
                 style_concept("fluent_flat", "fluentflat", FLUENT, sprites, size), tiles_concept(sprites, size)]
    more = []
    for words, s, suffix in ((MORE_3D, "fluent3d", "3d"), (MORE_FLAT, "fluentflat", "flat")):
        for word in words:
            short, _, noun = word.partition("=")
            more.append(one(f"{short.replace('_face', '')}_{suffix}", s, short, (noun or short).replace("+", " ")))
    more += [subject(name, "subject", word, "Kenney, arcade 3.3.3", CC0, kenney(paths), size, 6)
             for name, paths, word in MORE_KENNEY]
    guests = {"noto": {"dog", "man"}, "twemoji": {"car"}}
    guest_digests = art.Sprites(art_folder)
    for style, shorts in guests.items():
        for short in shorts:
            guest_digests.get(style, short)
    held = {d: f for d, f in sprites.digests.items() if d not in guest_digests.digests}
    return concepts, more, held


def check_held_out(held, trained):
    """Fails when a sprite of a concept was trained on, by the model or by the scorer."""
    both = set(held) & set(trained)
    if both:
        raise SystemExit("trained on held-out art: " + ", ".join(held[d] for d in both))
    print(f"held out: {len(held)} sprites of the concepts, none among the {len(trained)} trained on")


def run(cfg, out, art_folder, destination):
    destination = Path(destination)
    concepts, more, held = all_concepts(art_folder, cfg["size"])
    check_held_out(held, read_json(out / "trained_digests.json"))
    entries, rows = [], []
    for concept in concepts + more:
        folder = destination / concept.name
        folder.mkdir(parents=True, exist_ok=True)
        images = []
        for i, (picture, caption) in enumerate(concept.pictures(8, 0)):
            picture.save(folder / f"{i}.png", optimize=True)
            images.append({"file": f"{concept.name}/{i}.png", "caption": caption})
            rows.append(np.asarray(picture))
        assert len(concept.prompts) == 20 and len(concept.kinds) == 20
        entries.append({"name": concept.name, "kind": concept.kind, "class": concept.word, "images": images,
                        "prompts": concept.prompts, "prompt_kinds": concept.kinds, "source": concept.source,
                        "licence": concept.licence})
    write_json(destination / "concepts.json", entries[:len(concepts)])
    write_json(destination / "concepts64.json", entries)
    write_json(destination / "held_out.json", {"concepts": held, "note": "sha256 of every sprite of the concepts; "
                                               "none is among the digests of what the model and the scorer saw"})
    return np.stack(rows[:8 * len(concepts)]), np.stack(rows)
