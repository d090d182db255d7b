"""Fetches the art from package registries and opens its sprites.

Packages come through the ordinary clients (`npm pack`, `pip download`), at fixed versions. Nothing here is
share-alike; see LICENSES.md. Every sprite is known by the sha256 of its file, so that `concepts.py` can prove
that nothing held out was trained on.
"""
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

# folder: (client, package, version, member prefixes that are unpacked)
PACKAGES = {
    "noto": ("npm", "emoji-datasource-google", "16.0.0", ("package/img/google/64/", "package/emoji.json")),
    "twemoji": ("npm", "emoji-datasource-twitter", "16.0.0", ("package/img/twitter/64/",)),
    "fluent3d": ("npm", "@lobehub/fluent-emoji-3d", "1.1.0", ("package/assets/", "package/LICENSE")),
    "fluentflat": ("npm", "@iconify-json/fluent-emoji-flat", "1.2.6",
                   ("package/icons.json", "package/chars.json", "package/info.json")),
    "kenney": ("pip", "arcade", "3.3.3", ("arcade/resources/assets/",)),
}

# Held out of everything that is trained: the concepts' own emoji, in both base styles.
HELD_OUT = {"poodle", "service_dog", "guide_dog", "black_cat", "teddy_bear", "parrot", "flamingo", "peacock",
            "tropical_fish", "racing_car", "tophat", "teapot", "unicorn_face", "dragon", "dragon_face"}
SKIPPED_CATEGORIES = {"Symbols", "Flags", "Component"}


def fetch(art):
    """Downloads and unpacks every package that is not there yet into `art`/<folder>."""
    art = Path(art)
    art.mkdir(parents=True, exist_ok=True)
    for folder, (registry, name, version, prefixes) in PACKAGES.items():
        done = art / folder / ".done"
        if done.exists():
            continue
        archive = _download(art, registry, name, version)
        print("unpacking", archive.name)
        (art / folder).mkdir(exist_ok=True)
        _unpack(archive, art / folder, prefixes)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        done.write_text(f"{name} {version} {digest}\n")


def _download(art, registry, name, version):
    if registry == "npm":
        stem = name.lstrip("@").replace("/", "-")
        path = art / f"{stem}-{version}.tgz"
        if not path.exists():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=art, check=True)
        return path
    found = list(art.glob(f"{name}-{version}-*.whl"))
    if not found:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}"],
                       cwd=art, check=True)
        found = list(art.glob(f"{name}-{version}-*.whl"))
    return found[0]


def _unpack(archive, folder, prefixes):
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as z:
            z.extractall(folder, [n for n in z.namelist() if n.startswith(prefixes)])
    else:
        with tarfile.open(archive) as t:
            t.extractall(folder, [m for m in t.getmembers() if m.name.startswith(prefixes)], filter="data")


def squared(image, threshold=16):
    """The sprite's tight box, centred on a transparent square."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda v: 255 if v > threshold else 0).getbbox()
    if box:
        image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _code(text):
    """Code points without leading zeros and variation selectors, so that the sets' spellings meet."""
    return "-".join(p.lstrip("0") for p in text.lower().replace("_", "-").split("-") if p != "fe0f")


class Sprites:
    """Opens emoji of all sets by their short name; notes the digest of everything it opened."""

    def __init__(self, art):
        self.art = Path(art)
        self.table = json.loads((self.art / "noto/package/emoji.json").read_text())
        self.code = {e["short_name"]: _code(e["unified"]) for e in self.table}
        folders = {"noto": "noto/package/img/google/64", "twemoji": "twemoji/package/img/twitter/64",
                   "fluent3d": "fluent3d/package/assets"}
        self.files = {s: {_code(p.stem): p for p in (self.art / f).iterdir()} for s, f in folders.items()}
        flat = self.art / "fluentflat/package"
        self.flat = json.loads((flat / "icons.json").read_text())
        self.flat_chars = {_code(k): v for k, v in json.loads((flat / "chars.json").read_text()).items()}
        self.digests = {}

    def others(self, used):
        """Short names of every further emoji that may be trained on (VAE and scorer only)."""
        return [e["short_name"] for e in self.table
                if e["category"] not in SKIPPED_CATEGORIES and "clock" not in e["short_name"]
                and e["short_name"] not in used and e["short_name"] not in HELD_OUT]

    def get(self, style, short):
        """-> squared RGBA sprite, or None when the set lacks it."""
        code = self.code.get(short)
        if code is None:
            return None
        if style == "fluentflat":
            return self._svg(code)
        path = self.files[style].get(code)
        return self.open(path) if path else None

    def open(self, path):
        data = Path(path).read_bytes()
        self.digests[hashlib.sha256(data).hexdigest()] = str(Path(path).relative_to(self.art))
        return squared(Image.open(io.BytesIO(data)))

    def _svg(self, code, side=128):
        import resvg_py
        name = self.flat_chars.get(code)
        icons, aliases = self.flat["icons"], self.flat.get("aliases", {})
        if name is not None and name not in icons and name in aliases:
            name = aliases[name]["parent"]
        if name not in icons:
            return None
        icon = icons[name]
        w, h = icon.get("width", self.flat.get("width", 16)), icon.get("height", self.flat.get("height", 16))
        self.digests[hashlib.sha256(icon["body"].encode()).hexdigest()] = f"fluentflat/{name}"
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
               f'width="{side}" height="{side}" viewBox="0 0 {w} {h}">{icon["body"]}</svg>')
        return squared(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))))
