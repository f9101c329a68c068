"""How a model wants a conversation written: its chat format.

A GGUF carries the format as a Jinja template. The demo needs one shape of conversation (a system
prompt, a question, the beginning of the answer), so a table of the formats in use takes the
template engine's place.
"""

from dataclasses import dataclass
from typing import Any

from pagealloc.demo.tokenizer import Tokenizer

__all__ = ["ChatFormat", "ChatPrompt", "chat_prompt", "find_chat_format"]


@dataclass(frozen=True)
class ChatFormat:
    """The text around the system prompt and around the question."""

    name: str
    marker: str  # occurs in the template of a model that wants this format
    before_system: str
    after_system: str
    before_question: str
    after_question: str


CHAT_FORMATS = (
    ChatFormat(
        "chatml",
        "<|im_start|>",
        "<|im_start|>system\n",
        "<|im_end|>\n",
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    ChatFormat(
        "llama-3",
        "<|start_header_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ChatFormat(
        "zephyr", "<|user|>", "<|system|>\n", "</s>\n", "<|user|>\n", "</s>\n<|assistant|>\n"
    ),
    ChatFormat("llama-2", "[INST]", "[INST] <<SYS>>\n", "\n<</SYS>>\n\n", "", " [/INST]"),
)
PLAIN = ChatFormat("plain", "", "", "\n\n", "Question: ", "\nAnswer:")
"""For models without a template."""


@dataclass(frozen=True)
class ChatPrompt:
    """Token ids of one prompt: the part all conversations share, and the part of this one."""

    system_ids: list[int]
    question_ids: list[int]


def find_chat_format(reader: Any) -> ChatFormat:
    """Return the format that the template of an open GGUF file asks for."""
    field = reader.fields.get("tokenizer.chat_template")
    template = "" if field is None else str(field.contents())
    return next((fmt for fmt in CHAT_FORMATS if fmt.marker in template), PLAIN)


def chat_prompt(tokenizer: Tokenizer, fmt: ChatFormat, system: str, question: str) -> ChatPrompt:
    """Return the token ids of a system prompt and a question.

    The two texts are encoded as text: the spelling of a special token in them stays text.
    """

    def ours(text: str) -> list[int]:
        return tokenizer.encode(text, parse_special=True) if text else []

    return ChatPrompt(
        system_ids=[
            *tokenizer.begin_ids,
            *ours(fmt.before_system),
            *tokenizer.encode(system),
            *ours(fmt.after_system),
        ],
        question_ids=[
            *ours(fmt.before_question),
            *tokenizer.encode(question),
            *ours(fmt.after_question),
        ],
    )
