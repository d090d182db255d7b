"""Times a merge of many adapters against PyTorch's ways to do it: same shapes, same threads, in turns, in one run.

Ours merges the adapters in one pass over the rows that change. PyTorch's are
  peft     every adapter merged into every Linear by peft itself, as diffusers' fuse_lora does,
  per-lora W += B @ A once per adapter, in plain torch,
  stacked  W.addmm_(B_all, A_all) once, all adapters' factors concatenated beforehand: the best form of it.

    python tests/peers/merge_pytorch.py [--precision f16] [--rounds 5] [--ours PROGRAM]

Needs torch, and peft for the first of them (it is left out where peft is missing). `--ours` is the built command
`blocklora` (default: target/debug/blocklora), whose `bench merge` is run. Prints medians and ratios, or with --json one
object. Exits with 1 where a ratio misses its goal.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOALS = {"peft": 30, "per-lora": 30, "stacked": 5}  # how many times faster ours has to be


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", choices=["f32", "f16", "bf16"], default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=15)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--capacity", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ours", default=str(ROOT / "target/debug/blocklora"), help="the built command line")
    return parser.parse_args()


ARGS = arguments()
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(ARGS.threads)

import torch  # noqa: E402  (after the thread count is set)

torch.set_num_threads(ARGS.threads)
torch.set_grad_enabled(False)
DTYPE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[ARGS.precision]


def sd15_shapes():
    """(m, n) of the attention Linears of Stable Diffusion 1.5's UNet and text encoder."""
    shapes = []
    for width, blocks in [(320, 5), (640, 5), (1280, 6)]:
        for context in [width, 768]:  # self- and cross-attention: q, k, v, out
            shapes += [(width, width), (width, context), (width, context), (width, width)] * blocks
    return shapes + [(768, 768)] * 48


def random_factors(shape, slot):
    """A [r, n] and B [m, r], which is zero outside the slot's rows: what other tools read of such an adapter."""
    m, n = shape
    b = torch.zeros(m, ARGS.rank)
    rows = slice(slot * m // ARGS.capacity, (slot + 1) * m // ARGS.capacity)
    b[rows] = torch.rand(b[rows].shape) - 0.5
    return (torch.rand(ARGS.rank, n) - 0.5).to(DTYPE), b.to(DTYPE)


class Model:
    """Random weights and adapters of SD 1.5's shapes."""

    def __init__(self):
        self.shapes = sd15_shapes()
        self.pristine = [(torch.rand(shape) - 0.5).to(DTYPE) for shape in self.shapes]
        self.live = [weight.clone() for weight in self.pristine]
        self.factors = [[random_factors(shape, slot) for slot in range(ARGS.adapters)] for shape in self.shapes]
        # Concatenated once, outside the measurement.
        self.stacked = [
            (torch.cat([a for a, _ in each], 0), torch.cat([b for _, b in each], 1)) for each in self.factors
        ]

    def reset(self):
        for live, pristine in zip(self.live, self.pristine):
            live.copy_(pristine)

    def per_lora(self):
        for slot in range(ARGS.adapters):
            for weight, factors in zip(self.live, self.factors):
                a, b = factors[slot]
                weight += b @ a

    def merge_stacked(self):
        for weight, (a, b) in zip(self.live, self.stacked):
            weight.addmm_(b, a)


def peft_model(model):
    """The same Linears with peft's adapters on them, sharing the live weights; None without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    warnings.filterwarnings("ignore", module="peft")  # one for every further adapter
    linears = torch.nn.ModuleDict()
    for index, ((m, n), weight) in enumerate(zip(model.shapes, model.live)):
        linears[f"linear{index}"] = linear = torch.nn.Linear(n, m, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=ARGS.rank, lora_alpha=ARGS.rank, target_modules=list(linears))
    for slot in range(ARGS.adapters):
        inject_adapter_in_model(config, linears, adapter_name=f"concept{slot}")
    for linear, factors in zip(linears.values(), model.factors):
        for slot, (a, b) in enumerate(factors):
            name = f"concept{slot}"
            linear.lora_A[name].weight = torch.nn.Parameter(a, requires_grad=False)
            linear.lora_B[name].weight = torch.nn.Parameter(b, requires_grad=False)
    return linears


def merge_peft(linears):
    for slot in range(ARGS.adapters):
        for linear in linears.values():
            linear.merge(adapter_names=[f"concept{slot}"])


def milliseconds(work):
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def ours():
    """One run of our benchmark: its JSON."""
    sizes = {"precision": ARGS.precision, "threads": ARGS.threads, "repeats": 5, "adapters": ARGS.adapters, "rank": ARGS.rank,
             "capacity": ARGS.capacity}
    options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([ARGS.ours, "bench", "merge", "--shape", "sd15", "--json", *options], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{ARGS.ours} bench merge failed:\n{done.stderr}")
    return json.loads(done.stdout)


def check(model, linears):
    """All three ways must give the same weights, or the comparison says nothing."""
    ways = [model.per_lora, model.merge_stacked]
    if linears is not None:
        ways.append(lambda: merge_peft(linears))
    results = []
    for way in ways:
        model.reset()
        way()
        results.append(model.live[0].float().clone())
        unmerge(linears)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=2e-2, rtol=2e-2)


def unmerge(linears):
    """Makes peft forget what it merged; the weights are reset elsewhere."""
    for linear in linears.values() if linears is not None else []:
        linear.merged_adapters.clear()


def main():
    model = Model()
    linears = peft_model(model)
    check(model, linears)
    ways = {"per-lora": model.per_lora, "stacked": model.merge_stacked}
    if linears is not None:
        ways = {"peft": lambda: merge_peft(linears), **ways}
    times = {name: [] for name in ["ours", *ways]}
    runs = []
    for _ in range(ARGS.rounds):
        runs.append(ours())
        times["ours"].append(runs[-1]["merge_ms"])
        for name, way in ways.items():
            model.reset()
            unmerge(linears)
            times[name].append(milliseconds(way))
    medians = {name: statistics.median(each) for name, each in times.items()}
    ratios = {name: medians[name] / medians["ours"] for name in ways}
    met = all(ratio >= GOALS[name] for name, ratio in ratios.items())
    if ARGS.json:
        print(json.dumps({"milliseconds": medians, "times_faster": ratios, "goals_met": met, "ours": runs[-1]}))
    else:
        print(f"{ARGS.adapters} adapters of rank {ARGS.rank}, SD 1.5 shapes, {ARGS.precision}, {ARGS.threads} threads, "
              f"medians of {ARGS.rounds}; torch {torch.__version__}")
        for name, median in medians.items():
            note = f"ours is {ratios[name]:6.1f} times faster (goal {GOALS[name]})" if name in ratios else ""
            print(f"{name:>9} {median:10.1f} ms  {note}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
