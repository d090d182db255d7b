"""Writes golden/clip/: a tiny random CLIPModel folder, and features.json with what transformers computes from it.

The weights come from a seed and are stored in f16; everything is small, so that the folder may be committed.

    python tests/parity/make_clip_golden.py
"""

import json
import pathlib
import shutil

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, Regex
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

torch.set_num_threads(1)
torch.manual_seed(7)
folder = pathlib.Path(__file__).resolve().parent.parent / "golden" / "clip"
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True)

# A byte-level BPE over 26 letters, some merges, and the special tokens neither last nor highest.
letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
vocabulary = letters + [c + "</w>" for c in letters]
BOS, EOS = len(vocabulary), len(vocabulary) + 1
vocabulary += ["<|startoftext|>", "<|endoftext|>"]
merges = [("p", "h"), ("o", "t"), ("ph", "ot"), ("phot", "o</w>"), ("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
vocabulary += [a + b for a, b in merges]
(folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, separators=(",", ":")))
(folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
tokenizer = Tokenizer(
    models.BPE(
        {token: i for i, token in enumerate(vocabulary)},
        merges,
        end_of_word_suffix="</w>",
        unk_token="<|endoftext|>",
    )
)
tokenizer.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
tokenizer.post_processor = processors.RobertaProcessing(
    ("<|endoftext|>", EOS), ("<|startoftext|>", BOS), trim_offsets=False, add_prefix_space=False
)
tokenizer.save(str(folder / "tokenizer.json"), pretty=False)

config = CLIPConfig(
    projection_dim=12,
    text_config=dict(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, hidden_act="quick_gelu", projection_dim=12,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS,
    ),
    vision_config=dict(
        hidden_size=20, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_channels=3,
        image_size=12, patch_size=4, hidden_act="gelu", layer_norm_eps=1e-4, projection_dim=12,
    ),
)  # fmt: skip
model = CLIPModel(config).eval()
generator = torch.Generator().manual_seed(8)
with torch.no_grad():
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(((1 if name.endswith("norm.weight") or "norm1.w" in name or "norm2.w" in name else 0) + 0.3 * noise).half().float())
state = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.endswith("position_ids")}
save_file(state, folder / "model.safetensors", {"format": "pt"})
(folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str))
processor = CLIPImageProcessor(
    size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, resample=3,
    image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28],
)  # fmt: skip
processor.save_pretrained(folder)

# The first is CLIP's own size; the others are resized, cropped on the long side, and enlarged.
SIZES = [(12, 12), (31, 20), (7, 9)]
rng = np.random.default_rng(9)
pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]
PROMPTS = ["a photo of a cat", "dog", "A Dog and a CAT on a very long beach with many more words"]


def ids(prompt):
    encoded = tokenizer.encode(prompt).ids
    return encoded if len(encoded) <= 12 else encoded[:11] + [EOS]


def normalised(output):
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return [round(v, 6) for v in torch.nn.functional.normalize(features, dim=-1)[0].tolist()]


with torch.no_grad():
    golden = {
        "pictures": [
            {
                "width": p.width,
                "height": p.height,
                "pixels": p.tobytes().hex(),
                "features": normalised(model.get_image_features(**processor(p, return_tensors="pt"))),
            }
            for p in pictures
        ],
        "prompts": [
            {
                "prompt": prompt,
                "ids": ids(prompt),
                "features": normalised(model.get_text_features(input_ids=torch.tensor([ids(prompt)]))),
            }
            for prompt in PROMPTS
        ],
    }
(folder / "features.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
for f in sorted(folder.iterdir()):
    print(f.name, f.stat().st_size)
