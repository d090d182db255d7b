"""Golden values of the merge strategies (plugins/merge-*): what NumPy, in f64, makes of small adapters.

Every strategy works here on dense task vectors, as in its paper; nothing is taken from the plugins but the random numbers
(philox.py). Usage: make_merge_golden.py tests/golden/merge.json
"""

import json
import sys

import numpy as np
import philox

LAYERS = [
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 12, 10),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 16, 8),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 10, 14),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 6, 4),
]
# Weights; the last adapter is subtracted.
WEIGHTS = [1.0, 0.5, 1.5, -0.75]


def adapters():
    """Four adapters: one owns every row, one a block of them, one scattered rows and not every layer, one has a zero B in
    a layer. Nobody changes the last layer."""
    generator = np.random.default_rng(4)
    normal = lambda *shape: generator.standard_normal(shape).astype(np.float32).round(3)
    made = []
    for i, weight in enumerate(WEIGHTS):
        factors = []
        for layer, (_, m, n) in enumerate(LAYERS[:-1]):
            rank = 2 + i % 2
            rows = [list(range(m)), list(range(m // 4, m // 2)), list(range(i % 2, m, 3)), list(range(m))][i]
            a, b = normal(rank, n), normal(len(rows), rank)
            if i == 3 and layer == 1:
                b *= 0.0
            missing = i == 2 and layer == 2
            factors.append(None if missing else {"rank": rank, "rows": rows, "a": a, "b": b})
        digest = "".join(f"{x:02x}" for x in generator.integers(0, 256, 32))
        made.append({"name": f"concept{i}", "digest": digest, "weight": weight, "scale": [0.5, 1.0, 0.7, 1.0][i],
                     "factors": factors + [None]})
    return sorted(made, key=lambda adapter: adapter["digest"])


def task_vectors(made, layer):
    """(adapter, tau [m, n]) of those that change the layer."""
    _, m, n = LAYERS[layer]
    for adapter in made:
        if factors := adapter["factors"][layer]:
            tau = np.zeros((m, n))
            tau[factors["rows"]] = adapter["scale"] * factors["b"].astype(np.float64) @ factors["a"]
            yield adapter, tau


def merge(made, merge_layer):
    empty = [np.zeros((m, n)) for _, m, n in LAYERS]
    return [merge_layer(layer, list(task_vectors(made, layer))) + empty[layer] for layer in range(len(LAYERS))]


def sum_times(coefficient):
    """The sum of the task vectors times coefficient(adapter)."""
    return lambda layer, taus: sum((coefficient(adapter) * tau for adapter, tau in taus), np.zeros(LAYERS[layer][1:]))


def by_owners(made):
    """BlockLoRA: each row of a layer is divided by the number of adapters that own it."""

    def merge_layer(layer, taus):
        owners = np.zeros(LAYERS[layer][1])
        for adapter, _ in taus:
            owners[adapter["factors"][layer]["rows"]] += 1
        shares = 1 / np.maximum(owners, 1)[:, None]
        return sum((adapter["weight"] * shares * tau for adapter, tau in taus), np.zeros(LAYERS[layer][1:]))

    return merge(made, merge_layer)


def trim(tau, reference, k):
    """Keeps of tau what is among the k percent of reference with the greatest magnitude."""
    order = np.sort(np.abs(reference).ravel())[::-1]
    kept = int(k * order.size / 100)
    if kept == 0:
        return np.zeros_like(tau)
    # The threshold must not depend on rounding.
    assert kept == order.size or order[kept - 1] == 0 or order[kept - 1] - order[kept] > 1e-6, "choose another seed"
    return np.where(np.abs(tau) >= order[kept - 1], tau, 0.0)


def ties(made, k, lam, whole_model=False):
    """Yadav et al., algorithm 1."""

    def merge_layer(layer, taus):
        if not taus:
            return 0.0
        trimmed = []
        for adapter, tau in taus:
            mine = [t for index in range(len(LAYERS)) for a, t in task_vectors(made, index) if a is adapter]
            reference = np.concatenate([t.ravel() for t in mine]) if whole_model else tau
            trimmed.append(adapter["weight"] * trim(tau, reference, k))
        trimmed = np.stack(trimmed)
        total = trimmed.sum(0)
        assert not np.any((np.abs(total) < 1e-6) & (np.abs(trimmed).max(0) > 0)), "choose another seed"
        gamma = np.sign(total)
        agrees = (np.sign(trimmed) == gamma) & (gamma != 0)
        return lam * np.where(agrees, trimmed, 0.0).sum(0) / np.maximum(agrees.sum(0), 1)

    return merge(made, merge_layer)


def fnv1a(*parts):
    value = 0xCBF29CE484222325
    for byte in b"".join(parts):
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def dare(made, p, lam, seed):
    """Yu et al.: drop and rescale; then a sum."""

    def merge_layer(layer, taus):
        name, m, n = LAYERS[layer]
        total = np.zeros((m, n))
        for adapter, tau in taus:
            key = fnv1a(seed.to_bytes(8, "little"), adapter["digest"].encode(), b"\0", name.encode())
            kept = np.stack([philox.uniforms(key, philox.MERGE, row, 0, n) >= np.float32(p) for row in range(m)])
            total += lam * adapter["weight"] * kept * tau / (1 - p)
        return total

    return merge(made, merge_layer)


def main(path):
    made = adapters()
    total = sum(WEIGHTS)
    runs = {
        "blocklora clash=mean": by_owners(made),
        "blocklora clash=mean normalise=sum1": merge(made, sum_times(lambda a: a["weight"] / total)),
        "weighted-average": merge(made, sum_times(lambda a: a["weight"] / total)),
        "orthogonal": merge(made, sum_times(lambda a: 0.6 * a["weight"])),
        "task-arithmetic": merge(made, sum_times(lambda a: 0.4 * a["weight"])),
        "ties": ties(made, 20, 1.0),
        "ties k=60 lambda=0.5": ties(made, 60, 0.5),
        "ties model": ties(made, 20, 1.0, whole_model=True),
        "dare": dare(made, 0.9, 1.0, 0),
        "dare p=0.5 lambda=0.3 seed=2^40+7": dare(made, 0.5, 0.3, 2**40 + 7),
    }
    short = lambda values: [float(f"{x:.7g}") for x in np.asarray(values, np.float32).ravel()]
    for adapter in made:
        for factors in filter(None, adapter["factors"]):
            factors |= {"a": short(factors["a"]), "b": short(factors["b"])}
    golden = {"layers": LAYERS, "adapters": made, "runs": {k: [short(x) for x in v] for k, v in runs.items()}}
    with open(path, "w") as file:
        json.dump(golden, file, separators=(",", ":"))
        file.write("\n")


main(sys.argv[1])
