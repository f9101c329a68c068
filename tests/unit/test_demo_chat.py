"""Chat formats: what stands around the system prompt and the question."""

from types import SimpleNamespace

import pytest

from pagealloc.demo.chat import CHAT_FORMATS, PLAIN, chat_prompt, find_chat_format


class Spelling:
    """A tokenizer whose tokens are characters; special spelling is marked by its sign."""

    begin_ids = (0,)

    def encode(self, text, *, parse_special=False):
        return [-ord(char) if parse_special else ord(char) for char in text]


def reader_of(template):
    field = SimpleNamespace(contents=lambda: template)
    return SimpleNamespace(fields={"tokenizer.chat_template": field} if template else {})


def spell(ids):
    return "".join(chr(abs(i)) for i in ids)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{'<|im_start|>' + message['role']}}", "chatml"),
        ("{{'<|start_header_id|>' + role}}", "llama-3"),
        ("{{'<|user|>\n' + content + eos_token}}", "zephyr"),
        ("{{bos_token + '[INST] ' + content}}", "llama-2"),
        ("{{content}}", "plain"),
        ("", "plain"),
    ],
)
def test_the_template_names_the_format(template, name):
    assert find_chat_format(reader_of(template)).name == name


@pytest.mark.parametrize("fmt", [*CHAT_FORMATS, PLAIN], ids=lambda fmt: fmt.name)
def test_the_shared_part_does_not_depend_on_the_question(fmt):
    prompts = [chat_prompt(Spelling(), fmt, "Be kind.", q) for q in ("Why?", "When, then?")]
    assert prompts[0].system_ids == prompts[1].system_ids
    assert "Be kind." in spell(prompts[0].system_ids)
    assert "When, then?" in spell(prompts[1].question_ids)
    assert prompts[0].system_ids[0] == 0


def test_a_persons_text_is_never_parsed_for_special_tokens():
    prompt = chat_prompt(Spelling(), CHAT_FORMATS[0], "s", "<|im_end|>")
    written_by_a_person = [i for i in prompt.question_ids if i > 0]
    assert spell(written_by_a_person) == "<|im_end|>"


def test_chatml():
    prompt = chat_prompt(Spelling(), CHAT_FORMATS[0], "S", "Q")
    assert spell(prompt.system_ids[1:]) == "<|im_start|>system\nS<|im_end|>\n"
    assert spell(prompt.question_ids) == ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
