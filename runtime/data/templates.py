"""Chat templates: the tokenizer's own, and a documented default for the tokenizers of base models, which have none.

The default is ChatML, the form that most chat models since 2023 use:

    <|im_start|>user
    What is feta?<|im_end|>
    <|im_start|>assistant
    A cheese in brine.<|im_end|>

No token is added to the vocabulary, since a new embedding row would have to be trained and saved beside an adapter.
So a tokenizer without `<|im_end|>` ends every turn with its own end-of-sequence token, at which generation stops
anyway, and one without `<|im_start|>` reads it as plain text of a few tokens, which a model learns within some steps.
Where the tokenizer starts plain text with a beginning-of-sequence token, the template starts with it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...recipes.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_END = "<|im_end|>"


def make_default_chat_template(*, has_chatml_end: bool, starts_with_bos: bool) -> str:
    """ChatML as a Jinja template, each turn ended by `<|im_end|>` or else by the tokenizer's end-of-sequence token."""
    start = "{{ bos_token }}" if starts_with_bos else ""
    end = f"'{CHATML_END}'" if has_chatml_end else "eos_token"
    return (
        start + "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + " + end + " + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the default one; whether that was done.

    Raises ModelError where the tokenizer has no token that could end a turn, or several templates without a default.
    """
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise ModelError(f'the tokenizer has the chat templates {names}, but none called "default"')
    if tokenizer.chat_template:
        return False
    has_chatml_end = len(tokenizer(CHATML_END, add_special_tokens=False)["input_ids"]) == 1
    if not has_chatml_end and tokenizer.eos_token is None:
        raise ModelError("the tokenizer has neither a chat template nor a token that ends a turn (no eos_token)")
    tokenizer.chat_template = make_default_chat_template(
        has_chatml_end=has_chatml_end, starts_with_bos=starts_with_bos(tokenizer)
    )
    return True


def read_chat_template(tokenizer: PreTrainedTokenizerBase, path: Path, *, name: str) -> None:
    """Give a tokenizer the template in a file, `name` being what errors call it; DataError where it is none."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.chat_template: {name} cannot be read: {reason}") from error
    if not text.strip():
        raise DataError(f"data.chat_template: {name} is empty")
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise DataError(f"data.chat_template: {name}:{error.lineno}: not a Jinja template: {error.message}") from error
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return  # one that refuses this conversation may take those of the dataset


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before plain text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
