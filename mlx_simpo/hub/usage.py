"""How a pushed folder is loaded: the lines that its card shows.

Names that stand in code are the repository's and Hub ids, both of a plain alphabet, or quoted.
"""

import json
import shlex

from .folders import HF, MLX, PEFT, Folder, at, text_or_none
from .markdown import fenced

PLACEHOLDER = "path/to/base-model"  # where the base model has no name on the Hub


def usage(folder: Folder, repo: str, revision: str | None = None) -> str:
    """Markdown: commands and code that load ``repo`` (at ``revision``), as this kind needs them."""
    parts = {PEFT: peft_usage, HF: transformers_usage, MLX: mlx_model_usage}
    return parts.get(folder.kind, mlx_adapter_usage)(folder, repo, revision)


def mlx_adapter_usage(folder: Folder, repo: str, revision: str | None) -> str:
    """An adapter and its base model in mlx-lm, which takes adapters from local folders only."""
    name = repo.rpartition("/")[2]
    template = text_or_none(at(folder.settings, "data.chat_template")) or "auto"
    own_template = template not in ("auto", "none")
    command = []
    # mlx_lm.generate has no option for a revision, nor for another chat template.
    if folder.revision is None and not own_template:
        fetch = f"hf download {repo} --local-dir {name}"
        fetch += f" --revision {shlex.quote(revision)}" if revision else ""
        plain = " --ignore-chat-template" if template == "none" else ""
        run = f"mlx_lm.generate --model {base_name(folder)} --adapter-path {name}{plain}"
        command = [fenced("bash", f"{fetch}\n{run} --prompt {PROMPT_SHELL}")]
    lines = ["from huggingface_hub import snapshot_download", "from mlx_lm import generate, load"]
    lines = ["from pathlib import Path", "", *lines] if own_template else lines
    lines += [
        "",
        f"adapter = snapshot_download({arguments(repo, revision)})",
        f"model, tokenizer = load({base_arguments(folder)}, adapter_path=adapter)",
    ]
    if own_template:
        path = '(Path(adapter) / "chat_template.jinja")'
        lines += [f'tokenizer.chat_template = {path}.read_text(encoding="utf-8")']
    code = fenced("python", "\n".join([*lines, *mlx_generation(template)]))
    return "\n\n".join(["With mlx-lm:", *command, code])


def mlx_model_usage(folder: Folder, repo: str, revision: str | None) -> str:
    """A whole model in mlx-lm."""
    template = text_or_none(at(folder.settings, "data.chat_template")) or "auto"
    plain = " --ignore-chat-template" if template == "none" else ""
    run = f"mlx_lm.generate --model {repo}{plain} --prompt {PROMPT_SHELL}"
    command = [] if revision else [fenced("bash", run)]
    lines = [
        "from mlx_lm import generate, load",
        "",
        f"model, tokenizer = load({arguments(repo, revision)})",
        *mlx_generation(template),
    ]
    return "\n\n".join(["With mlx-lm:", *command, fenced("python", "\n".join(lines))])


def transformers_usage(folder: Folder, repo: str, revision: str | None) -> str:
    """A whole model in transformers; mlx-lm loads the same files."""
    template = text_or_none(at(folder.settings, "data.chat_template")) or "auto"
    lines = [
        f"from transformers import {auto_class(folder)}, AutoTokenizer",
        "",
        f"model = {auto_class(folder)}.from_pretrained({arguments(repo, revision)})",
        f"tokenizer = AutoTokenizer.from_pretrained({arguments(repo, revision)})",
        *torch_generation(template),
    ]
    with_transformers = f"With transformers:\n\n{fenced('python', chr(10).join(lines))}"
    return f"{with_transformers}\n\n{mlx_model_usage(folder, repo, revision)}"


def peft_usage(folder: Folder, repo: str, revision: str | None) -> str:
    """A PEFT adapter on its base model; the tokenizer is the adapter's own if it has one."""
    template = text_or_none(at(folder.settings, "data.chat_template")) or "auto"
    own = (folder.path / "tokenizer_config.json").is_file()
    base = base_arguments(folder)
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto_class(folder)}, AutoTokenizer",
        "",
        f"base = {auto_class(folder)}.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(base, {arguments(repo, revision)})",
        f"tokenizer = AutoTokenizer.from_pretrained({arguments(repo, revision) if own else base})",
        *torch_generation(template),
    ]
    return f"With PEFT and transformers:\n\n{fenced('python', chr(10).join(lines))}"


def auto_class(folder: Folder) -> str:
    """transformers' class for a model, or for the base of a PEFT adapter: models that see have
    their text part inside, where the class for text alone would not find it."""
    targets = folder.config.get("target_modules")
    inside = isinstance(targets, list) and any("language_model." in str(t) for t in targets)
    sees = inside or isinstance(folder.config.get("vision_config"), dict)
    return "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"


PROMPT = "How do I boil an egg?"
PROMPT_SHELL = shlex.quote(PROMPT)
_MESSAGES = f'messages = [{{"role": "user", "content": {json.dumps(PROMPT)}}}]'


def mlx_generation(template: str) -> list[str]:
    """Lines that answer a prompt with ``model`` and ``tokenizer`` of mlx-lm."""
    lines = [
        _MESSAGES,
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
    ]
    lines = lines if template != "none" else [f"prompt = {json.dumps(PROMPT)}"]
    return [*lines, "print(generate(model, tokenizer, prompt, max_tokens=200))"]


def torch_generation(template: str) -> list[str]:
    """The same with those of transformers."""
    lines = [
        _MESSAGES,
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
    ]
    plain = [f'inputs = tokenizer({json.dumps(PROMPT)}, return_tensors="pt")']
    return [
        *(plain if template == "none" else lines),
        "output = model.generate(**inputs, max_new_tokens=200)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
    ]


def base_name(folder: Folder) -> str:
    """The base model's Hub id, or a placeholder for a path."""
    public = folder.public(folder.base)
    return public.text if public and public.on_hub else PLACEHOLDER


def base_arguments(folder: Folder) -> str:
    """The base model and its revision as arguments in Python."""
    name = base_name(folder)
    return arguments(name, folder.revision if name != PLACEHOLDER else None)


def arguments(name: str, revision: str | None) -> str:
    """A Hub id and a revision as arguments in Python."""
    return json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")
