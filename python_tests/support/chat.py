"""Chat templates of several makes, on the tiny tokenizer: what stands around a question differs in each."""

from __future__ import annotations

import copy
from typing import Any

from support.tiny import tiny_tokenizer

# Each begins with the start token, or has none; the answer follows a line, a blank, or a thought that is empty.
TEMPLATES = {
    "turns with a system's": (
        "{% if messages[0]['role'] != 'system' %}<s>system\nBe brief.</s>\n{% endif %}"
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ),
    "a start token and headers": (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
    ),
    "brackets, no start token": (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    ),
    "an empty thought": (
        "{% for m in messages %}|{{ m['role'] }}|\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}|assistant|\n{% endif %}"
    ),
    "nothing before the question": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
}


def chatting(template: str, *, start: bool = True) -> Any:
    """The tiny tokenizer with this template, of `TEMPLATES` or its text. start: it puts <s> in front by itself"""
    tokenizer = copy.deepcopy(tiny_tokenizer(start))
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer
