"""Chat templates that behave as those of well-known models do, with a tokenizer for all of them."""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from helpers.tiny import _TEXT
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"


class Template(NamedTuple):
    """A template's name, the special tokens of its models, and whether these think.

    bos, eos: None if its models have none, or add none. special: the other tokens that are never
    split.
    """

    name: str
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    thinks: bool = False

    @property
    def text(self) -> str:
        return (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


CHATML = ("<|im_start|>",)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]", "<sop>")
R1_NAMES = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin")
R1_NAMES += ("outputs▁end", "output▁begin", "output▁end")
R1 = ("<｜User｜>", "<｜Assistant｜>", *(f"<｜tool▁{name}｜>" for name in R1_NAMES))
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
INST = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
TEMPLATES = {
    template.name: template
    for template in (
        Template("qwen3", "<|im_end|>", None, CHATML, True),
        Template("qwen3_5", "<|im_end|>", None, CHATML, True),
        Template("smollm3", "<|im_end|>", None, CHATML, True),
        Template(
            "deepseek_r1",
            "<｜end▁of▁sentence｜>",
            "<｜begin▁of▁sentence｜>",
            R1,
            True,
        ),
        Template("glm4", "<|endoftext|>", None, ROLES),
        Template("glm4_5", "<|endoftext|>", None, ROLES, True),
        Template("gpt_oss", "<|return|>", None, HARMONY),
        Template(
            "llama3",
            "<|eot_id|>",
            "<|begin_of_text|>",
            ("<|start_header_id|>", "<|end_header_id|>"),
        ),
        Template("gemma2", "<end_of_turn>", "<bos>", ("<start_of_turn>",)),
        Template("gemma3", "<end_of_turn>", "<bos>", ("<start_of_turn>",)),
        Template("mistral", "</s>", "<s>", INST),
        Template("phi4", "<|im_end|>", None, ("<|im_start|>", "<|im_sep|>")),
    )
}


@cache
def template_tokenizer(name: str, wrapped: bool = True) -> Any:
    """A byte-level BPE tokenizer with a template and its special tokens.

    wrapped: in mlx-lm's wrapper, which passes enable_thinking by itself; else transformers' own.
    """
    template = TEMPLATES[name]
    own = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(template),
        bos_token=template.bos,
        eos_token=template.eos,
        chat_template=template.text,
    )
    return TokenizerWrapper(own) if wrapped else own


@cache
def shipped_tokenizer(name: str) -> Any:
    """The same for a template that mlx-lm ships as Python code."""
    module = import_module(f"mlx_lm.chat_templates.{name}")
    template = TEMPLATES["deepseek_r1"]
    own = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(template), bos_token=template.bos, eos_token=template.eos
    )
    return TokenizerWrapper(own, chat_template=module.apply_chat_template)


def _bpe(template: Template) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # As Qwen's and Llama's: line breaks with the white space before them are pieces of their own.
    split = pre_tokenizers.Split(
        pattern=Regex(r"\s*[\r\n]+|\s+(?!\S)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"),
        behavior="isolated",
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_TEXT, "\n\n" * 9], trainer)
    special = [template.eos, *([template.bos] if template.bos else []), *template.special]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if template.thinks:
        # Tokens of their own that are not special: transformers shows them in texts.
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer
