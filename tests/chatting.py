"""A small tokenizer and a chat template in harmony's manner, to lie beside the checkpoints of tests."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONTROLS = ["<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>", "<|endoftext|>"]
# As gpt-oss's own: marks no spans, and leaves out what was thought before the last turn.
TEMPLATE = """
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{%- if message.thinking and loop.last -%}
<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>
{%- endif -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}{{ "<|return|>" if loop.last else "<|end|>" }}
{%- elif message.role in ("user", "system") -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- else -%}
{{- raise_exception("no role " ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
"""


def write_tokenizer(directory: Path) -> Tokenizer:
    """tokenizer.json, of bytes and control tokens, and chat_template.jinja."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROLS)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer


def chat(*said: str, thinking: str = "") -> dict:
    """User and assistant in turn."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    if thinking:
        for message in messages[1::2]:
            message["thinking"] = thinking
    return {"messages": messages}


def write_chats(file: Path, chats: list[dict]) -> Path:
    file.write_text("".join(f"{json.dumps(one)}\n" for one in chats))
    return file
