"""What the model and the scorer are worth, in figures.

Real pictures are compositions of held-back combinations, which nothing was trained on; generated pictures come
from their captions. A noun is right when its prompt scores highest among all nouns; in a picture of two
objects both are right when the two highest are the two named, and both are in place when a close-up of the left
one and one of the right are each recognised as the noun that the caption has there. The identity scorer is the
nearest class mean of image features over the concepts' eight pictures, tested on further compositions.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer

import concepts
import sheets
import world
from common import DEVICE, read_json, write_json
from train_clip import closeup, embed_images, embed_texts
from train_vae import psnr

PER_CONCEPT = 16


class Scorer:
    """The CLIP with the prompts of all nouns, backgrounds and styles."""

    def __init__(self, folder, table, length):
        self.model = CLIPModel.from_pretrained(folder).to(DEVICE, torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        text = lambda prompts: embed_texts(self.model, self.tokenizer, prompts, length)
        self.nouns = text(["a picture of " + world.article(e["noun"]) for e in table])
        self.phrases = world.backgrounds()
        self.backgrounds, self.styles = text(self.phrases), text([f"{s} style" for s in world.STYLES])
        self.text = text

    def objects_in_place(self, images, metas):
        """-> {index of a picture of two: the noun of the close-up of its left and of its right object}."""
        two = [i for i, m in enumerate(metas) if len(m["n"]) == 2]
        if not two:
            return {}
        nouns = [(embed_images(self.model, closeup(images[two], [w] * len(two))) @ self.nouns.T).argmax(1).tolist()
                 for w in (0, 1)]
        return {i: [left, right] for i, left, right in zip(two, *nouns)}

    def measure(self, images, captions, metas, table):
        """Accuracies over the pictures whose caption names what is asked; text alignment is the mean cosine."""
        f = embed_images(self.model, images)
        nouns, places, styles = f @ self.nouns.T, f @ self.backgrounds.T, f @ self.styles.T
        tally = {k: [] for k in ("noun_top1", "noun_top5", "both_nouns", "both_in_place", "one_of_two", "style",
                                 "background")}
        close = self.objects_in_place(images, metas)
        for i, (caption, meta) in enumerate(zip(captions, metas)):
            order = nouns[i].argsort(descending=True).tolist()
            if len(meta["n"]) == 1:
                tally["noun_top1"].append(order[0] == meta["n"][0])
                tally["noun_top5"].append(meta["n"][0] in order[:5])
            elif len(meta["n"]) == 2:
                tally["both_nouns"].append(set(order[:2]) == set(meta["n"]))
                tally["both_in_place"].append(close[i] == meta["n"])
                tally["one_of_two"].append(order[0] in meta["n"])
            if f"{meta['s']} style" in caption:
                tally["style"].append(world.STYLES[styles[i].argmax()] == meta["s"])
            if meta["b"] in caption:
                tally["background"].append(self.phrases[places[i].argmax()] == meta["b"])
        result = {k: round(float(np.mean(v)), 4) for k, v in tally.items() if v}
        result["counts"] = {k: len(v) for k, v in tally.items()}
        t = self.text(list(captions))
        result["text_alignment"] = round((f * t).sum(1).mean().item(), 4)
        result["text_alignment_shuffled"] = round((f * t.roll(1, 0)).sum(1).mean().item(), 4)
        return result


def complete(captions, metas, table, counts=(1, 2)):
    """Indices of held-back pictures whose caption names every object by its own noun."""
    return [i for i, (c, m) in enumerate(zip(captions, metas)) if len(m["n"]) in counts
            and all(table[n]["noun"] in c for n in m["n"])]


def identity(scorer, cfg, art_folder, reference=None):
    """Nearest class mean over the concepts' eight pictures -> accuracies on unseen ones, and the means."""
    first, more, _ = concepts.all_concepts(art_folder, cfg["size"])
    everything = first + more
    stack = lambda c, n, seed: np.stack([np.asarray(p) for p, _ in c.pictures(n, seed)])
    means = F.normalize(torch.stack([embed_images(scorer.model, stack(c, 8, 0)).mean(0) for c in everything]), dim=-1)
    result = {}
    for group, count in (("of_15", len(first)), ("of_64", len(everything))):
        right, per = [], {}
        for k, c in enumerate(everything[:count]):
            f = embed_images(scorer.model, stack(c, PER_CONCEPT, 7))
            hit = (f @ means[:count].T).argmax(1) == k
            right.append(hit)
            per[c.name] = round(hit.float().mean().item(), 3)
        result[group] = round(torch.cat(right).float().mean().item(), 4)
        if count == len(first):
            result["each_of_15"] = per
    return result, means, [c.name for c in everything]


def run(cfg, out, art_folder, folder):
    folder = Path(folder)
    table, stored, images = read_json(out / "nouns.json"), read_json(out / "val.json"), np.load(out / "val.npy")
    captions, metas = stored["captions"], stored["metas"]
    scorer = Scorer(folder / "clip", table, cfg["max_length"])
    vae = AutoencoderKL.from_pretrained(folder / "model/vae").to(DEVICE, torch.float32).eval()
    result = {"nouns": len(table), "vae_psnr_unseen_db": round(psnr(vae, images), 2),
              "real": scorer.measure(images, captions, metas, table)}
    result["identity"], means, names = identity(scorer, cfg, art_folder)
    save_file({"means": means.contiguous()}, folder / "concepts/identity.safetensors", {"names": ",".join(names)})
    chosen = complete(captions, metas, table)[:cfg["eval"]]
    pick = lambda values: [values[i] for i in chosen]
    result["real_same_captions"] = scorer.measure(images[chosen], pick(captions), pick(metas), table)
    pipeline = sheets.load_pipeline(folder / "model")
    generated = sheets.generate(pipeline, pick(captions), cfg, seed=5000)
    result["generated"] = scorer.measure(generated, pick(captions), pick(metas), table)
    real, made = result["real_same_captions"], result["generated"]
    compared = ("noun_top1", "both_nouns", "both_in_place", "style", "background")
    result["generated_over_real"] = {k: round(made[k] / real[k], 3) for k in compared if real.get(k) and k in made}
    result["training"] = {k: read_json(out / f"{k}.json") for k in ("vae", "clip", "scorer", "unet")}
    result["sampling"] = {"steps": cfg["steps"], "guidance": cfg["guidance"], "captions": len(chosen)}
    write_json(folder / "scores.json", result)
    print(json.dumps(result, indent=1))
    return result
