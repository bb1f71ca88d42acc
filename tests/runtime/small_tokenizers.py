"""Real tokenizers, small enough to be trained in a test: byte-level BPE with ChatML's tokens, and variants of it."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Feta is a cheese in brine, made of sheep's milk and goat's milk.",
    "What is the best cheese for a salad? Listen to Pavlos: feta, my friend.",
    "A good graviera needs five months or more.\n\nCheese is patience you can eat.",
    "system user assistant question answer\n\n\n",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
BOS_CHATML = "{{ bos_token }}" + CHATML
AMBIGUOUS = CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>' }}{% endif")
WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKS_LAST = CHATML.replace(
    "message['content']",
    "('<think></think>' if message['role'] == 'assistant' and loop.last else '') + message['content']",
)
"""Like Qwen3's: the thinking of an answer is dropped as soon as it is history."""
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@lru_cache
def _trained(special_tokens: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return str(tokenizer.to_str())


def build_tokenizer(
    template: str | None = CHATML, *, chatml: bool = True, adds_bos: bool = False, eos: str | None = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """`chatml`: whether `<|im_start|>` and `<|im_end|>` are single tokens. The pad token is `eos`, as SmolLM2's is."""
    special_tokens = ("<s>", "<|endoftext|>", *(("<|im_start|>", "<|im_end|>") if chatml else ()))
    tokenizer = Tokenizer.from_str(_trained(special_tokens))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=eos)
    built.chat_template = template
    return built
