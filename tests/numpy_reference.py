"""An independent NV-Embed in float64 and plain numpy, written from the paper, that the PyTorch model must equal.

It shares no code with the library; golden vectors made by NVIDIA's own code are tested where they are available.
"""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def embed(folder: Path, ids: list[int], prompt_tokens: int) -> np.ndarray:
    """Embeds one text without padding; returns a unit vector, float64 [D]."""
    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: value.astype(np.float64) for name, value in load_file(file).items()}
    text, latent = config["text_config"], config["latent_attention_config"]
    heads, kv_heads, width = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    eps, tokens = text["rms_norm_eps"], len(ids)
    x = weights["embedding_model.embed_tokens.weight"][ids]
    for i in range(text["num_hidden_layers"]):
        w = {
            name.removeprefix(f"embedding_model.layers.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"embedding_model.layers.{i}.")
        }
        n = rms(x, w["input_layernorm.weight"], eps)
        q = split(n @ w["self_attn.q_proj.weight"].T, heads, width)
        k = split(n @ w["self_attn.k_proj.weight"].T, kv_heads, width)
        v = split(n @ w["self_attn.v_proj.weight"].T, kv_heads, width)
        q, k = rotary(q, text["rope_theta"]), rotary(k, text["rope_theta"])
        out = np.empty_like(q)
        for head in range(heads):
            group = head * kv_heads // heads
            out[head] = softmax(q[head] @ k[group].T / math.sqrt(width)) @ v[group]
        x = x + out.transpose(1, 0, 2).reshape(tokens, -1) @ w["self_attn.o_proj.weight"].T
        n = rms(x, w["post_attention_layernorm.weight"], eps)
        gate = n @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (n @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    x = rms(x, weights["embedding_model.norm.weight"], eps)
    return pool(latent_attention(x, weights, latent), prompt_tokens)


def latent_attention(x: np.ndarray, weights: dict, latent: dict) -> np.ndarray:
    """Computes the latent attention: the pooler without its mean."""
    block = "latent_attention_model.cross_attend_blocks."
    heads, width = latent["num_cross_heads"], latent["cross_dim_head"]

    def norm(values: np.ndarray, name: str) -> np.ndarray:
        mean, variance = values.mean(-1, keepdims=True), values.var(-1, keepdims=True)
        scaled = (values - mean) / np.sqrt(variance + 1e-5)
        return scaled * weights[f"{block}{name}.weight"] + weights[f"{block}{name}.bias"]

    q = split(norm(x, "0.norm") @ weights[f"{block}0.fn.to_q.weight"].T, heads, width)
    kv = norm(weights["latent_attention_model.latents"], "0.norm_context") @ weights[f"{block}0.fn.to_kv.weight"].T
    k, v = (split(projected, heads, width) for projected in np.split(kv, 2, axis=-1))
    mixed = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(width)) @ v
    x = x + mixed.transpose(1, 0, 2).reshape(len(x), -1) @ weights[f"{block}0.fn.to_out.weight"].T
    inner = norm(x, "1.norm") @ weights[f"{block}1.fn.net.0.weight"].T + weights[f"{block}1.fn.net.0.bias"]
    value, gate = np.split(inner, 2, axis=-1)
    gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    return x + (value * gelu) @ weights[f"{block}1.fn.net.2.weight"].T + weights[f"{block}1.fn.net.2.bias"]


def pool(x: np.ndarray, prompt_tokens: int) -> np.ndarray:
    """Returns the mean of the tokens after the prompt, at unit length."""
    mean = x[prompt_tokens:].mean(0)
    return mean / np.linalg.norm(mean)


def split(x: np.ndarray, heads: int, width: int) -> np.ndarray:
    """Reshapes [T, heads * width] to [heads, T, width]."""
    return x.reshape(len(x), heads, width).transpose(1, 0, 2)


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Applies a root-mean-square norm."""
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rotary(x: np.ndarray, theta: float) -> np.ndarray:
    """Applies rotary positions as complex numbers: entry j pairs with entry j + width/2."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / theta ** (np.arange(half) / half)
    rotated = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([rotated.real, rotated.imag], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """Applies a softmax along the last axis."""
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)
