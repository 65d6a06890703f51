"""Command lines as users of other tools type them: each works, or gets lines that, pasted, work.

The words are those of the other tool after the name of its program, with our command before them.
"""

import re
import shlex
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.commands import command

from mlx_simpo import SimPOConfig, load_config
from mlx_simpo.cli import train


class Typed(NamedTuple):
    """A command line, how many lines it is answered with, and the settings that it ends in."""

    words: str
    lines: int
    settings: dict[str, Any]


M = "--model m --data pairs.jsonl"
TYPED = {
    # mlx_lm.lora
    "mlx_lm: the first example of its documentation": Typed(
        "train --model m --train --data FOLDER --iters 600",
        0,
        {"model": "m", "data.folder": "FOLDER", "train.steps": 600, "data.train": None},
    ),
    "mlx_lm: most of its options": Typed(
        "train --model m --train --data pairs.jsonl --fine-tune-type lora --num-layers 8 "
        "--batch-size 2 --learning-rate 1e-5 --steps-per-eval 200 --save-every 100 "
        "--adapter-path adapters --grad-checkpoint --seed 7 --mask-prompt --optimizer adamw",
        0,
        {
            "data.train": "pairs.jsonl",
            "lora.num_layers": 8,
            "train.batch_size": 2,
            "train.learning_rate": 1e-5,
            "train.eval_every": 200,
            "train.save_every": 100,
            "output": "adapters",
            "train.gradient_checkpointing": True,
            "seed": 7,
        },
    ),
    "mlx_lm: a configuration file": Typed(
        "train -c CONFIG --iters 10", 0, {"model": "from-file", "train.steps": 10, "lora.rank": 4}
    ),
    "mlx_lm: DoRA on all layers": Typed(
        f"train {M} --fine-tune-type dora --num-layers -1",
        0,
        {"lora.dora": True, "lora.num_layers": -1},
    ),
    "mlx_lm: iterations that are micro-batches": Typed(
        f"train {M} --iters 400 --grad-accumulation-steps 8",
        1,
        {"train.steps": 50, "train.gradient_accumulation_steps": 8},
    ),
    "mlx_lm: the length of a sequence": Typed(
        f"train {M} --max-seq-length 512",
        1,
        {"data.max_length": 512, "data.max_prompt_length": 256},
    ),
    "mlx_lm: weights to start from": Typed(
        f"train {M} --resume-adapter-file old/adapters.safetensors", 1, {"lora.init_from": "old"}
    ),
    "mlx_lm: all validation batches": Typed(
        f"train {M} --val-batches -1", 1, {"data.valid_max": None}
    ),
    "mlx_lm: reports": Typed(
        f"train {M} --steps-per-report 10 --report-to wandb --project-name p", 3, {"model": "m"}
    ),
    "mlx_lm: the program has no commands": Typed(
        f"{M} --train --iters 5", 1, {"model": "m", "train.steps": 5}
    ),
    # TRL
    "TRL: the example at the top of its cpo.py": Typed(
        "train --model_name_or_path=gpt2 --dataset pairs.jsonl --per_device_train_batch_size 4 "
        "--max_steps 1000 --learning_rate 8e-5 --gradient_accumulation_steps 1 --logging_steps 10 "
        '--eval_steps 500 --output_dir="gpt2-lora-aligned-cpo" --optim rmsprop --warmup_steps 150 '
        "--report_to wandb --bf16 --logging_first_step --no_remove_unused_columns --use_peft "
        "--lora_r=16 --lora_alpha=16",
        7,
        {
            "model": "gpt2",
            "data.train": "pairs.jsonl",
            "train.batch_size": 4,
            "train.steps": 1000,
            "train.learning_rate": 8e-5,
            "train.gradient_accumulation_steps": 1,
            "train.eval_every": 500,
            "output": "gpt2-lora-aligned-cpo",
            "train.warmup_ratio": 0.15,
            "lora.rank": 16,
            "lora.lora_alpha": 16.0,
        },
    ),
    "TRL: SimPO in its CPO trainer": Typed(
        f"train {M} --loss_type simpo --cpo_alpha 0 --simpo_gamma 1.375 --beta 2.5",
        1,
        {"objective.beta": 2.5, "objective.gamma_beta_ratio": 0.55, "objective.sft_weight": 0.0},
    ),
    "TRL: SimPO with an SFT term": Typed(
        f"train {M} --cpo_alpha 0.2", 1, {"objective.sft_weight": 0.2}
    ),
    "TRL: its LoRA options": Typed(
        f"train {M} --use_peft --lora_target_modules q_proj v_proj --lora_dropout 0.05 "
        "--use_rslora --use_dora true",
        0,
        {
            "lora.target_modules": ("q_proj", "v_proj"),
            "lora.dropout": 0.05,
            "lora.rslora": True,
            "lora.dora": True,
        },
    ),
    "TRL: Python's words for values": Typed(
        f"train {M} --gradient_checkpointing True --lr_scheduler_type cosine --num_train_epochs 1 "
        "--torch_dtype bfloat16 --load_in_8bit False --report_to none --push_to_hub False",
        0,
        {
            "train.gradient_checkpointing": True,
            "train.schedule": "cosine",
            "train.epochs": 1.0,
            "dtype": "bfloat16",
        },
    ),
    "TRL: the test split of a dataset": Typed(
        "train --model_name_or_path m --dataset_name a/b --dataset_test_split test_prefs",
        1,
        {"data.train": "a/b", "data.valid": "a/b", "data.valid_split": "test_prefs"},
    ),
    "TRL: lengths": Typed(
        f"train {M} --max_prompt_length 256 --max_completion_length 512",
        1,
        {"data.max_length": 768, "data.max_prompt_length": 256},
    ),
    "TRL: quantization": Typed(f"train {M} --load_in_4bit", 1, {"model": "m"}),
    "TRL: another schedule": Typed(
        f"train {M} --lr_scheduler_type polynomial", 1, {"train.schedule": "cosine"}
    ),
    "TRL: evaluations as a fraction": Typed(
        f"train {M} --max_steps 200 --eval_strategy steps --eval_steps 0.1",
        2,
        {"train.steps": 200, "train.eval_every": 20},
    ),
    # axolotl
    "axolotl: a file and options": Typed(
        "train CONFIG --learning-rate 1e-5 --micro-batch-size 2 --num-epochs 3 --val-set-size 0.1",
        0,
        {
            "model": "from-file",
            "train.learning_rate": 1e-5,
            "train.batch_size": 2,
            "train.epochs": 3.0,
            "data.valid_fraction": 0.1,
        },
    ),
    "axolotl: SimPO": Typed(
        f"train {M} --rl simpo --rl-beta 2 --simpo-gamma 1 --sequence-len 2048",
        2,
        {
            "objective.beta": 2.0,
            "objective.gamma_beta_ratio": 0.5,
            "data.max_length": 2048,
        },
    ),
    "axolotl: its LoRA": Typed(
        "train --base-model m --data pairs.jsonl --adapter lora --lora-r 32 --lora-alpha 16 "
        "--lora-target-linear --no-sample-packing",
        0,
        {"lora.rank": 32, "lora.lora_alpha": 16.0, "lora.target_modules": "all-linear"},
    ),
    # LLaMA-Factory
    "LLaMA-Factory: options": Typed(
        "train --stage dpo --do_train --finetuning_type lora --pref_loss simpo --pref_beta 2.5 "
        "--model_name_or_path m --dataset pairs.jsonl --lora_target q_proj,v_proj --val_size 0.1",
        0,
        {"objective.beta": 2.5, "lora.target_modules": ("q_proj", "v_proj")},
    ),
    "LLaMA-Factory: values after the file": Typed(
        "train CONFIG learning_rate=1e-5 num_train_epochs=2.0 lora_target=all",
        3,
        {"train.learning_rate": 1e-5, "train.epochs": 2.0, "lora.target_modules": "all-linear"},
    ),
    # unsloth
    "unsloth: the example of its command line": Typed(
        'train --model_name "m" --dataset pairs.jsonl --max_seq_length 8192 --dtype None --r 64 '
        '--lora_alpha 32 --lora_dropout 0.1 --bias "none" --use_gradient_checkpointing "unsloth" '
        '--random_state 3407 --use_rslora --max_steps 400 --learning_rate 2e-6 --optim "adamw_8bit"'
        ' --weight_decay 0.005 --lr_scheduler_type "linear" --output_dir "outputs" --save_model',
        3,
        {
            "model": "m",
            "data.max_length": 8192,
            "dtype": "auto",
            "lora.rank": 64,
            "train.gradient_checkpointing": True,
            "seed": 3407,
            "lora.rslora": True,
            "train.steps": 400,
            "train.weight_decay": 0.005,
            "train.schedule": "linear",
        },
    ),
    # princeton-nlp/SimPO and alignment-handbook
    "SimPO: a recipe and changes": Typed(
        "train CONFIG --gamma_beta_ratio=0.55 --beta=2.5 --learning_rate=1e-6 --max_length=2048 "
        "--max_prompt_length=1800 --per_device_train_batch_size=2 --warmup_ratio=0.1",
        0,
        {
            "objective.gamma_beta_ratio": 0.55,
            "objective.beta": 2.5,
            "train.learning_rate": 1e-6,
            "data.max_prompt_length": 1800,
        },
    ),
    # mlx-lm-lora
    "mlx-lm-lora: its modes": Typed(
        f"train {M} --train-mode cpo --train-type lora --epochs 1 --beta 0.1 --load-in-4bits",
        1,
        {"train.epochs": 1.0, "objective.beta": 0.1},
    ),
    # slips
    "three words": Typed("train model = m data.train=pairs.jsonl", 1, {"model": "m"}),
    "a space after =": Typed("train model= m data.train=pairs.jsonl", 1, {"model": "m"}),
    "no =": Typed(f"train {M} lora.rank 4", 1, {"lora.rank": 4}),
    "a colon": Typed(f"train {M} lora.rank:4", 1, {"lora.rank": 4}),
    "a section": Typed("train model=m data=pairs.jsonl", 1, {"data.train": "pairs.jsonl"}),
    "short names": Typed(
        "train model=m data.train=pairs.jsonl lr=1e-5 beta=2.5 batch_size=8",
        3,
        {"train.learning_rate": 1e-5, "objective.beta": 2.5, "train.batch_size": 8},
    ),
    "an unset variable": Typed("train model=m data.train=pairs.jsonl output=", 1, {}),
    "a name with a space": Typed(
        "train model=m data.train=my pairs.jsonl", 1, {"data.train": "my pairs.jsonl"}
    ),
    "a file of pairs alone": Typed("train model=m pairs.jsonl", 1, {"data.train": "pairs.jsonl"}),
    "a model alone": Typed("train Qwen/Qwen3-0.6B data.train=pairs.jsonl", 1, {}),
    "a shell's pattern": Typed(
        "train --model m --data pairs.jsonl more.jsonl",
        0,
        {"data.train": ("pairs.jsonl", "more.jsonl")},
    ),
    "standard input": Typed("train --model m --data -", 0, {"data.train": "-"}),
    "another tool's command": Typed(f"simpo {M}", 1, {"model": "m"}),
    "a misspelt command": Typed(f"trian {M}", 1, {"model": "m"}),
    "the file alone": Typed("CONFIG lora.rank=8", 1, {"lora.rank": 8}),
}


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[SimPOConfig]:
    """The configurations that ``train`` is run with, which trains nothing; in a folder of files."""
    configs: list[SimPOConfig] = []

    def run(options: Any) -> None:
        configs.append(load_config(options.config, options.settings))

    monkeypatch.setattr(train, "run", run)
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "more.jsonl", "my pairs.jsonl"):
        Path(name).touch()
    Path("folder").mkdir()
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        (Path("folder") / name).touch()
    Path("my.yaml").write_text("model: from-file\ndata: {train: d}\nlora: {rank: 4}\n")
    return configs


def pasted(words: list[str], message: str) -> list[str]:
    """The words with what a message says to write in the place of those that it is about."""
    about, _, rest = re.split(r"(: |; )(?=write |leave it out)", message, maxsplit=1)
    new = re.split(r"; |, (?:without|quoted|or )", rest)[0].removeprefix("write ")
    new_words = [] if new == "leave it out" else shlex.split(new)
    if new_words[:1] == ["mlx-simpo"]:  # the command
        return new_words[1:] + ([] if "comes first" in about else words[1:])
    quoted = re.search(r"'(.*?)'", about)
    old = shlex.split(about.removesuffix(" has no value"))
    if quoted and quoted[1] in words:
        old = [quoted[1]]
    elif about.endswith("is a section of settings") or about.startswith("unknown setting"):
        name = quoted[1] if quoted else about.split()[0]
        old = [next(word for word in words if word.startswith(f"{name}="))]
    if "part of the name" in about:
        old = [words[words.index(old[0]) - 1], old[0]]
    for start in range(len(words)):
        if words[start : start + len(old)] == old:
            return words[:start] + new_words + words[start + len(old) :]
    raise AssertionError(f"{message!r} does not name words of {words}")


@pytest.mark.parametrize("name", TYPED)
def test_a_command_line_works_or_gets_lines_that_work(
    name: str, configs: list[SimPOConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = TYPED[name]
    words = shlex.split(typed.words.replace("CONFIG", "my.yaml").replace("FOLDER", "folder"))
    ran = command(capsys, *words)
    messages = [line for line in ran.err.splitlines() if line.startswith("mlx-simpo: error: ")]
    assert len(messages) == typed.lines, ran.err
    assert len(configs) == (0 if messages else 1)
    for message in messages:
        words = pasted(words, message.removeprefix("mlx-simpo: error: "))
    if messages:
        ran = command(capsys, *words)
        assert (ran.status, "error" in ran.err) == (0, False), (words, ran.err)
    (config,) = configs
    for setting, value in typed.settings.items():
        value = "folder" if value == "FOLDER" else value
        actual = attrgetter(setting)(config)
        if isinstance(actual, tuple) and setting == "data.train":
            actual = tuple(source.path for source in actual)
        assert actual == value, setting


def test_most_of_these_lines_are_those_of_other_tools() -> None:
    assert sum(": " in name for name in TYPED) >= 20
    assert {name.partition(":")[0] for name in TYPED} >= {
        *("mlx_lm", "TRL", "axolotl", "LLaMA-Factory", "unsloth", "SimPO", "mlx-lm-lora")
    }


def test_what_is_taken_from_other_tools_is_told(
    configs: list[SimPOConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    words = "train --model m --train --data folder --iters 9 --lora-r 4 --lora-alpha 8"
    ran = command(capsys, *words.split())
    assert ran.err.splitlines() == [
        "mlx-simpo: --train: it is what the command does",
        "mlx-simpo: --data folder: data.folder=folder",
        "mlx-simpo: --iters 9: train.steps=9 (steps of train.batch_size × "
        "train.gradient_accumulation_steps pairs)",
        "mlx-simpo: --lora-r 4: lora.rank=4",
    ]
    assert len(configs) == 1
