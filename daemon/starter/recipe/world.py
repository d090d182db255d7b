"""The world the starter model learns: nouns, styles, backgrounds, layouts and captions.

Pictures are composed from emoji sprites over solid colours or small drawn scenes. Everything random comes
from the `random.Random` that is passed in, so a seed names a picture. Few degrees of freedom are left on
purpose: a sprite keeps its pose, its size and place are among the few that the caption can name, and a scene
has a handful of variants. A small model learns such a world sharply; a freer one it learns as blur.
"""
import random
import zlib
from functools import lru_cache
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw

STYLES = ["noto", "twemoji"]

# emoji short name[=noun]; "+" stands for a space. The group is the super-class word of its nouns.
GROUPS = {
    "person": "man woman baby santa",
    "animal": """dog cat rabbit fox_face=fox bear panda_face=panda lion_face=lion cow pig frog monkey_face=monkey
        penguin owl bee ladybug butterfly turtle snake fish whale octopus crab elephant""",
    "plant": "deciduous_tree=tree palm_tree=palm+tree cactus mushroom sunflower",
    "food": "apple banana strawberry pineapple hamburger pizza icecream=ice+cream birthday=cake doughnut",
    "vehicle": "car bus train airplane rocket boat",
    "building": "house japanese_castle=castle tent",
    "object": """crown umbrella soccer=soccer+ball balloon gift guitar key closed_book=book heart star sunny=sun
        snowman ghost alien robot_face=robot gem=diamond""",
}

COLORS = {
    "red": (214, 48, 49), "orange": (240, 140, 40), "yellow": (250, 214, 70), "green": (60, 160, 80),
    "blue": (50, 100, 210), "purple": (130, 70, 180), "pink": (250, 165, 195), "black": (25, 25, 28),
    "white": (250, 250, 250), "gray": (150, 152, 156),
}

# scene key: (phrase after a noun, noun phrase of the empty scene)
SCENES = {
    "beach": ("on the beach", "the beach"), "meadow": ("in a meadow", "a meadow"),
    "snow": ("in the snow", "a snow field"), "night": ("under the night sky", "the night sky"),
    "city": ("in the city", "a city"), "sea": ("on the sea", "the sea"),
    "room": ("in a room", "a room"), "mountains": ("in the mountains", "mountains"),
}
SCENE_VARIANTS = 3

THE = {"sun"}


def nouns():
    """-> list of {"short", "noun", "group"}, in a fixed order."""
    table = []
    for group, words in GROUPS.items():
        for word in words.split():
            short, _, noun = word.partition("=")
            table.append({"short": short, "noun": (noun or short).replace("+", " "), "group": group})
    return table


def article(noun):
    """The noun with its article: "an apple", "the sun", "grapes"."""
    if noun in THE:
        return "the " + noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def color_phrase(name):
    return f"on {article(name)} background"


def backgrounds():
    """Every phrase that names a background."""
    return [color_phrase(c) for c in COLORS] + [phrase for phrase, _ in SCENES.values()]


# ---------------------------------------------------------------------------------------------- backgrounds

def jitter(rng, color, amount=4):
    return tuple(int(min(255, max(0, v + rng.uniform(-amount, amount)))) for v in color)


def gradient(width, height, top, bottom):
    t = np.linspace(0, 1, height)[:, None, None]
    rows = np.array(top) * (1 - t) + np.array(bottom) * t
    return Image.fromarray(np.broadcast_to(rows, (height, width, 3)).astype(np.uint8))


def draw_meadow(d, s, rng):
    d.vgrad(0, s, (110, 180, 240), (190, 225, 250))
    d.cloud(rng.uniform(.1, .9), rng.uniform(.1, .2))
    d.box(0, .6, 1, 1, (90, 180, 70))
    for _ in range(9):
        d.dot(rng.uniform(0, 1), rng.uniform(.66, .98), .025, (60, 140, 50))


def draw_beach(d, s, rng):
    d.vgrad(0, s, (130, 200, 250), (200, 235, 250))
    d.dot(rng.uniform(.1, .9), .14, .09, (255, 225, 90))
    d.box(0, .4, 1, .62, (40, 150, 200))
    d.box(0, .62, 1, 1, (240, 215, 150))
    d.box(0, .60, 1, .64, (245, 250, 250))


def draw_night(d, s, rng):
    d.vgrad(0, s, (12, 16, 50), (40, 45, 95))
    for _ in range(16):
        d.dot(rng.uniform(0, 1), rng.uniform(0, 1), .018, (250, 245, 210))


def draw_snow(d, s, rng):
    d.vgrad(0, s, (160, 185, 215), (205, 220, 235))
    d.ellipse(-.4, .55, .8, 1.6, (232, 238, 247))
    d.ellipse(.2, .6, 1.5, 1.6, (248, 250, 254))
    for _ in range(12):
        d.dot(rng.uniform(0, 1), rng.uniform(0, .6), .025, (255, 255, 255))


def draw_room(d, s, rng):
    d.box(0, 0, 1, 1, rng.choice([(235, 215, 190), (240, 205, 195), (222, 222, 196)]))
    d.box(0, .7, 1, 1, (150, 100, 65))
    d.box(0, .68, 1, .71, (250, 245, 240))
    x = rng.choice([.06, .66])
    d.box(x - .03, .09, x + .28, .42, (255, 255, 255))
    d.box(x, .12, x + .25, .39, (160, 210, 240))


def draw_sea(d, s, rng):
    d.vgrad(0, int(s * .45), (150, 205, 245), (225, 238, 245))
    d.vgrad(int(s * .45), s, (40, 130, 200), (15, 70, 150))
    for _ in range(7):
        x, y = rng.uniform(0, .9), rng.uniform(.5, .95)
        d.box(x, y, x + .1, y + .02, (150, 205, 235))


def draw_city(d, s, rng):
    d.vgrad(0, s, (150, 190, 230), (235, 220, 205))
    x = -.05
    while x < 1:
        w, y, c = rng.uniform(.16, .22), rng.uniform(.12, .45), jitter(rng, (110, 115, 135), 20)
        d.box(x, y, x + w, .84, c)
        for row in range(4):
            for col in (.22, .62):
                top = y + .06 + row * .12
                if top < .78:
                    d.box(x + w * col, top, x + w * (col + .2), top + .05, (250, 230, 140))
        x += w + .01
    d.box(0, .84, 1, 1, (75, 77, 82))
    d.box(0, .91, 1, .93, (230, 215, 120))


def draw_mountains(d, s, rng):
    d.vgrad(0, s, (140, 190, 240), (225, 235, 245))
    for x0 in (.15, .85, .5):
        x, y, w = x0 + rng.uniform(-.1, .1), rng.uniform(.18, .35), rng.uniform(.35, .45)
        d.poly([(x, y), (x - w, .8), (x + w, .8)], jitter(rng, (105, 110, 135), 14))
        t, h = .3, .8 - y
        d.poly([(x, y), (x - w * t, y + h * t), (x + w * t, y + h * t)], (248, 250, 252))
    d.box(0, .75, 1, 1, (80, 140, 85))


class Canvas:
    """Draws in fractions of the picture's side; made at twice the size and reduced for smooth edges."""

    def __init__(self, side):
        self.side, self.image = side, Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.image)

    def vgrad(self, y0, y1, top, bottom):
        self.image.paste(gradient(self.side, y1 - y0, top, bottom), (0, y0))

    def box(self, x0, y0, x1, y1, color):
        s = self.side
        self.draw.rectangle((x0 * s, y0 * s, x1 * s - 1, y1 * s - 1), fill=color)

    def ellipse(self, x0, y0, x1, y1, color):
        self.draw.ellipse([v * self.side for v in (x0, y0, x1, y1)], fill=color)

    def dot(self, x, y, r, color):
        self.ellipse(x - r, y - r, x + r, y + r, color)

    def poly(self, points, color):
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=color)

    def cloud(self, x, y):
        for dx, r in ((0, .06), (.08, .08), (.16, .05)):
            self.ellipse(x + dx - r * 1.3, y - r * .7, x + dx + r * 1.3, y + r * .7, (255, 255, 255))


@lru_cache(maxsize=None)
def scene(size, kind, variant):
    canvas = Canvas(size * 2)
    globals()["draw_" + kind](canvas, canvas.side, random.Random(f"{kind} {variant}"))
    return canvas.image.resize((size, size), Image.BOX)


def solid(rng, size, name):
    return Image.new("RGB", (size, size), jitter(rng, COLORS[name]))


def background(rng, size, kind=None):
    """-> image, phrase, scene key or None. `kind`: "solid", "scene" or None (either, 45 : 55)."""
    if kind == "solid" or (kind is None and rng.random() < .45):
        name = rng.choice(list(COLORS))
        return solid(rng, size, name), color_phrase(name), None
    key = rng.choice(list(SCENES))
    return scene(size, key, rng.randrange(SCENE_VARIANTS)).copy(), SCENES[key][0], key


# -------------------------------------------------------------------------------------------------- layouts

# layout: side of the sprite's square and its top, in fractions of the picture's side. All fall on whole cells of
# the latents at 32 and 64 px, so a sprite in one layout has one latent and a small model can learn it sharply.
SQUARE = {"normal": (.75, .125), "big": (1.0, 0.0), "small": (.5, .375), "two": (.5, .375), "three": (.3125, .5625)}
LEFT = {"normal": {"": .125}, "big": {"": 0.0}, "small": {"left": 0.0, "": .25, "right": .5}}
SPREAD = {"two": (0.0, .5), "three": (.03125, .34375, .65625)}


def squares(count, size):
    """Where the objects of a picture of two or three stand, left to right: (x, y, side) in pixels."""
    layout = {2: "two", 3: "three"}[count]
    side, top = SQUARE[layout]
    return [(round(size * left), round(size * top), round(size * side)) for left in SPREAD[layout]]


_sprites = {}


@lru_cache(maxsize=20000)
def _resized(key, width):
    return _sprites[key].resize((width, width), Image.LANCZOS)


def place(canvas, sprite, layout, left, rng=None, wander=0.0):
    """Pastes a square RGBA sprite at `left` (fraction of the width). `wander` moves it and changes its size by up
    to this fraction of the picture, for concepts, whose pictures should differ."""
    s = canvas.width
    side, top = SQUARE[layout]
    if wander:
        side *= 1 - wander * rng.random()
        left, top = (v + wander * rng.uniform(-1, 1) for v in (left, top))
    w = round(s * side)
    _sprites[id(sprite)] = sprite
    image = _resized(id(sprite), w)
    x, y = (min(max(round(s * v), 0), s - w) for v in (left, top))
    canvas.paste(image, (x, y), image)


def held_back(*parts):
    """One combination in ten is never trained on: the validation pictures and captions come from these."""
    return zlib.crc32("|".join(parts).encode()) % 10 == 0


def finish_caption(rng, objects, phrase, style):
    text = objects
    if rng.random() < .1:
        text = "a picture of " + text
    if rng.random() > .1:
        text += " " + phrase
    if rng.random() > .12:
        text += f", {style} style"
    return text


COUNTS = (.05, .61, .31, .03)    # shares of pictures of none, one, two and three objects


def sample(rng, sprites, table, size, held=False, counts=COUNTS):
    """One composed picture.

    `sprites[style][i]` is the RGBA sprite of `table[i]`; `held` asks for held-back combinations only;
    `counts` are the shares of pictures of none, one, two and three objects.
    -> image, caption, {"n": noun indices, "s": style, "b": background phrase, "size": size word}
    """
    while True:
        r, style = rng.random(), rng.choice(STYLES)
        image, phrase, key = background(rng, size)
        count = next((k for k, top in enumerate(accumulate(counts[:3])) if r < top), 3)
        picks = [rng.randrange(len(table)) for _ in range(count)]
        names = [table[i]["noun"] for i in picks]
        if len(set(picks)) < count or (count == 0 and (key is None or held)):
            continue
        if held_back(*(names + [style] + ([phrase] if count == 1 else []))) == held or count == 0:
            break
    meta = {"n": picks, "s": style, "b": phrase, "size": ""}
    if count == 0:
        return image, rng.choice(["", "a picture of "]) + SCENES[key][1], meta

    def word(i):
        group = table[i]["group"]
        return group if group != "object" and rng.random() < .07 else table[i]["noun"]

    if count == 1:
        layout = rng.choices(["normal", "big", "small"], [.6, .15, .25])[0]
        spot = rng.choice(["left", "", "right"]) if layout == "small" else ""
        place(image, sprites[style][picks[0]], layout, LEFT[layout][spot])
        noun = word(picks[0])
        text = article(noun)
        if layout != "normal":
            text = (f"the {layout} {noun}" if noun in THE else f"a {layout} {noun}")
            meta["size"] = layout
        if spot:
            text += f" on the {spot}"
        return image, finish_caption(rng, text, phrase, style), meta
    layout = "two" if count == 2 else "three"
    for i, left in zip(picks, SPREAD[layout]):
        place(image, sprites[style][i], layout, left)
    words = [article(word(i)) for i in picks]
    if count == 3:
        text = f"{words[0]}, {words[1]} and {words[2]}"
    else:
        r = rng.random()
        text = (f"{words[0]} and {words[1]}" if r < .6 else f"{words[0]} next to {words[1]}" if r < .75
                else f"{words[0]} left of {words[1]}" if r < .9 else
                f"{words[0]} on the left and {words[1]} on the right")
    return image, finish_caption(rng, text, phrase, style), meta
