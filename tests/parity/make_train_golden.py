"""Golden values of the trainers (plugins/train-*): what PyTorch, in f64, makes of the SDK's quadratic problem.

The problem is blocklora_sdk::testing::Quadratic: loss = 1/2 sum over layers |mask * (scale B A - T[rows])|^2
+ lambda/2 sum over layers |mask * scale B A|^2 (prior preservation) + mu/2 sum over layers |mask' * scale B A|^2 (silence,
with the erasure of its own) + 1/2 |tokens - 1|^2. Gradients are autograd's, the
optimiser is torch.optim.AdamW; only the random numbers are made as the engine does (philox.py).
Usage: make_train_golden.py tests/golden/train.json
"""

import json
import math
import sys

import numpy as np
import philox
import torch

SEED, M, N = 5, 24, 6
START = philox.start_seed(SEED, "milo")
CLASS, RARE = [0.1, 0.2], [0.1, 0.3]
UNET_ATTENTION, TEXT_ATTENTION, UNET_OTHER = 0, 1, 2
TARGET = torch.tensor([[(i * 0.1 - 1.0) * (j * 0.3 - 0.7) for j in range(N)] for i in range(M)], dtype=torch.float64)


def uniform_a(layer, rank):
    """LoRA's start: Kaiming-uniform with a = sqrt 5."""
    values = philox.uniforms(START, philox.INIT, 0, layer, rank * N).astype(np.float64)
    return ((2 * values - 1) / math.sqrt(N)).reshape(rank, N)


def basis(seed, n):
    """The product of dense Householder matrices H_(n-1) ... H_0 of Gaussian vectors."""
    q = np.eye(n)
    for j in range(n):
        u = np.zeros(n)
        u[j:] = philox.normals(seed, philox.INIT, n, j, n - j)
        u[j] += math.copysign(np.linalg.norm(u), u[j])
        q = (np.eye(n) - 2 * np.outer(u, u) / (u @ u)) @ q
    assert np.allclose(q @ q.T, np.eye(n), atol=1e-12)
    return q


def random_rows(layer, rank):
    order = list(range(N))
    words = iter(philox.bits(START, philox.INIT, 0, layer, N))
    for i in range(N - 1, 0, -1):
        j = int(next(words)) * (i + 1) >> 32
        order[i], order[j] = order[j], order[i]
    return order[:rank]


def drawn_mask(stream, step, lane, rows, erasure):
    drawn = philox.uniforms(SEED, stream, step, lane, M)[rows, None]
    return torch.tensor((drawn >= np.float32(erasure)).astype(np.float64))


def train(steps, rank, layers, rates, schedule, start_a=uniform_a, a_moves=True, scale=1.0, rows=range(M), token_layers=3,
          first_word=None, token_norm_limit=0.0, erasure=0.0, prior_weight=0.0, silence=0.0, silence_erasure=0.5):
    rows = list(rows)
    parameter = lambda values, moves=True: torch.tensor(np.array(values), dtype=torch.float64, requires_grad=moves)
    factors = {layer: (parameter(start_a(layer, rank), a_moves), parameter(np.zeros((len(rows), rank)))) for layer in layers}
    first = 0.013 * philox.normals(START, philox.INIT, 1, 0, 2) if first_word is None else first_word
    tokens = [parameter(np.tile(word, (token_layers, 1))) for word in (first, CLASS)]

    groups = [{"params": [p for p in pair if p.requires_grad], "lr": rates["text" if layer == TEXT_ATTENTION else "unet"]}
              for layer, pair in factors.items()]
    optimiser = torch.optim.AdamW(groups + [{"params": tokens, "lr": rates["tokens"]}], weight_decay=0.01)
    course = {"linear": lambda i: 1 - i / steps, "constant": lambda i: 1.0,
              "cosine": lambda i: 0.5 * (1 + math.cos(math.pi * i / steps))}[schedule]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, course)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = sum(((t - 1) ** 2).sum() / 2 for t in tokens)
        for layer, (a, b) in factors.items():
            mask = drawn_mask(philox.ERASURE, step, layer, rows, erasure)
            # Behind the lanes of the two made-up words.
            silent_mask = drawn_mask(philox.SILENCE, step, 2 + layer, rows, silence_erasure)
            change = scale * b @ a
            loss = loss + ((mask * (change - TARGET[rows])) ** 2).sum() / 2
            loss = loss + prior_weight * ((mask * change) ** 2).sum() / 2 + silence * ((silent_mask * change) ** 2).sum() / 2
        loss.backward()
        losses.append(loss.item())
        norms = torch.cat([t.detach().norm(dim=1) for t in tokens])
        if token_norm_limit and norms.mean() >= token_norm_limit:
            for token in tokens:
                token.grad = None
        optimiser.step()
        scheduler.step()
    tensors = [t for pair in factors.values() for t in pair] + tokens
    short = lambda values: [float(f"{x:.7g}") for x in np.asarray(values, np.float64).ravel()]
    return {"losses": short(losses), "tensors": [short(t.detach().numpy()) for t in tensors]}


def main(path):
    attention, every = [UNET_ATTENTION, TEXT_ATTENTION], [UNET_ATTENTION, TEXT_ATTENTION, UNET_OTHER]
    rates = {"tokens": 0.05, "text": 0.01, "unet": 0.02}
    dreambooth = dict(steps=40, rank=2, layers=[UNET_ATTENTION], rates=rates | {"tokens": 0.0}, schedule="constant",
                      token_layers=1, first_word=RARE)
    orthogonal = dict(steps=40, rank=2, layers=every, rates=rates, schedule="linear", a_moves=False)
    q = basis(9, N)
    runs = {
        "ed-lora": train(40, 2, attention, rates, "linear", scale=0.7, token_norm_limit=0.55),
        "blocklora": train(40, 2, attention, rates, "cosine", rows=range(1, M, 4), token_layers=1, erasure=0.3),
        "blocklora silence=0.5": train(40, 2, attention, rates, "cosine", rows=range(1, M, 4), token_layers=1, erasure=0.3,
                                       silence=0.5),
        "dreambooth-lora": train(**dreambooth),
        "dreambooth-lora prior=1": train(**dreambooth, prior_weight=1.0),
        "dreambooth-lora prior=0.25": train(**dreambooth, prior_weight=0.25),
        "orthogonal random": train(**orthogonal, start_a=lambda layer, rank: q[random_rows(layer, rank)]),
        "orthogonal slot=1": train(**orthogonal, start_a=lambda layer, rank: q[rank : 2 * rank]),
    }
    with open(path, "w") as file:
        json.dump({"runs": runs}, file, separators=(",", ":"))
        file.write("\n")


main(sys.argv[1])
