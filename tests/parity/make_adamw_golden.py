"""Prints the golden values of daemon/engine/src/train/adamw.rs: torch.optim.AdamW on f(x) = x^2 from x = 1."""
import torch

x = torch.nn.Parameter(torch.tensor([1.0]))
optimiser = torch.optim.AdamW([x], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
for _ in range(3):
    optimiser.zero_grad()
    (x**2).sum().backward()
    optimiser.step()
    print(repr(x.item()))
