"""A tiny random NV-Embed checkpoint in NVIDIA's layout with a tokenizer like Mistral's, created in milliseconds."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

WORDS = ("the", "and", "question", "query", "Instruct", "passage", "water", "over", "in", "ing", "er", "on")


def make_tokenizer() -> Tokenizer:
    """Returns a byte-fallback BPE tokenizer: <unk> <s> </s>, 256 bytes, characters, and merges of a few words."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-\n":
        vocab[char] = len(vocab)
    merges = []
    for word in [prefix + word for word in WORDS for prefix in ("", "▁")]:
        prefix_piece = word[0]
        for char in word[1:]:
            if prefix_piece + char not in vocab:
                merges.append((prefix_piece, char))
                vocab[prefix_piece + char] = len(vocab)
            prefix_piece += char
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Returns every key and shape of a checkpoint, written down independently of the model's code."""
    text, latent = config["text_config"], config["latent_attention_config"]
    D, F = text["hidden_size"], text["intermediate_size"]
    q = text["num_attention_heads"] * text["head_dim"]
    kv = text["num_key_value_heads"] * text["head_dim"]
    inner = latent["num_cross_heads"] * latent["cross_dim_head"]
    expected = {"embedding_model.embed_tokens.weight": (text["vocab_size"], D), "embedding_model.norm.weight": (D,)}
    for i in range(text["num_hidden_layers"]):
        layer = f"embedding_model.layers.{i}."
        for name, shape in (("q_proj", (q, D)), ("k_proj", (kv, D)), ("v_proj", (kv, D)), ("o_proj", (D, q))):
            expected[f"{layer}self_attn.{name}.weight"] = shape
        for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
            expected[f"{layer}mlp.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{layer}{name}.weight"] = (D,)
    block = "latent_attention_model.cross_attend_blocks."
    expected["latent_attention_model.latents"] = (latent["num_latents_value"], D)
    for norm in ("0.norm", "0.norm_context", "1.norm"):
        expected |= {f"{block}{norm}.weight": (D,), f"{block}{norm}.bias": (D,)}
    expected |= {
        f"{block}0.fn.to_q.weight": (inner, D),
        f"{block}0.fn.to_kv.weight": (2 * inner, D),
        f"{block}0.fn.to_out.weight": (D, inner),
        f"{block}1.fn.net.0.weight": (8 * D, D),
        f"{block}1.fn.net.0.bias": (8 * D,),
        f"{block}1.fn.net.2.weight": (D, 4 * D),
        f"{block}1.fn.net.2.bias": (D,),
    }
    return expected


def make_checkpoint(folder: Path, *, seed: int = 0, shards: int = 2) -> Path:
    """Writes a checkpoint: FP16 weights in shards with an index, or in one file."""
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer()
    config = {
        "_name_or_path": "nvidia/NV-Embed-v2",
        "architectures": ["NVEmbedModel"],
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "hidden_size": 32,
        "is_mask_instruction": True,
        "latent_attention_config": {
            "model_type": "latent_attention",
            "num_latents_value": 8,
            "num_cross_heads": 2,
            "cross_dim_head": 24,
            "hidden_dim": 32,
            "latent_dim": 32,
            "output_normalize": True,
        },
        "mask_type": "b",
        "model_type": "nvembed",
        "padding_side": "right",
        "text_config": {
            "model_type": "bidir_mistral",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 72,
            "max_position_embeddings": 2048,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": tokenizer.get_vocab_size(),
        },
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "pad_token": "</s>"}))
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        is_norm = "norm" in name and name.endswith("weight")
        tensors[name] = (1 + 0.1 * values if is_norm else 0.12 * values).astype(np.float16)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for index in range(shards):
        shard_names = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in shard_names}, folder / file)
        weight_map |= dict.fromkeys(shard_names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
