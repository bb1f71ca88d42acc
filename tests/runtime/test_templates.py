from __future__ import annotations

from pathlib import Path

import pytest
from small_tokenizers import CHATML, build_tokenizer
from transformers import AutoTokenizer

from fitune.recipes.errors import ModelError
from fitune.runtime.data.templates import ensure_chat_template

CONVERSATION = [
    {"role": "user", "content": "What is feta?"},
    {"role": "assistant", "content": "A cheese in brine."},
]


def test_a_tokenizers_own_template_is_kept() -> None:
    tokenizer = build_tokenizer(CHATML)
    assert not ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == CHATML


def test_a_tokenizer_without_a_template_gets_chatml() -> None:
    tokenizer = build_tokenizer(None)
    assert ensure_chat_template(tokenizer)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == (
        "<|im_start|>user\nWhat is feta?<|im_end|>\n<|im_start|>assistant\nA cheese in brine.<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(CONVERSATION[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nWhat is feta?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizer_without_the_chatml_end_token_ends_turns_with_its_own_end_of_sequence() -> None:
    tokenizer = build_tokenizer(None, chatml=False, eos="<|endoftext|>")
    ensure_chat_template(tokenizer)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == (
        "<|im_start|>user\nWhat is feta?<|endoftext|>\n<|im_start|>assistant\nA cheese in brine.<|endoftext|>\n"
    )


def test_the_default_starts_with_bos_where_plain_text_does() -> None:
    tokenizer = build_tokenizer(None, adds_bos=True)
    ensure_chat_template(tokenizer)
    ids = tokenizer.apply_chat_template(CONVERSATION)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_no_token_is_added_to_the_vocabulary() -> None:
    tokenizer = build_tokenizer(None, chatml=False, eos="<|endoftext|>")
    before = len(tokenizer)
    ensure_chat_template(tokenizer)
    assert len(tokenizer) == before


def test_the_default_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(None)
    ensure_chat_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(CONVERSATION) == tokenizer.apply_chat_template(CONVERSATION)


def test_a_tokenizer_without_any_token_that_ends_a_turn_is_refused() -> None:
    with pytest.raises(ModelError, match="neither a chat template nor a token that ends a turn"):
        ensure_chat_template(build_tokenizer(None, chatml=False, eos=None))


def test_several_templates_without_a_default_are_refused_by_name() -> None:
    tokenizer = build_tokenizer(None)
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ModelError, match="tool_use, rag"):
        ensure_chat_template(tokenizer)
