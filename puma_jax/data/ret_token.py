"""The token [RET], which vectors are pooled at, in the tokenizer of a model."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from puma_jax.config import ModelConfig
from puma_jax.data.templates import PROMPT_TEMPLATES
from puma_jax.errors import CheckpointError
from puma_jax.schema import shown


def check_ids(tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> None:
    """Check that a tokenizer has no ids beyond the token table.

    Raises:
        CheckpointError: It has.
    """
    rows, vocab = config.decoder.vocab_size, tokenizer.get_vocab()
    last = max(vocab, key=vocab.__getitem__)
    if vocab[last] >= rows:
        raise CheckpointError(
            f"the tokenizer gives {shown(last)} the id {vocab[last]}, the token table has {rows} "
            "rows: the tokenizer is of another model"
        )


def add_ret_token(tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> int:
    """Return the id of [RET] in a tokenizer, to which it is added if it is new.

    Raises:
        CheckpointError: The token table has no spare row, or `ret_token` is a word of texts or
            stands for an image. The message names a token that is free.
    """
    ret, rows = config.prompt.ret_token, config.decoder.vocab_size
    vocab = tokenizer.get_vocab()
    if ret in vocab and ret not in tokenizer.get_added_vocab():
        remedy = _name_free_token(tokenizer, config)
        raise CheckpointError(f"ret_token {shown(ret)} is a token of ordinary texts: {remedy}")
    tokenizer.add_special_tokens({"additional_special_tokens": [ret]})
    number = tokenizer.get_added_vocab()[ret]
    if number >= rows:
        raise CheckpointError(
            f"no spare row for {ret}: the tokenizer has {len(tokenizer) - 1} tokens, the token "
            f"table {rows} rows: {_name_free_token(tokenizer, config)}"
        )
    if number in _image_tokens(config) or (ret not in vocab and number in vocab.values()):
        raise CheckpointError(
            f"ret_token {shown(ret)} has the id {number}, which stands for something else: "
            f"{_name_free_token(tokenizer, config)}"
        )
    return number


def _name_free_token(tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> str:
    """Return what to do about a token that cannot be [RET], with the name of one that can."""
    template = PROMPT_TEMPLATES[config.prompt.template]
    free = [
        token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
        and number not in _image_tokens(config)
        and number < config.decoder.vocab_size
        and token.content != config.prompt.ret_token
        and token.content not in template.start + template.generation_prompt
    ]
    grow = "add rows to the table with resize_token_embeddings of transformers"
    if not free:
        return grow
    example = max(free, key=lambda token: "pad" in token)
    return f"use a special token that is free, such as --ret-token {shown(example)}, or {grow}"


def _image_tokens(config: ModelConfig) -> tuple[int, ...]:
    if not config.vision.layers:
        return ()
    return config.image_token_id, config.vision_start_token_id, config.vision_end_token_id
