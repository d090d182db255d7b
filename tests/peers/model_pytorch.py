"""Times the parts of a model against PyTorch, diffusers and peft, and denoising steps against stable-diffusion.cpp: same
weights, same inputs, same threads, in turns.

    python tests/peers/model_pytorch.py [--cases unet1,vae,...] [--rounds 3] [--ours target/debug/blocklora] [--json]

Cases, all in f32 on the CPU:
  unet1, unet2    one prediction of SD 1.5's UNet at 64x64 latents, batch 1 and 2
  starter         one prediction of the bundled model's UNet, batch 2
  gradients       a training step on SD 1.5 at 32x32 latents: text encoder with a prompt for every cross-attention, UNet,
                  loss and gradients of rank-4 factors on every attention projection
  starter-gradients  the same on the bundled model
  vae             decoding to 512x512
  text            encoding a prompt
  memory          peak resident memory of a process that draws a 512x512 picture in two steps, in f32 against diffusers',
                  and ours in f16
  start           time from the start of the process to the end of the first denoising step, warm page cache
  sdcpp           a denoising step of SD 1.5 at 512x512 without guidance in stable-diffusion.cpp, plain and with its flash
                  attention, in f32 and f16; only where it is named, as its compilation takes minutes and a C++ compiler,
                  and its picture longer

SD 1.5 here is a folder with random weights of its shapes, which `blocklora bench model` writes (4.3 GB; --models says
where, and an existing folder is used again). Where torch, diffusers, transformers or peft are missing, the script
makes a virtual environment beside the models, installs them from the package index there, and goes on in it.

Each round runs our program and then the peer, each with one repeat to warm up. The ratio is that of the medians of wall
time; beside it stands that of processor time, which other work on the machine disturbs less. What both computed is
compared by its root mean square. Exits with 1 where a goal is missed or results differ.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
STARTER = ROOT / "daemon/starter/model"
PACKAGES = ["torch", "diffusers", "transformers", "peft", "accelerate"]
MODULES = ["torch", "diffusers", "transformers", "peft"]
# The most that ours may take, as a part of PyTorch's.
GOALS = {"unet1": 0.8, "unet2": 0.8, "starter": 0.6, "gradients": 1.0, "starter-gradients": 1.0, "vae": 1.0,
         "text": 1.0, "memory": 1.0}
F16_BYTES_MAX = 3.5e9
START_SECONDS_MAX = {"starter": 0.5, "sd15": 3.0}
CASES = [*GOALS, "start"]
SDCPP = "sdcpp"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="measurements in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "blocklora-peers")
    parser.add_argument("--ours", default=str(ROOT / "target/debug/blocklora"), help="the built command line")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", choices=["memory", "start", SDCPP], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="f32", help=argparse.SUPPRESS)
    parser.add_argument("--flash", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


ARGS = arguments()
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(ARGS.threads)
os.environ["HF_HUB_OFFLINE"] = "1"


def provide_packages(cases):
    """Goes on in a virtual environment of our own where a package is missing."""
    packages, modules = PACKAGES, MODULES
    if SDCPP in cases:
        packages, modules = [*packages, "stable-diffusion-cpp-python"], [*modules, "stable_diffusion_cpp"]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return
    if os.environ.get("BLOCKLORA_PEERS_VENV"):
        sys.exit(f"pip did not install {' '.join(missing)}; install it and run this with that Python")
    venv = ARGS.models / "venv"
    python = venv / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    print(f"installing {' '.join(packages)} in {venv}", file=sys.stderr)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *packages])
    if done.returncode:
        sys.exit("pip failed, see above; stable-diffusion-cpp-python, if it was asked for, needs a C++ compiler")
    os.execve(python, [str(python), *sys.argv], {**os.environ, "BLOCKLORA_PEERS_VENV": "1"})


def ours(command, *options):
    """One run of our program: its JSON."""
    run = [ARGS.ours, "--threads", str(ARGS.threads), "bench", command, "--json", *map(str, options)]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(run)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def folder(precision="f32"):
    """The folder with SD 1.5's shapes, written if it is not there."""
    path = ARGS.models / f"sd15-{precision}"
    if not (path / "vae/diffusion_pytorch_model.safetensors").exists():
        ARGS.models.mkdir(parents=True, exist_ok=True)
        print(f"writing {path}", file=sys.stderr)
        run = [ARGS.ours, "bench", "model", "--precision", precision, "--output", str(path)]
        subprocess.run(run, check=True)
    return path


class Peer:
    """Parts of the same model in PyTorch, loaded when they are first used."""

    def __init__(self, path):
        self.path = path
        self.parts = {}
        self.config = {name: json.loads((path / name / "config.json").read_text())
                       for name in ["unet", "vae", "text_encoder"]}

    def part(self, name):
        if name not in self.parts:
            import torch
            from diffusers import AutoencoderKL, UNet2DConditionModel
            from transformers import CLIPTextModel
            kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[name]
            part = kind.from_pretrained(self.path / name, torch_dtype=torch.float32).eval()
            self.parts[name] = part.requires_grad_(False)
        return self.parts[name]


def inputs(seed, *shape):
    """Number i is sin(0.7 i + seed), rounded to f32, as our bench makes it."""
    import torch
    values = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * values + seed).float().reshape(shape)


def token_ids(peer, batch):
    import torch
    config = peer.config["text_encoder"]
    length = config["max_position_embeddings"]
    return (torch.arange(batch * length) * 37 % config["vocab_size"]).reshape(batch, length)


def rms(tensors):
    import torch
    total = sum(float(tensor.detach().double().square().sum()) for tensor in tensors)
    return math.sqrt(total / sum(tensor.numel() for tensor in tensors))


def unet(peer, batch, side):
    import torch
    config = peer.config
    context = inputs(2.0, batch, config["text_encoder"]["max_position_embeddings"], config["text_encoder"]["hidden_size"])
    latents, steps = inputs(1.0, batch, config["unet"]["in_channels"], side, side), torch.full((batch,), 500.0)
    return lambda: rms([peer.part("unet")(latents, steps, encoder_hidden_states=context).sample])


def vae(peer, side):
    latents = inputs(3.0, 1, peer.config["vae"]["latent_channels"], side, side)
    return lambda: rms([peer.part("vae").decode(latents).sample])


def text(peer):
    ids = token_ids(peer, 1)
    return lambda: rms([peer.part("text_encoder")(ids).last_hidden_state])


def gradients(peer, batch, side):
    """The step of `bench gradients`: peft's LoRA on every attention projection, of which B's first sixteenth of the
    rows is an adapter's own; the rest of B stays zero and its gradient is not counted."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    unet, encoder = peer.part("unet"), peer.part("text_encoder")
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=names), unet)
    text_names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=text_names), encoder)

    def order(block):
        return (["down_blocks", "mid_block", "up_blocks"].index(block[0]), *map(int, filter(str.isdigit, block)))

    # Our layers are numbered in forward order, adaptable Linears that carry no factors here included.
    blocks = sorted((name for name, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"),
                    key=lambda name: order(name.split(".")))
    modules = dict(unet.named_modules())
    linears = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
               "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"]
    projected = peer.config["unet"].get("use_linear_projection")
    layers = []
    for block in blocks:
        outer = block.rsplit(".transformer_blocks", 1)[0]
        layers += [modules[f"{outer}.proj_in"]] if projected else []
        layers += [modules[f"{block}.{linear}"] for linear in linears]
        layers += [modules[f"{outer}.proj_out"]] if projected else []
    modules = dict(encoder.named_modules())
    prefix = next(name for name in modules if name.endswith("encoder.layers.0")).removesuffix(".0")
    for layer in range(peer.config["text_encoder"]["num_hidden_layers"]):
        layers += [modules[f"{prefix}.{layer}.self_attn.{name}"] for name in text_names]
        layers += [modules[f"{prefix}.{layer}.mlp.{name}"] for name in ["fc1", "fc2"]]
    trained = []
    for index, layer in enumerate(layers):
        if not hasattr(layer, "lora_A"):
            continue
        (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
        rows = b.weight.shape[0]
        owned = rows if rows < 16 else rows // 16
        with torch.no_grad():
            a.weight.copy_(inputs(float(index), *a.weight.shape) * 0.02)
            b.weight.zero_()
            b.weight[:owned] = inputs(index + 0.5, owned, 4) * 0.02
        a.weight.requires_grad_(True)
        b.weight.requires_grad_(True)
        trained.append((a.weight, b.weight, owned))

    crossings = [dict(unet.named_modules())[f"{block}.attn2"] for block in blocks]
    contexts = []

    def own_context(index):
        def hook(module, args, kwargs):
            return args, {**kwargs, "encoder_hidden_states": contexts[index]}
        return hook

    for index, crossing in enumerate(crossings):
        crossing.register_forward_pre_hook(own_context(index), with_kwargs=True)
    ids = token_ids(peer, batch * len(crossings))
    channels = peer.config["unet"]["in_channels"]
    latents, target = inputs(1.0, batch, channels, side, side), inputs(4.0, batch, channels, side, side)
    steps = torch.full((batch,), 500.0)

    def step():
        with torch.enable_grad():
            for a, b, _ in trained:
                a.grad = b.grad = None
            encoded = encoder(ids).last_hidden_state
            contexts[:] = encoded.split(batch)
            predicted = unet(latents, steps, encoder_hidden_states=contexts[0]).sample
            (predicted - target).square().mean().backward()
        return rms([grad for a, b, owned in trained for grad in (a.grad, b.grad[:owned])])

    return step


def peer_process(kind):
    """A process of its own: draws a picture, or a first step, and prints its peak memory and time."""
    start = time.time()
    import torch
    from diffusers import StableDiffusionPipeline
    torch.set_num_threads(ARGS.threads)
    dtype = {"f32": torch.float32, "f16": torch.float16}[ARGS.precision]
    pipeline = StableDiffusionPipeline.from_pretrained(
        ARGS.folder, torch_dtype=dtype, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    seconds = []

    def note(pipe, step, timestep, kwargs):
        seconds.append(time.time() - start)
        pipe._interrupt = kind == "start"
        return kwargs

    with torch.no_grad():
        pipeline("a", num_inference_steps=2, callback_on_step_end=note,
                 output_type="latent" if kind == "start" else "np")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_resident_bytes": peak, "seconds_to_first_step_done": seconds[0]}))


def sdcpp_process():
    """A process of its own that draws a picture with stable-diffusion.cpp and prints the milliseconds of its steps but the
    first."""
    from stable_diffusion_cpp import StableDiffusion
    model = StableDiffusion(model_path=str(ARGS.folder), n_threads=ARGS.threads, wtype=ARGS.precision, verbose=False,
                            diffusion_flash_attn=ARGS.flash)
    ends = []
    model.generate_image("a", width=512, height=512, cfg_scale=1.0, sample_steps=ARGS.repeats + 1, sample_method="euler",
                         seed=1, progress_callback=lambda step, steps, seconds: ends.append(time.perf_counter()))
    # It also tells when it begins.
    steps = [1e3 * (end - start) for start, end in zip(ends, ends[1:])][-ARGS.repeats:]
    print(json.dumps({"step_ms": steps}))


def run_peer(kind, path, precision="f32", *options):
    run = [sys.executable, __file__, "--peer", kind, "--folder", str(path), "--precision", precision,
           "--threads", str(ARGS.threads), "--repeats", str(ARGS.repeats), *options]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def timed(work, repeats):
    """Wall and processor milliseconds of each repeat after one to warm up, and the last result."""
    result = work()
    wall, cpu = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        result = work()
        wall.append(1e3 * (time.perf_counter() - start))
        cpu.append(1e3 * (time.process_time() - cpu_start))
    return wall, cpu, result


def compare(case):
    """One case of speed: medians, ratios, and how far the results are apart."""
    import torch
    torch.set_num_threads(ARGS.threads)
    torch.set_grad_enabled(False)
    path = STARTER if case.startswith("starter") else folder()
    peer = Peer(path)
    side = peer.config["unet"]["sample_size"]
    small = side if case.startswith("starter") else side // 2
    command, options, work = {
        "unet1": ("unet", ["--batch", 1], lambda: unet(peer, 1, side)),
        "unet2": ("unet", ["--batch", 2], lambda: unet(peer, 2, side)),
        "starter": ("unet", ["--batch", 2], lambda: unet(peer, 2, side)),
        "gradients": ("gradients", ["--latents", small], lambda: gradients(peer, 1, small)),
        "starter-gradients": ("gradients", ["--latents", small], lambda: gradients(peer, 1, small)),
        "vae": ("vae", [], lambda: vae(peer, side)),
        "text": ("text", [], lambda: text(peer)),
    }[case]
    repeats = ARGS.repeats * (30 if case.startswith("starter") or case == "text" else 1)
    work = work()
    wall, cpu, our_wall, our_cpu = [], [], [], []
    for _ in range(ARGS.rounds):
        figures = ours(command, "--base", path, "--repeats", repeats, *options)
        our_wall.append(figures["wall_ms"])
        our_cpu.append(figures["cpu_ms"])
        peer_wall, peer_cpu, result = timed(work, repeats)
        wall += peer_wall
        cpu += peer_cpu
    median = statistics.median
    return {
        "ours_ms": median(our_wall), "pytorch_ms": median(wall), "ratio": median(our_wall) / median(wall),
        "ours_cpu_ms": median(our_cpu), "pytorch_cpu_ms": median(cpu), "ratio_cpu": median(our_cpu) / median(cpu),
        "page_faults": figures["page_faults"], "rms_apart": abs(figures["rms"] / result - 1), "goal": GOALS[case],
    }


def memory():
    """Peak memory of a 512x512 picture, in processes of their own."""
    result = {"goal": GOALS["memory"]}
    for precision in ["f32", "f16"]:
        path = folder(precision)
        mine = ours("sample", "--base", path, "--precision", precision, "--steps", 2)["peak_resident_bytes"]
        result[precision] = {"ours_bytes": mine}
    # In f32 only: f16 on a CPU takes PyTorch many times as long.
    theirs = run_peer("memory", folder("f32"))
    result["f32"]["diffusers"] = theirs
    result["ratio"] = result["f32"]["ours_bytes"] / theirs.get("peak_resident_bytes", math.nan)
    result["f16_small_enough"] = result["f16"]["ours_bytes"] < F16_BYTES_MAX
    return result


def start():
    result = {}
    for name, path in [("starter", STARTER), ("sd15", folder())]:
        runs = [ours("start", "--base", path) for _ in range(ARGS.rounds + 1)][1:]
        key = "seconds_to_first_step_done"
        loaded = statistics.median(run["seconds_to_first_step_begun"] for run in runs)
        result[name] = {"ours_to_first_step_s": loaded, "ours_first_step_done_s": statistics.median(r[key] for r in runs),
                        "diffusers": run_peer("start", path), "goal_s": START_SECONDS_MAX[name],
                        "met": loaded < START_SECONDS_MAX[name]}
    return result


def sdcpp():
    """Steps in turns."""
    result = {}
    for precision in ["f32", "f16"]:
        path = folder(precision)
        mine, theirs = [], {"plain": [], "flash": []}
        for _ in range(ARGS.rounds):
            mine.append(ours("unet", "--base", path, "--precision", precision, "--repeats", ARGS.repeats)["wall_ms"])
            for way, options in [("plain", []), ("flash", ["--flash"])]:
                figures = run_peer(SDCPP, path, precision, *options)
                if "error" in figures:
                    sys.exit(f"stable-diffusion.cpp failed: {figures['error']}")
                theirs[way] += figures["step_ms"]
        mine = statistics.median(mine)
        theirs = {way: statistics.median(steps) for way, steps in theirs.items()}
        result[precision] = {"ours_ms": mine, "sdcpp_ms": theirs, "ratio": {way: mine / ms for way, ms in theirs.items()}}
    return result


def main():
    cases = ARGS.cases.split(",")
    unknown = [case for case in cases if case not in [*CASES, SDCPP]]
    if unknown:
        sys.exit(f"unknown case {unknown[0]!r}; the cases are {', '.join([*CASES, SDCPP])}")
    if ARGS.peer:
        return sdcpp_process() if ARGS.peer == SDCPP else peer_process(ARGS.peer)
    provide_packages(cases)
    results, met = {}, True
    for case in cases:
        result = results[case] = {"memory": memory, "start": start, SDCPP: sdcpp}.get(case, lambda: compare(case))()
        if case == "start":
            met &= all(each["met"] for each in result.values())
        elif case == "memory":
            met &= result["ratio"] <= result["goal"] and result["f16_small_enough"]
        elif case != SDCPP:  # nothing is asked of that one
            met &= result["ratio"] <= result["goal"] and result["rms_apart"] < 1e-3
        if not ARGS.json:
            show(case, result)
    if ARGS.json:
        import torch
        print(json.dumps({"threads": ARGS.threads, "rounds": ARGS.rounds, "torch": torch.__version__,
                          "results": results, "goals_met": bool(met)}))
    return 0 if met else 1


def show(case, result):
    if case in ("memory", "start", SDCPP):
        print(f"{case:>18} {json.dumps(result)}", flush=True)
        return
    print(f"{case:>18} ours {result['ours_ms']:9.1f} ms  PyTorch {result['pytorch_ms']:9.1f} ms  ratio "
          f"{result['ratio']:.2f} (goal {result['goal']})  processor time {result['ours_cpu_ms']:9.1f} / "
          f"{result['pytorch_cpu_ms']:9.1f} ms = {result['ratio_cpu']:.2f}  rms apart {result['rms_apart']:.1e}  "
          f"page faults {result['page_faults']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
