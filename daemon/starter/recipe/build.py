#!/usr/bin/env python3
"""Builds the starter model from registry packages: one command, resumable.

    python build.py cpu.toml --work ~/starter-work --output ..        everything
    python build.py cpu.toml --work ... --output ... --stages unet,export,score
    python build.py cpu.toml --work ... --output ... --from FOLDER    trains a finished folder's UNet and scorer further
    python build.py --smoke --work /tmp/smoke                         the whole pipeline in minutes

A stage that is done is not done again (work/<name>.done); the training stages go on from their checkpoints.
`touch work/STOP` ends the UNet's training with a checkpoint; `--until HH:MM` ends it at a moment of the day.
Where torch is missing, a virtual environment is made in the work folder from requirements.txt.
"""
import argparse
import datetime
import os
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = ["fetch", "compose", "tokenizer", "vae", "clip", "encode", "unet", "scorer", "export", "concepts", "score", "sheets"]
# glibc gives pages back and faults them in again at every step of training; these keep them
ONE_THREAD = {"THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4000000000",
              "MALLOC_TRIM_THRESHOLD_": "20000000000", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def ensure_environment(work):
    """Restarts in a virtual environment of its own when this Python has no torch."""
    try:
        import diffusers, torch, transformers  # noqa: F401
    except ImportError:
        python = work / "venv/bin/python"
        if Path(sys.prefix).resolve() == (work / "venv").resolve():
            raise
        if not python.exists():
            venv.create(work / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"], check=True)
        os.execv(python, [str(python), *sys.argv])


def processes(cfg):
    import torch
    return 1 if torch.cuda.is_available() else min(cfg["processes"], os.cpu_count())


def start(arguments, rank=0, world=1, **environment):
    """This script again for one stage in a process of its own."""
    env = dict(os.environ, RANK=str(rank), WORLD=str(world), **environment)
    return subprocess.Popen([sys.executable, "-u", __file__, *arguments], env=env)


def wait(children):
    if any([c.wait() for c in children]):
        raise SystemExit("a stage failed")


def ranks(cfg, arguments, work):
    """The stage on every process at once."""
    world = processes(cfg)
    extra = {**(ONE_THREAD if world > 1 else {}), "RENDEZVOUS": str(work / f"rendezvous_{time.time_ns()}")}
    wait([start(arguments, r, world, **extra) for r in range(world)])


def run_stage(name, cfg, work, output, art_folder, start_folder):
    """One stage, in this process."""
    if name == "fetch":
        import art
        art.fetch(art_folder)
    elif name == "compose":
        import compose
        compose.run(cfg, work, art_folder, os.cpu_count())
    elif name == "from":
        import onward
        onward.run(work, start_folder)
    elif name == "tokenizer":
        import tokenizer
        tokenizer.run(cfg, work)
    elif name in ("vae", "clip", "unet"):
        import importlib
        importlib.import_module("train_" + name).run(cfg, work)
    elif name == "scorer":
        import train_clip
        train_clip.run_scorer(cfg, work)
    elif name in ("latents", "texts"):
        import encode
        {"latents": encode.encode_latents, "texts": encode.encode_texts}[name](cfg, work)
    elif name == "export":
        import export
        export.run(cfg, work, output)
    elif name == "concepts":
        import concepts
        import sheets
        first, every = concepts.run(cfg, work, art_folder, output / "concepts")
        sheets.sheet(first, None, output / "sheets/concepts.png", 8, 2)
        sheets.sheet(every, None, output / "sheets/concepts64.png", 32, 1)
    elif name == "score":
        import score
        score.run(cfg, work, art_folder, output)
    elif name == "sheets":
        import sheets
        sheets.run(cfg, work, output / "model", output / "sheets")


def orchestrate(stages, cfg, options, work, output):
    """Runs the stages in order; VAE and CLIP side by side on a CPU, the UNet as one process per core."""
    common = [str(options.config), "--work", str(work), "--output", str(output), "--art", str(options.art)]
    if options.until:
        common += ["--until", options.until]
    if options.start:
        common += ["--from", str(options.start)]
        stages = ["from", *stages]
    done = lambda name: work / f"{name}.done"
    for name in stages:
        if done(name).exists():
            continue
        began = time.time()
        if name == "vae" and "clip" in stages and not done("clip").exists() and processes(cfg) > 1:
            wait([start([*common, "--one", n], **ONE_THREAD) for n in ("vae", "clip")])
            done("clip").touch()
        elif name == "encode":
            import encode
            ranks(cfg, [*common, "--one", "latents"], work)
            encode.join(work, "latents", processes(cfg))
            ranks(cfg, [*common, "--one", "texts"], work)
            encode.join(work, "text_states", processes(cfg))
        elif name == "unet":
            ranks(cfg, [*common, "--one", "unet"], work)
        else:
            wait([start([*common, "--one", name])])
        done(name).touch()
        print(f"stage {name}: {time.time() - began:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=HERE / "cpu.toml")
    parser.add_argument("--work", type=Path, required=True, help="folder for art, pools, checkpoints")
    parser.add_argument("--art", type=Path, help="folder of the fetched packages (default: work/art)")
    parser.add_argument("--output", type=Path, help="folder that gets model/, clip/, concepts/, sheets/, scores.json")
    parser.add_argument("--stages", help="only these, separated by commas, even if done: " + ",".join(STAGES))
    parser.add_argument("--until", help="end the UNet's training at this time of the day, HH:MM")
    parser.add_argument("--from", dest="start", type=Path, help="go on from the model/ and clip/ in this folder")
    parser.add_argument("--smoke", action="store_true", help="smoke.toml: everything, tiny")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.config = HERE / "smoke.toml"
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options.art = (options.art or work / "art").resolve()
    output = (options.output or work / "output").resolve()
    ensure_environment(work)
    sys.path.insert(0, str(HERE))
    cfg = tomllib.loads(options.config.read_text())
    if options.start:
        import onward
        options.start = options.start.resolve()
        onward.configure(cfg)
    if options.until:
        now = datetime.datetime.now()
        end = now.replace(hour=int(options.until[:2]), minute=int(options.until[3:]), second=0)
        cfg["unet"]["ends_at"] = (end if end > now else end + datetime.timedelta(days=1)).timestamp()
    if options.one:
        run_stage(options.one, cfg, work, output, options.art, options.start)
        return
    stages = options.stages.split(",") if options.stages else STAGES
    for name in stages if options.stages else []:
        if name not in STAGES:
            raise SystemExit(f"no stage {name}")
        (work / f"{name}.done").unlink(missing_ok=True)
    orchestrate(stages, cfg, options, work, output)


if __name__ == "__main__":
    main()
