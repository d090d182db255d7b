#!/usr/bin/env python3
"""Trains every concept of ../concepts/concepts.json, each by itself and in a slot of its own.

    python3 train.py --out DIR [--method blocklora|ed-lora] [--config FILE] [--only NAME ...] [--jobs N]

The bundled adapters are what `blocklora separate DIR --output SEPARATED` makes of them.

Uses the built `blocklora` command ($BLOCKLORA, else the one on the path). What is already there is left alone; what was
interrupted is resumed. The same model, pictures, settings and seed give the same files, byte for byte.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent


def write_captions(folder, concept):
    """The concept's captions as `metadata.jsonl` beside its pictures, where `blocklora train` looks for them."""
    lines = [
        json.dumps({"file_name": pathlib.PurePath(image["file"]).name, "text": image["caption"]}) + "\n"
        for image in concept["images"]
    ]
    (folder / concept["name"] / "metadata.jsonl").write_text("".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="blocklora")
    parser.add_argument("--config", type=pathlib.Path, help="settings; for other keys those of the model's folder count")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--concepts", type=pathlib.Path, default=HERE.parent / "concepts" / "concepts.json")
    parser.add_argument("--base", type=pathlib.Path, default=HERE.parent / "model")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=1, help="concepts trained at the same time, one thread each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    concepts = json.loads(options.concepts.read_text())
    for concept in concepts:
        write_captions(options.concepts.parent, concept)

    def train(slot, concept):
        name = concept["name"]
        output = options.out / f"{name}.safetensors"
        if output.exists():
            return name, 0, "there already"
        command = [os.environ.get("BLOCKLORA", "blocklora"), "train", "--base", options.base]
        command += ["--images", options.concepts.parent / name, "--class", concept["class"], "--kind", concept["kind"]]
        command += ["--name", name, "--method", options.method, "--seed", "1", "-o", output]
        if options.config:
            command += ["--config", options.config]
        if options.method == "blocklora":
            command += ["--slot", str(slot)]
        # Whatever runs now: the checkpoint is that of a run without a daemon.
        if pathlib.Path(f"{output}.checkpoint").exists():
            command += ["--daemon", "private", "--resume"]
        environment = dict(os.environ, RAYON_NUM_THREADS="1") if options.jobs > 1 else None
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        return name, done.returncode, (done.stdout + done.stderr).strip()

    failed = False
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        wanted = [(i, c) for i, c in enumerate(concepts) if not options.only or c["name"] in options.only]
        for name, code, said in pool.map(lambda pair: train(*pair), wanted):
            print(f"{name}: {(said or 'done').splitlines()[-1]}", flush=True)
            failed |= code != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
