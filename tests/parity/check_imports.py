"""Checks that imported LoRA mean the same as to the tools that wrote them: makes files with PEFT's and diffusers' own
writers, imports each with `blocklora import`, and compares every layer's change with the one that PEFT computes, or that
diffusers' own reader makes of the file.

    python tests/parity/check_imports.py BLOCKLORA [--base MODEL_FOLDER]

BLOCKLORA is the built command.
"""

import argparse
import json
import subprocess
import tempfile
import warnings
from pathlib import Path

import diffusers
import peft
import torch
import transformers
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
# Patterns are for both parts of the model, and each part has layers for some of them only.
warnings.filterwarnings("ignore", module="peft")
transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
ROOT = Path(__file__).resolve().parents[2]
ATTENTION = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
# All that adapters may change in the bundled model.
ALL = {"unet": [*ATTENTION["unet"], "ff.net.0.proj", "ff.net.2"], "text_encoder": [*ATTENTION["text_encoder"], "fc1", "fc2"]}
UNIFORM = {"r": 4, "lora_alpha": 3}
PATTERNS = {
    "r": 4, "lora_alpha": 6, "rank_pattern": {"to_k": 2, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 7, "fc1": 3},
    "alpha_pattern": {"attn2.to_k": 5, r"down_blocks\.\d.*to_v": 1.5, "^mid_block.attentions.0.transformer_blocks.0.ff.net.2": 9,
                      "q_proj": 2},
}


class Check:
    def __init__(self, blocklora, base):
        self.blocklora, self.base = blocklora, base

    def new_models(self):
        return {
            "unet": diffusers.UNet2DConditionModel.from_pretrained(f"{self.base}/unet"),
            "text_encoder": transformers.CLIPTextModel.from_pretrained(f"{self.base}/text_encoder"),
        }

    def trained(self, targets, seed=0, **config):
        """The base's models with random factors."""
        torch.manual_seed(seed)
        models = self.new_models()
        for part, model in models.items():
            model.add_adapter(peft.LoraConfig(target_modules=targets[part], init_lora_weights=False, **config))
        return models

    def read_by_diffusers(self, path):
        models = self.new_models()
        state, alphas, metadata = Loader.lora_state_dict(
            str(path), unet_config=models["unet"].config, return_lora_metadata=True)
        Loader.load_lora_into_unet(state, alphas, models["unet"], adapter_name="x", metadata=metadata)
        Loader.load_lora_into_text_encoder(
            state, alphas, models["text_encoder"], prefix="text_encoder", adapter_name="x", metadata=metadata)
        return models

    def run(self, source, output, *options):
        command = [self.blocklora, "import", source, "-o", output, "--base", self.base, "--json", *options]
        return subprocess.run(command, capture_output=True, text=True)

    def compare(self, what, source, models, *options):
        """Imports `source`, whose changes must be those of `models`."""
        output = Path(source).with_name("imported.safetensors")
        done = self.run(source, output, *options)
        assert done.returncode == 0, (what, done.stderr)
        actual, (rank, delta, storage) = changes_of_adapter(output)
        expected = changes_of_peft(models)
        assert actual.keys() == expected.keys(), (what, actual.keys() ^ expected.keys())
        worst = max(((actual[n] - d).abs().max() / d.abs().max()).item() for n, d in expected.items())
        assert worst < 5e-7, f"{what}: relative difference {worst}"
        ranks = sorted({m.lora_A[a].out_features for m, a in peft_layers(models)})
        print(f"{what:44} {len(expected):3} layers, ranks {str(ranks):12} -> rank {rank} {storage} {delta:20} "
              f"relative difference {worst:.1e}")

    def refuses(self, what, source, *needles):
        output = Path(source).with_name("refused.safetensors")
        done = self.run(source, output)
        assert done.returncode == 1 and not output.exists(), (what, done)
        assert all(needle in done.stderr for needle in needles), (what, done.stderr)
        print(f"{what:44} refused: {done.stderr.strip().removeprefix('blocklora: error: ').split(': ', 1)[1][:110]}")


def peft_layers(models):
    for model in models.values():
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                yield module, module.active_adapters[0]


def plain(name):
    return name.replace("text_encoder.text_model.", "text_encoder.").replace(".base_model.model.", ".")


def changes_of_peft(models):
    found = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.Linear):
                (adapter,) = module.active_adapters
                a, b = (factor[adapter].weight.detach().double() for factor in (module.lora_A, module.lora_B))
                found[plain(f"{part}.{name}")] = module.scaling[adapter] * (b @ a)
    return found


def changes_of_adapter(path):
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["blocklora.manifest"])
        assert manifest["partition"] is None
        scale = manifest["alpha"] / (manifest["rank"] if manifest["delta"].startswith("alpha / rank") else 1)
        found, dtype = {}, None
        for name in manifest["outputs"]:
            a, b = (file.get_tensor(f"{name}.lora_{f}") for f in "AB")
            found[plain(name)], dtype = scale * (b.double() @ a.double()), a.dtype
    return found, (manifest["rank"], manifest["delta"], str(dtype).removeprefix("torch."))


def states(models):
    return {part: peft.get_peft_model_state_dict(model) for part, model in models.items()}


def write_by_diffusers(folder, models, form, metadata=None):
    layers = {f"{part}_lora_layers": form(state) for part, state in states(models).items()}
    Loader.save_lora_weights(folder, **layers, **(metadata or {}))
    return folder / "pytorch_lora_weights.safetensors"


def write_kohya(path, models, dtype, with_alpha):
    """As diffusers makes kohya's files of PEFT's, with the alphas, which its own function takes for the ranks."""
    tensors = {}
    for part, state in states(models).items():
        named = {f"{part}.{'text_model.' * (part != 'unet' and not k.startswith('text_model.'))}{k}": v for k, v in state.items()}
        tensors |= convert_state_dict_to_kohya(named)
    rounded = {k: v.to(dtype) if v.dim() else v for k, v in tensors.items()}
    alphas = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.Linear):
                (adapter,) = module.active_adapters
                for factor, infix in ((module.lora_A, "down"), (module.lora_B, "up")):
                    factor[adapter].weight.data = factor[adapter].weight.data.to(dtype).float()
                name = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
                key = f"lora_{'unet' if part == 'unet' else 'te1'}_{name.replace('.', '_')}.alpha"
                alphas[key] = torch.tensor(module.scaling[adapter] * module.lora_A[adapter].out_features)
    assert alphas.keys() == {k for k in tensors if k.endswith(".alpha")}
    rounded = {k: v for k, v in rounded.items() if not k.endswith(".alpha")}
    save_file({k: v.contiguous() for k, v in (rounded | (alphas if with_alpha else {})).items()}, path)


def write_old(path, models):
    """diffusers' form of 2023, which it reads and no longer writes."""
    tensors = {}
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
    for part, state in states(models).items():
        for key, value in state.items():
            module, factor = key.split(".lora_")
            linear = next(t for t in ATTENTION[part] if module.endswith(f".{t}"))
            attention = module.removesuffix(f".{linear}")
            attention += ".processor" if part == "unet" else ""
            if part != "unet" and not attention.startswith("text_model."):
                attention = f"text_model.{attention}"
            end = {"A.weight": "down", "B.weight": "up"}[factor]
            tensors[f"{part}.{attention}.{old.get(linear, linear)}_lora.{end}.weight"] = value.contiguous()
    save_file(tensors, path)


def write_peft(folder, models):
    for part, model in models.items():
        state, config = peft.get_peft_model_state_dict(model), model.peft_config["default"]
        (folder / part).mkdir()
        # What PeftModel.save_pretrained writes.
        save_file({f"base_model.model.{k}": v.contiguous() for k, v in state.items()},
                  folder / part / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder / part)


def check_peft(check, folder):
    for what, config in {"uniform": UNIFORM, "patterns": PATTERNS, "rslora": UNIFORM | {"use_rslora": True},
                         "patterns, rslora": PATTERNS | {"use_rslora": True}}.items():
        models = check.trained(ALL, **config)
        out = folder / f"peft {what}"
        out.mkdir()
        write_peft(out, models)
        check.compare(f"PEFT folders, {what}", out, models)
        file = write_by_diffusers(folder / f"header {what}", models, lambda s: s, _collate_lora_metadata(models))
        check.compare(f"diffusers with PEFT's header, {what}", file, models)
    # PeftModel's own writer, a model at a time.
    unet = peft.get_peft_model(check.new_models()["unet"], peft.LoraConfig(
        target_modules=ALL["unet"], init_lora_weights=False, **PATTERNS))
    unet.save_pretrained(folder / "alone")
    check.compare("PeftModel.save_pretrained", folder / "alone", {"unet": unet})
    check.compare("its file", folder / "alone/adapter_model.safetensors", {"unet": unet})


def check_files(check, folder):
    for what, config in {"uniform": UNIFORM, "patterns": PATTERNS}.items():
        models = check.trained(ALL, **config)
        for keys, form in {"its own keys": convert_state_dict_to_diffusers, "PEFT's keys": dict}.items():
            file = write_by_diffusers(folder / f"{what} {keys}", models, form)
            # Without a header the scale is 1, whatever it was trained with.
            check.compare(f"diffusers, {what}, {keys}", file, check.read_by_diffusers(file))
        for dtype in [torch.float32, torch.float16, torch.bfloat16]:
            file = folder / f"kohya {what} {dtype}.safetensors"
            write_kohya(file, models, dtype, True)
            check.compare(f"kohya, {what}, {str(dtype).removeprefix('torch.')}", file, models)
    models = check.trained(ALL, r=4, lora_alpha=4)
    file = folder / "no alpha.safetensors"
    write_kohya(file, models, torch.float32, False)
    check.compare("kohya without alphas", file, models)
    models = check.trained(ATTENTION, **UNIFORM)
    file = folder / "old.safetensors"
    write_old(file, models)
    check.compare("diffusers, old", file, check.read_by_diffusers(file))
    bare = {k.removeprefix("unet."): v for k, v in load_file(file).items() if k.startswith("unet.")}
    save_file(bare, folder / "bare.safetensors")
    expected = check.read_by_diffusers(file)
    check.compare("diffusers, old, UNet alone", folder / "bare.safetensors", {"unet": expected["unet"]})


def check_refusals(check, folder):
    for what, config, needles in [
        ("DoRA", peft.LoraConfig(target_modules=["to_q"], use_dora=True), ["DoRA"]),
        ("LoHa", peft.LoHaConfig(target_modules=["to_q"]), ["LOHA"]),
        ("LoKr", peft.LoKrConfig(target_modules=["to_q"]), ["LOKR"]),
        ("OFT", peft.OFTConfig(target_modules=["to_q"], oft_block_size=0, r=4), ["OFT"]),
        ("IA3", peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]), ["IA3"]),
        ("a convolution", peft.LoraConfig(target_modules=["to_q", "conv_in"]), ["conv_in", "a convolution"]),
        ("biases", peft.LoraConfig(target_modules=["to_out.0"], lora_bias=True, init_lora_weights=False), ["a bias"]),
    ]:
        model = peft.get_peft_model(check.new_models()["unet"], config)
        model.save_pretrained(folder / what)
        check.refuses(f"{what}, PEFT", folder / what, *needles)
    models = check.trained(ATTENTION, **UNIFORM, use_dora=True)
    file = write_by_diffusers(folder / "dora", models, convert_state_dict_to_diffusers)
    check.refuses("DoRA in diffusers' file", file, "lora_magnitude_vector", "DoRA")


def check_words(check, folder):
    """As the textual-inversion script of diffusers writes them."""
    width = check.new_models()["text_encoder"].config.hidden_size
    vectors = torch.randn(3, width)
    save_file({"<milo>": vectors}, folder / "words.safetensors")
    done = check.run(folder / "words.safetensors", folder / "w.safetensors")
    assert done.returncode == 0, done.stderr
    with safe_open(folder / "w.safetensors", "pt") as file:
        tokens = [t["name"] for t in json.loads(file.metadata()["blocklora.manifest"])["tokens"]]
        assert torch.equal(torch.cat([file.get_tensor(f"tokens.{t}") for t in tokens]), vectors)
    print(f"{'textual inversion':44} {len(tokens)} tokens: {tokens}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("blocklora", type=Path)
    parser.add_argument("--base", type=Path, default=ROOT / "daemon/starter/model")
    args = parser.parse_args()
    check = Check(args.blocklora.resolve(), args.base.resolve())
    for part in [check_peft, check_files, check_refusals, check_words]:
        with tempfile.TemporaryDirectory() as folder:
            part(check, Path(folder))


if __name__ == "__main__":
    main()
