"""The CLIP: contrastive on whole captions, and against banks of short prompts.

In a small world the plain contrastive loss learns backgrounds and stops: they are enough to tell the captions
of a batch apart. So every picture is also classified against the prompts of all nouns, of all backgrounds and
of the styles, through the text tower; a picture of two objects has two right nouns. A quarter of every batch
shows other emoji with their names, which keeps the image features wide enough for what was never trained on.
The scorer also sees some pictures of two objects as a close-up of one of them, which has that one's noun, so that
it can tell what stands where.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

import onward
import world
from common import DEVICE, Clock, autocast, log, pixels, read_json, save_atomically, write_json
from tokenizer import ids

NOUN_TEMPLATES = ["a picture of {}", "{}"]


def build(cfg, tokenizer):
    c = cfg["clip"]
    common = {"hidden_act": "quick_gelu", "projection_dim": c["hidden"]}
    text = dict(common, hidden_size=c["hidden"], intermediate_size=4 * c["hidden"], num_hidden_layers=c["layers"],
                num_attention_heads=c["heads"], vocab_size=len(tokenizer), max_position_embeddings=cfg["max_length"],
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id)
    vision = dict(common, hidden_size=c["vision_hidden"], intermediate_size=4 * c["vision_hidden"],
                  num_hidden_layers=c["vision_layers"], num_attention_heads=c["vision_heads"],
                  image_size=cfg["size"], patch_size=c["patch"])
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=c["hidden"]))


def text_features(model, token_ids):
    return F.normalize(model.text_projection(model.text_model(input_ids=token_ids).pooler_output).float(), dim=-1)


def image_features(model, x):
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=x).pooler_output).float(), dim=-1)


@torch.no_grad()
def embed_images(model, images, batch=200):
    """uint8 [n, h, w, 3] -> [n, d] on the CPU."""
    return torch.cat([image_features(model, pixels(images[i:i + batch])).cpu() for i in range(0, len(images), batch)])


@torch.no_grad()
def embed_texts(model, tokenizer, texts, length):
    return torch.cat([text_features(model, ids(tokenizer, texts[i:i + 200], length, True).to(DEVICE)).cpu()
                      for i in range(0, len(texts), 200)])


class Banks:
    """Prompts of nouns, backgrounds and styles, and each picture's right answers among them."""

    def __init__(self, table, metas):
        self.nouns = [world.article(e["noun"]) for e in table]
        self.backgrounds = world.backgrounds()
        self.styles = [f"{s} style" for s in world.STYLES]
        b, s = {p: i for i, p in enumerate(self.backgrounds)}, {p: i for i, p in enumerate(world.STYLES)}
        self.background = np.array([b[m["b"]] for m in metas])
        self.style = np.array([s[m["s"]] if m["n"] else -1 for m in metas])
        self.members = [m["n"] for m in metas]

    def noun_targets(self, indices):
        """[n, nouns]: an equal share for every object in the picture; rows of empty scenes are zero."""
        target = torch.zeros(len(indices), len(self.nouns))
        for row, i in enumerate(indices):
            for n in self.members[i]:
                target[row, n] = 1 / len(self.members[i])
        return target.to(DEVICE)


def closeup(images, which):
    """uint8 [n, s, s, 3] pictures of two objects -> the squares of their left (0) or right (1) ones, in full size."""
    size = images.shape[1]
    boxes = world.squares(2, size)
    return np.stack([np.asarray(Image.fromarray(image[y:y + side, x:x + side]).resize((size, size), Image.BICUBIC))
                     for image, (x, y, side) in zip(images, (boxes[w] for w in which))])


@torch.no_grad()
def noun_accuracy(model, tokenizer, table, images, truth, length):
    """-> top-1, top-5 of single-object pictures against the prompts of all nouns."""
    prompts = ["a picture of " + world.article(e["noun"]) for e in table]
    scores = embed_images(model, images) @ embed_texts(model, tokenizer, prompts, length).T
    top, y = scores.topk(5).indices, torch.tensor(truth)
    return (top[:, 0] == y).float().mean().item(), (top == y[:, None]).any(1).float().mean().item()


def run_scorer(cfg, out):
    """The scorer goes on from the CLIP that conditions the UNet, by itself from there on."""
    run(cfg, out, name="scorer")


def run(cfg, out, name="clip"):
    c, length = {**cfg["clip"], **cfg.get(name, {})}, cfg["max_length"]
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(str(out / "tokenizer"))
    model = build(cfg, tokenizer)
    if name == "scorer" and (out / "scorer_from").exists():
        model.load_state_dict(CLIPModel.from_pretrained(out / "scorer_from").state_dict())
    elif name == "scorer":
        model.load_state_dict(torch.load(out / "clip_state.pt", map_location="cpu")["model"])
        keep_words_apart(model.text_model, *c["embedding_gain"])
    model.to(DEVICE)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": .05},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, c["lr"], betas=(.9, .98))
    state_path, step, spent = out / f"{name}_state.pt", 0, 0.0
    if state_path.exists():
        s = torch.load(state_path, map_location=DEVICE)
        model.load_state_dict(s["model"])
        opt.load_state_dict(s["optimizer"])
        step, spent = s["step"], s["spent"]
    print("clip parameters", sum(p.numel() for p in model.parameters()) / 1e6)

    pool, table, stored = np.load(out / "pool.npy", mmap_mode="r"), read_json(out / "nouns.json"), read_json(out / "pool.json")
    extra, extra_names = np.load(out / "extra.npy"), np.array(read_json(out / "extra.json"))
    banks = Banks(table, stored["metas"])
    caption_ids = ids(tokenizer, stored["captions"], length).to(torch.int16)
    val, val_meta = np.load(out / "val.npy"), read_json(out / "val.json")["metas"]
    one = [i for i, m in enumerate(val_meta) if len(m["n"]) == 1][:300]
    truth = [val_meta[i]["n"][0] for i in one]
    rng, clock, sums, last, t0, first = np.random.default_rng(step), Clock(c, 100, spent), [], time.time(), time.time(), step
    few = c["batch"] // 4

    def state():
        return {"model": model.state_dict(), "optimizer": opt.state_dict(), "step": step, "spent": clock.spent()}

    while not clock.over(step):
        for g in opt.param_groups:
            g["lr"] = c["lr"] * clock.factor(step)
        j = np.sort(rng.choice(len(pool), c["batch"] - few, False))
        k = rng.choice(len(extra), few, False)
        shown, target = pool[j], banks.noun_targets(j)
        # rows whose picture has become a close-up: no longer what the caption says
        close = [row for row, i in enumerate(j) if len(banks.members[i]) == 2 and rng.random() < c.get("closeups", 0)]
        if close:
            which = rng.integers(2, size=len(close))
            shown[close] = closeup(shown[close], which)
            target[close] = 0
            target[close, [banks.members[j[row]][w] for row, w in zip(close, which)]] = 1
        entire = torch.ones(len(j), dtype=torch.bool, device=DEVICE)
        entire[close] = False
        x = pixels(np.concatenate([shown, extra[k]]))
        x = x + torch.randn_like(x) * (.1 * rng.random())
        template = NOUN_TEMPLATES[rng.integers(len(NOUN_TEMPLATES))]
        others, where = np.unique(extra_names[k], return_inverse=True)
        prompts = ([template.format(n) for n in banks.nouns] + banks.backgrounds + banks.styles
                   + [template.format("a " + n) for n in others])
        full = caption_ids[j].long()
        full = full[:, :int((full != tokenizer.eos_token_id).sum(1).max()) + 1].to(DEVICE)[entire]
        with autocast(cfg["bf16"]):
            image = image_features(model, x)
            caption = text_features(model, full)
            bank = text_features(model, ids(tokenizer, prompts, length, True).to(DEVICE))
        scale = model.logit_scale.exp().clamp(max=100)
        n, nb, ns = len(banks.nouns), len(banks.backgrounds), len(banks.styles)
        own, other = image[:len(j)], image[len(j):]
        # whole captions; equal captions are no negatives
        logits = scale * own[entire] @ caption.T
        same = (full[:, None] == full[None]).all(-1) & ~torch.eye(len(full), dtype=torch.bool, device=DEVICE)
        logits = logits.masked_fill(same, -1e4)
        y = torch.arange(len(full), device=DEVICE)
        whole = (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2
        noun_bank = torch.cat([bank[:n], bank[n + nb + ns:]])
        target = F.pad(target, (0, len(others)))
        has = target.sum(1) > 0
        noun = F.cross_entropy(scale * own[has] @ noun_bank.T, target[has])
        wide = F.cross_entropy(scale * other @ noun_bank.T, torch.from_numpy(where + n).to(DEVICE))
        place = F.cross_entropy(scale * own[entire] @ bank[n:n + nb].T,
                                torch.from_numpy(banks.background[j]).to(DEVICE)[entire])
        style = F.cross_entropy(scale * own @ bank[n + nb:n + nb + ns].T,
                                torch.from_numpy(banks.style[j]).to(DEVICE), ignore_index=-1)
        loss = whole + noun + .5 * wide + .3 * place + .3 * style
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        step += 1
        sums.append([v.item() for v in (loss, whole, noun, wide, place, style)])
        if step % c["every"] == 0:
            m = np.mean(sums, 0)
            sums, note = [], {}
            if step % (5 * c["every"]) == 0:
                model.eval()
                note["top1"], note["top5"] = noun_accuracy(model, tokenizer, table, val[one], truth, length)
                model.train()
            log(out, name, step, step * c["batch"], m[0], whole=m[1], noun=m[2], wide=m[3], place=m[4], style=m[5],
                rate=(step - first) * c["batch"] / (time.time() - t0), **note)
        if time.time() - last > 120:
            last = time.time()
            save_atomically(state(), state_path)
    save_atomically(state(), state_path)
    model.eval()
    top1, top5 = noun_accuracy(model, tokenizer, table, val[one], truth, length)
    model.save_pretrained(out / name)
    if name == "clip":
        save_text_encoder(cfg, out, model)
    steps, samples = onward.before(out, name)
    result = {"noun_top1": top1, "noun_top5": top5, "steps": steps + step, "samples": samples + step * c["batch"]}
    write_json(out / f"{name}.json", result)
    print(result)


@torch.no_grad()
def keep_words_apart(text, token_gain, position_gain):
    """Raises the embeddings of the tower that conditions the UNet. After a short contrastive training the layers
    drown them: "woman" and "princess" have nearly one state (cosine 0.94), and the UNet learns nouns slowly.
    With the embeddings raised every token's state carries its own word, and the context as well."""
    for name, p in text.named_parameters():
        if "token_embedding" in name:
            p.mul_(token_gain)
        elif "position_embedding" in name:
            p.mul_(position_gain)


def save_text_encoder(cfg, out, model):
    """Saves the text tower, which conditions the UNet, as out/text_encoder."""
    text = CLIPTextModel(model.config.text_config)
    own = text.state_dict().keys()
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("text_model.")}
    if not any(k.startswith("text_model.") for k in own):
        tower = {k.removeprefix("text_model."): v for k, v in tower.items()}
    missing = text.load_state_dict(tower, strict=False).missing_keys
    assert not [k for k in missing if "position_ids" not in k], missing
    keep_words_apart(text, *cfg["clip"]["embedding_gain"])
    text.save_pretrained(out / "text_encoder")
