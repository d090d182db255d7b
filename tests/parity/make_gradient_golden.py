"""Gradients of adapter factors and token vectors, from PyTorch in f64: a part of make_golden.py.

The adapter acts as in BlockLoRA's equations 3 and 4: h = W0 x + scale * r * (B A x) on the rows it owns, with the
erasure mask r. Prompts name one concept of two tokens: the first has a vector for every cross-attention, the second one
for all. Everything is a formula of names (make_golden.values), so that the Rust test can build the same.
"""

import torch

RANK, SCALE, SHRINK = 2, 0.7, 0.3
# Words before and after the concept.
CONCEPT_PROMPTS = [("a photo of ", " on a beach"), ("", "'s dog")]


def adapted(name):
    """Every attention Linear, the text encoder's MLPs, and one feed-forward."""
    last = name.rsplit(".", 1)[-1]
    if name.startswith("text_encoder."):
        return last in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    attention = name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    return attention or (name.startswith("unet.mid_block.") and name.endswith(("ff.net.0.proj", "ff.net.2")))


def cross_attentions(unet):
    """The attn2 modules in forward order."""
    found = [(name, module) for name, module in unet.named_modules() if name.endswith(".attn2")]
    return [module for _, module in sorted(found, key=lambda item: ["down", "mid_", "up_b"].index(item[0][:4]))]


def gradients(layout, tokenizer, text, unet, vae, values):
    text, unet = text.double(), unet.double()
    batch = layout["latents"][0]
    layers = {}
    for component, model in (("text_encoder", text), ("unet", unet)):
        for name, module in model.named_modules():
            if component == "text_encoder" and not name.startswith("text_model."):
                name = "text_model." + name
            if isinstance(module, torch.nn.Linear) and adapted(f"{component}.{name}"):
                layers[f"{component}.{name}"] = module

    factors = {}
    for name, module in layers.items():
        rows = torch.arange(1, module.out_features, 3)
        a = values(f"A.{name}", (RANK, module.in_features)).double() * SHRINK
        b = values(f"B.{name}", (len(rows), RANK)).double() * SHRINK
        # Masks of attn1 are drawn per sample, the others are shared by the batch.
        shape = (batch, 1, len(rows)) if ".attn1." in name else (len(rows),)
        mask = (values(f"mask.{name}", shape) >= -0.4).double()
        factors[name] = (a.requires_grad_(), b.requires_grad_())

        def hook(module, inputs, output, a=a, b=b, rows=rows, mask=mask):
            return output.index_add(-1, rows, SCALE * mask * (inputs[0] @ a.T @ b.T))

        module.register_forward_hook(hook)

    attn2 = cross_attentions(unet)
    width = text.config.hidden_size
    first = values("token.0", (len(attn2), width)).double().requires_grad_()
    second = values("token.1", (1, width)).double().requires_grad_()

    ids = torch.full((len(CONCEPT_PROMPTS), tokenizer.model_max_length), tokenizer.pad_token_id)
    slots = []
    for i, (before, after) in enumerate(CONCEPT_PROMPTS):
        plain = lambda words: tokenizer(words, add_special_tokens=False).input_ids
        row = [tokenizer.bos_token_id, *plain(before)]
        slots.append(len(row))
        row += [tokenizer.pad_token_id] * 2 + plain(after) + [tokenizer.eos_token_id]
        ids[i, : len(row)] = torch.tensor(row)

    context = []
    embedding = next(module for name, module in text.named_modules() if name.endswith("token_embedding"))
    for layer in range(len(attn2)):

        def put_in(module, inputs, output, layer=layer):
            output = output.clone()
            for i, slot in enumerate(slots):
                output[i, slot], output[i, slot + 1] = first[layer], second[0]
            return output

        handle = embedding.register_forward_hook(put_in)
        context.append(text(ids)[0])
        handle.remove()
    for layer, module in enumerate(attn2):
        module.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: (args, kwargs | {"encoder_hidden_states": context[layer]}),
            with_kwargs=True,
        )

    latents = values("latents", layout["latents"]).double()
    timesteps = torch.tensor([981.0, 1.0][:batch])
    output = unet(latents, timesteps, encoder_hidden_states=context[0]).sample
    loss = ((output - values("target", layout["latents"]).double()) ** 2).mean()
    loss.backward()
    flat = [factor.grad.flatten() for name in sorted(factors) for factor in factors[name]]
    return {
        "concept.ids": ids,
        "concept.slots": torch.tensor(slots),
        "concept.output": output.detach().float().contiguous(),
        "concept.loss": loss.detach().float().reshape(1),
        "gradient.factors": torch.cat(flat).float(),
        "gradient.token.0": first.grad.float(),
        "gradient.token.1": second.grad.float(),
    }
