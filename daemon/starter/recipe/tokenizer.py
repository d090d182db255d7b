"""A small byte-level BPE tokenizer in the files of CLIPTokenizer (vocab.json, merges.txt, tokenizer.json)."""
import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

import world
from common import read_json, write_json

START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = START.replace("|", r"\|") + "|" + END.replace("|", r"\|") + \
    r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# words that prompts may use although no base caption has them
SPARE = """place animal plant food vehicle building object person scene style left right next of to wearing with
    holding riding big small little happy old new very glossy flat pixel sketch cute boy girl photo drawing
    toy statue cartoon view empty driving eating playing near behind under over made wet shiny dark bright
    cyan brown""".split()


def train(captions, vocabulary, folder, length):
    """The byte alphabet, the same with </w>, the merges, then the two special tokens: CLIP's order."""
    t = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END))
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                         normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "removed", True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocabulary - 258, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        special_tokens=[], show_progress=False))
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(t.to_str())["model"]["merges"]]
    tokens = list(dict.fromkeys(alphabet + [a + "</w>" for a in alphabet] + [m.replace(" ", "") for m in merges]))
    tokens += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {w: i for i, w in enumerate(tokens)}, None)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", **special, "model_max_length": length, "do_lower_case": True,
        "add_prefix_space": False, "errors": "replace"})
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer.json").unlink(missing_ok=True)   # one of before would be read instead of the new files
    loaded = CLIPTokenizer.from_pretrained(str(folder))
    loaded.save_pretrained(str(folder))              # adds tokenizer.json
    (folder / "tokenizer_config.json").write_text(config)
    return loaded


def ids(tokenizer, captions, length, trim=False):
    """[n, length] token ids, padded with the end token; `trim` cuts what is padding in every row."""
    i = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    if trim:
        i = i[:, :int((i != tokenizer.eos_token_id).sum(1).max()) + 1]
    return i


def run(cfg, out):
    captions = read_json(out / "pool.json")["captions"][:40000]
    words = [e["noun"] for e in read_json(out / "nouns.json")] * 200 + SPARE * 300 + list(world.COLORS) * 300
    extra = read_json(out / "extra.json")
    t = train(captions + words + extra, cfg["vocabulary"], out / "tokenizer", cfg["max_length"])
    print("vocabulary", len(t), t.tokenize("a small dog left of a house on the beach, noto style"))
