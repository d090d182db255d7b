"""Checks that exported adapters mean the same to other tools: reads them with diffusers', PEFT's and transformers' own
readers and compares every layer's merged weight with W0 + scale * scatter(B) A.

The adapters are written here, after spec/ADAPTER.md and without the Rust writer, so that the document is checked too.

    python tests/parity/check_exports.py [path of the built example "export"]
"""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
import transformers
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()
MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & MASK, (p >> 32) ^ c[3] ^ k[1], p & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def owned_rows(partition, m):
    """The rows of 0..m that the partition's slot owns."""
    if partition is None:
        return list(range(m))
    capacity, slot, seed = partition["capacity"], partition["slot"], partition["seed"]
    block = slice(slot * m // capacity, (slot + 1) * m // capacity)
    if partition["scheme"] == "strided":
        return list(range(m))[slot::capacity]
    order, words = list(range(m)), []
    if partition["scheme"] == "permuted":
        blocks = 0
        for i in range(m - 1, 0, -1):
            if not words:
                words = philox([blocks & MASK, blocks >> 32, m, 9 << 16], [seed & MASK, seed >> 32])
                blocks += 1
            j = words.pop(0) * (i + 1) >> 32
            order[i], order[j] = order[j], order[i]
    return sorted(order[block])


def write_adapter(path, models, partition, rank, alpha, delta, dtype, vectors):
    """Writes a random adapter on every attention and feed-forward Linear of `models`; returns its factors and tokens."""
    generator = np.random.default_rng(rank)
    number = {"F16": np.float16, "F32": np.float32}[dtype]
    tensors, outputs, factors = {}, {}, {}
    for part, model in models.items():
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or not any(s in name for s in ("attn", "ff.net")):
                continue
            name = f"{part}.{'text_model.' if part != 'unet' else ''}{name}"
            m, n = module.weight.shape
            rows = owned_rows(partition, m)
            outputs[name] = m
            if not rows:
                continue
            a = tensors[f"{name}.lora_A"] = generator.standard_normal((rank, n)).astype(number)
            b = tensors[f"{name}.lora_B"] = generator.standard_normal((len(rows), rank)).astype(number)
            factors[name] = (a, b, rows)
    tokens = [f"milo_{i}" for i in (1, 2)]
    for token in tokens:
        tensors[f"tokens.{token}"] = generator.standard_normal((vectors, 32)).astype(number)
    digest, data, header = hashlib.sha256(), b"", {}
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {dtype} {array.shape[0]},{array.shape[1]}\n".encode() + array.tobytes())
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    manifest = json.dumps({
        "name": "milo", "kind": "subject", "class_word": "dog",
        "tokens": [{"name": token, "vectors": vectors} for token in tokens],
        "base": {"architecture": "test", "digest": "0" * 64},
        "algorithm": {"id": "test", "version": "1", "digest": None, "config": {}},
        "partition": partition, "rank": rank, "alpha": alpha, "delta": delta, "outputs": outputs,
        "erasure_lambda": 0.0, "training": {"steps": 1, "seed": 2, "data_digest": "0" * 64},
        "licence": None, "created": None, "tensor_digest": digest.hexdigest(),
    })
    header["__metadata__"] = {
        "blocklora.spec": "1.0", "blocklora.manifest": manifest,
        "blocklora.manifest_digest": hashlib.sha256(manifest.encode()).hexdigest(),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return factors, [tensors[f"tokens.{t}"].astype(np.float32) for t in tokens]


def new_models():
    """A small UNet and text encoder with the module names of SD 1.x; the same weights every time."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1)
    return {"unet": unet, "text_encoder": transformers.CLIPTextModel(config)}


def plain(name):
    return name.replace("text_encoder.text_model.", "text_encoder.")


def weights(models):
    """Name -> the weight that a Linear acts with, PEFT's active adapters included."""
    found = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.Linear):
                weight = module.base_layer.weight.detach().double()
                for adapter in module.active_adapters:
                    a = module.lora_A[adapter].weight.detach().double()
                    weight = weight + module.scaling[adapter] * (module.lora_B[adapter].weight.detach().double() @ a)
                found[f"{part}.{name}"] = weight
            elif isinstance(module, torch.nn.Linear) and ".lora_" not in name and not name.endswith("base_layer"):
                found[f"{part}.{name}"] = module.weight.detach().double()
    return {name.replace(".base_model.model.", ".").replace("text_encoder.text_model.", "text_encoder."): w
            for name, w in found.items()}


def expected_weights(factors, scale):
    found = weights(new_models())
    for name, (a, b, rows) in factors.items():
        found[plain(name)][rows] += scale * torch.from_numpy(b.astype(np.float64) @ a.astype(np.float64))
    return found


def load_file_as_diffusers(path):
    models = new_models()
    state, alphas, metadata = Loader.lora_state_dict(str(path), unet_config=models["unet"].config, return_lora_metadata=True)
    Loader.load_lora_into_unet(state, alphas, models["unet"], adapter_name="milo", metadata=metadata)
    Loader.load_lora_into_text_encoder(
        state, alphas, models["text_encoder"], prefix="text_encoder", adapter_name="milo", metadata=metadata)
    return models


def load_as_peft(folder):
    models = new_models()
    return {part: peft.PeftModel.from_pretrained(models[part], folder / part) for part in models}


def load_as_transformers(folder):
    """As PEFT loads it, but the text encoder by transformers' own method."""
    models = load_as_peft(folder) | {"text_encoder": new_models()["text_encoder"]}
    models["text_encoder"].load_adapter(str(folder / "text_encoder"))
    return models


def compare(what, actual, expected):
    assert actual.keys() == expected.keys(), (what, actual.keys() ^ expected.keys())
    worst = 0.0
    for name, weight in expected.items():
        worst = max(worst, ((actual[name] - weight).abs().max() / weight.abs().max()).item())
    assert worst < 2e-7, f"{what}: relative difference {worst}"
    return worst


def check_textual_inversion(path, tokens, folder):
    """diffusers puts the two vectors where the prompt says <milo>."""
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    encoder = new_models()["text_encoder"]

    class Pipeline(diffusers.loaders.TextualInversionLoaderMixin):
        components = {"tokenizer": tokenizer, "text_encoder": encoder}
        hf_device_map = None

    Pipeline.tokenizer, Pipeline.text_encoder = tokenizer, encoder
    pipeline = Pipeline()
    pipeline.load_textual_inversion(str(path))
    ids = tokenizer(pipeline.maybe_convert_prompt("a <milo> b", tokenizer)).input_ids
    embeddings = encoder.get_input_embeddings().weight[ids].detach().numpy()
    assert np.array_equal(embeddings[2:4], np.concatenate(tokens)), "the tokens' vectors differ"


def main():
    root = Path(__file__).resolve().parents[2]
    if len(sys.argv) > 1:
        export = [sys.argv[1]]
    else:
        export = ["cargo", "run", "-q", "--manifest-path", str(root / "Cargo.toml"), "-p", "blocklora-spec",
                  "--example", "export", "--"]
    alpha_only, over_rank = "alpha * B * A", "alpha / rank * B * A"
    cases = [
        (None, 4, 1.0, alpha_only, "F32", 1),
        (None, 3, 0.7, over_rank, "F16", 1),
        ({"scheme": "contiguous", "capacity": 16, "seed": 0, "slot": 3}, 4, 0.7, alpha_only, "F16", 1),
        ({"scheme": "strided", "capacity": 5, "seed": 0, "slot": 4}, 2, 2.0, over_rank, "F32", 3),
        ({"scheme": "permuted", "capacity": 20, "seed": 2**64 - 3, "slot": 10}, 4, 1.0, alpha_only, "F16", 1),
    ]
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            partition, rank, alpha, delta, dtype, vectors = case
            factors, tokens = write_adapter(folder / "adapter.safetensors", new_models(), *case)
            subprocess.run([*export, folder / "adapter.safetensors", folder], check=True)
            expected = expected_weights(factors, alpha if delta == alpha_only else alpha / rank)
            kohya = compare("kohya", weights(load_file_as_diffusers(folder / "kohya.safetensors")), expected)
            own = compare("diffusers", weights(load_file_as_diffusers(folder / "diffusers.safetensors")), expected)
            raw = compare("peft", weights(load_as_peft(folder / "peft")), expected)
            compare("transformers", weights(load_as_transformers(folder / "peft")), expected)
            if vectors == 1:
                check_textual_inversion(folder / "tokens.safetensors", tokens, folder)
            scheme = partition["scheme"] if partition else "no partition"
            print(f"{scheme:12} rank {rank} alpha {alpha} {delta:20} {dtype}: {len(factors)} of {len(expected)} layers, "
                  f"relative difference kohya {kohya:.1e}, diffusers {own:.1e}, peft {raw:.1e}")


if __name__ == "__main__":
    main()
