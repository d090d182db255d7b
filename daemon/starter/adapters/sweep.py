#!/usr/bin/env python3
"""The sweep behind the bundled settings: trains all fifteen concepts with each setting and scores them, alone and merged.

    python3 sweep.py --work DIR [--only NAME ...] [--sizes 1,15] [--prompts N] [--jobs N]

Settings are in sweep.toml: a method, what it is merged with, and what differs from that method's settings in the model's
folder (../model/blocklora.json).
Prints one line for each cell; everything that `blocklora score --json` says is kept in DIR/NAME.json, with the scores
of every picture. Prompts and seeds are the same in all settings, so the last columns are differences from the first
setting's row of that size and those concepts picture by picture, with their standard error.
"""
import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
MEASURES = ("image_alignment", "text_alignment", "identity")


def to_toml(settings):
    """Settings as TOML; tables as inline tables, which is all that training settings need."""
    def value(v):
        if isinstance(v, dict):
            return "{ " + ", ".join(f"{k} = {value(x)}" for k, x in v.items()) + " }"
        return json.dumps(v)
    return "".join(f"{k} = {value(v)}\n" for k, v in settings.items())


def train(options, name, setting):
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    config = options.work / f"{name}.toml"
    config.write_text(to_toml(setting.get("settings", {})))
    command = [sys.executable, HERE / "train.py", "--method", setting["method"], "--config", config, "--out", folder,
               "--jobs", str(options.jobs), *(["--only", *setting["only"]] if "only" in setting else [])]
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
    return folder


def separate(options, name, folder):
    separated = options.work / f"{name}-separated"
    if not separated.exists():
        command = [os.environ.get("BLOCKLORA", "blocklora"), "separate", folder, "--output", separated]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return separated


def score(options, name, setting, folder):
    result = options.work / f"{name}.json"
    if not result.exists():
        command = [os.environ.get("BLOCKLORA", "blocklora"), "score", "--set", f"{folder}={setting['merge']}",
                   "--sizes", setting.get("sizes", options.sizes), "--prompts", str(options.prompts), "--json", *setting.get("score", [])]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result.write_text(text)
    return json.loads(result.read_text())["rows"]


def pictures(row):
    """Every picture's scores in a fixed order."""
    return [p for _, each in sorted(row["pictures"].items()) for p in each]


def difference(row, other):
    """Mean and standard error of row - other, picture by picture, for each measure."""
    out = []
    for measure in MEASURES:
        d = [a[measure] - b[measure] for a, b in zip(pictures(row), pictures(other), strict=True)]
        mean = sum(d) / len(d)
        error = math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d))
        out.append(f"{mean:+.3f} ± {error:.3f}")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--settings", type=pathlib.Path, default=HERE / "sweep.toml")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sizes", default="1,15")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    settings = tomllib.loads(options.settings.read_text())
    first = {}
    print("| setting | merged as | merged | image | text | identity | image - first | text - first | identity - first |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, setting in settings.items():
        if options.only and name not in options.only:
            continue
        folder = options.work / setting["adapters"] if "adapters" in setting else train(options, name, setting)
        if setting.get("separate"):
            folder = separate(options, name, folder)
        for row in score(options, name, setting, folder):
            mean, error = row["mean"], row["standard_error"]
            cells = [f"{mean[m]:.3f} ± {error[m]:.3f}" for m in MEASURES]
            cells += difference(row, first.setdefault((row["merged"], len(pictures(row))), row))
            print("|", " | ".join([name, row["strategy"], str(row["merged"]), *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
