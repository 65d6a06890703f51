"""What the settings of other tools are called here, and which of them mean something else.

One table for mlx_lm.lora, mlx-lm-lora, TRL (its scripts and CPOConfig), axolotl, LLaMA-Factory,
unsloth and the authors' own code, which is in alignment-handbook's style. The command line takes
what means exactly the same (`alias_rules`); everything else gets the words that do, on one line.
"""

from shlex import quote
from typing import Any

from . import alias_rules as rules
from .alias_rules import Here, Others, omit, same
from .value_types import RawText, plain_value
from .yaml import dump_inline

_LOGGED = "every step is in metrics.jsonl in the output folder"
_DTYPE = "the model stays in the dtype it is stored in, or in dtype=bfloat16; LoRA is in float32"
_PUSH = "afterwards: mlx-simpo push OUTPUT OWNER/NAME"
_FUSE = "afterwards: mlx-simpo fuse OUT --adapter OUTPUT"
_ONE = "training runs in one process"
_CORES = "data is read and tokenized on all cores"
_BEST = "the best adapter is in the folder best"
_KERNELS = "attention and log-probabilities have kernels of their own"
_PACKING = "nothing is padded that matters: the responses to a prompt share it"
_REFERENCE = "SimPO has no reference model"
_EVALUATES = "it evaluates before and after training; train.eval_every=100 also during it"
_SAVES = "it saves every 10 minutes (train.save_every, train.save_minutes)"
_TEMPLATE = "the tokenizer's own template is used (data.chat_template)"
_SCORED = "prompts are never scored"

# (names of other tools, what they are here). Our own names are here too where other tools have
# values for them that we have not.
_TABLE = [
    # model
    (" ".join(rules.MODEL), same("model")),
    ("model_revision", same("revision")),
    ("torch_dtype dtype", same("dtype", none="auto", null="auto")),
    ("load_in_4bit load_in_8bit load_in_4bits load_in_6bits load_in_8bits", rules.quantized),
    ("load_in_mxfp4 quantization_bit bits", rules.quantized),
    # data
    ("data", rules.data),
    ("dataset dataset_name data_path train_file", same("data.train")),
    ("eval_dataset valid_file validation_file", same("data.valid")),
    ("dataset_mixer datasets", rules.mixture),
    ("dataset_train_split", same("data.train_split")),
    ("dataset_test_split", rules.test_split),
    ("dataset_config dataset_config_name", same("data.subset")),
    ("val_size val_set_size", rules.held_out),
    ("val_batches", rules.valid_batches),
    ("max_seq_length max_seq_len cutoff_len sequence_len", rules.length),
    ("max_completion_length max_target_length", rules.completion_length),
    ("template", omit(_TEMPLATE)),
    ("mask_prompt", omit(_SCORED, True)),
    ("train_on_inputs train_on_prompt", omit(_SCORED, False)),
    # objective
    ("pref_beta rl_beta simpo_beta", same("objective.beta")),
    ("gamma simpo_gamma", rules.gamma),
    ("cpo_alpha pref_ftx", rules.sft_weight),
    ("dpo_label_smoothing", same("objective.label_smoothing")),
    ("loss_type dpo_cpo_loss_type", rules.loss),
    ("pref_loss rl", rules.objective()),
    ("stage train_mode", rules.objective("dpo", "cpo")),
    ("ref_model reference_model_path precompute_ref_log_probs", omit(_REFERENCE)),
    ("disable_dropout", omit("the base model has no dropout", True)),
    # adapter
    ("lora_r r", same("lora.rank")),
    ("alpha", same("lora.lora_alpha")),
    ("use_dora peft_use_dora", same("lora.dora")),
    ("use_rslora peft_use_rslora", same("lora.rslora")),
    ("lora_layers", same("lora.num_layers")),
    ("lora_parameters", rules.lora_parameters),
    ("lora_target_modules lora_target lora_target_linear target_modules keys", rules.modules),
    ("fine_tune_type finetuning_type train_type", rules.method),
    ("use_peft", omit("LoRA is what is trained here", True)),
    ("adapter", rules.adapter),
    ("resume_adapter_file", rules.adapter_file),
    ("adapter_name_or_path lora_model_dir", same("lora.init_from")),
    ("bias", omit("biases are not trained", "none")),
    # steps and batches
    ("iters", rules.iterations),
    ("max_steps", rules.steps),
    ("num_train_epochs num_epochs", same("train.epochs")),
    ("per_device_train_batch_size micro_batch_size", same("train.batch_size")),
    ("per_device_eval_batch_size eval_batch_size", omit("evaluations use train.batch_size")),
    ("grad_accumulation_steps", same("train.gradient_accumulation_steps")),
    ("packing sample_packing pad_to_sequence_len group_by_length", omit(_PACKING, False)),
    # optimizer
    ("lr", same("train.learning_rate")),
    ("lr_scheduler_type lr_scheduler lr_schedule", rules.schedule),
    ("warmup_steps num_warmup_steps", rules.warmup),
    ("optim optimizer", omit("AdamW", "adamw", "adamw_torch", "adamw_torch_fused")),
    ("max_grad_norm", rules.clipping),
    # memory and speed
    (
        "grad_checkpoint use_gradient_checkpointing gradient_checkpointing",
        same("train.gradient_checkpointing", unsloth=True),
    ),
    (
        "gradient_checkpointing_kwargs use_reentrant",
        omit("train.gradient_checkpointing=true is all"),
    ),
    ("bf16 fp16 tf32 pure_bf16", omit(_DTYPE, False)),
    ("attn_implementation flash_attention flash_attn use_flash_attention_2", omit(_KERNELS)),
    ("use_liger_kernel liger_kernel xformers_attention sdp_attention", omit(_KERNELS)),
    ("deepspeed fsdp fsdp_config ddp_timeout num_processes local_rank", omit(_ONE)),
    ("dataset_num_proc preprocessing_num_workers dataloader_num_workers num_proc", omit(_CORES)),
    ("overwrite_cache dataset_prepared_path remove_unused_columns", omit(_CORES)),
    # what a run writes
    ("output_dir adapter_path", same("output", "the adapter is written there")),
    ("eval_steps steps_per_eval", rules.every("train.eval_every")),
    ("evals_per_epoch", rules.per_epoch("train.eval_every")),
    ("save_steps", rules.every("train.save_every")),
    ("saves_per_epoch", rules.per_epoch("train.save_every")),
    ("save_total_limit", same("train.keep_checkpoints")),
    ("early_stopping_patience", same("train.early_stopping.patience")),
    ("random_state random_seed", same("seed")),
    ("do_eval eval_strategy evaluation_strategy eval_on_start", omit(_EVALUATES)),
    ("save_strategy", omit(_SAVES)),
    ("load_best_model_at_end metric_for_best_model greater_is_better", omit(_BEST)),
    ("report_to", omit(_LOGGED, "none")),
    ("logging_steps steps_per_report logging_first_step log_level plot_loss", omit(_LOGGED)),
    ("logging_dir run_name wandb wandb_project project_name", omit(_LOGGED)),
    ("overwrite_output_dir", omit("remove the old folder, or name a new one with output=…")),
    ("resume_from_checkpoint", omit("a run goes on with mlx-simpo train --resume RUN")),
    ("push_to_hub push_model", omit(_PUSH, False)),
    ("hub_model_id hub_path hub_strategy hub_private_repo", omit(_PUSH)),
    ("hub_token", omit("log in with `hf auth login` or set HF_TOKEN")),
    ("fuse save_model save_method save_gguf save_path", omit(_FUSE)),
    ("train do_train", rules.train),
    ("test test_batches", omit("afterwards: mlx-simpo evaluate --adapter OUTPUT --data TEST")),
    ("clear_cache_threshold", omit("the cache is bounded as it is")),
]
ALIASES = {name: rule for names, rule in _TABLE for name in names.split()}


def plain_name(text: str) -> str:
    """Return the last part of a setting's name in this table's spelling: --Lora-R → lora_r."""
    return text.lstrip("-").replace("-", "_").rpartition(".")[2].lower()


def meaning(name: str, value: Any, others: Others) -> Here | None:
    """Return what a setting of another tool is here; None if no tool has it.

    A number that is text of a command line stays as it was typed.
    """
    rule = ALIASES.get(plain_name(name))
    if rule is None:
        return None
    plain = plain_value(value)
    here = rule(plain, others)
    if isinstance(value, RawText) and isinstance(plain, int | float) and type(plain) is not bool:
        typed = {n: str(value) if v == plain else v for n, v in here.settings.items()}
        return here._replace(settings=typed)
    return here


def as_words(here: Here) -> str:
    """Return what to type instead, as the words of a command line, and why."""
    words = (quote(f"{name}={as_text(value)}") for name, value in here.settings.items())
    return _with_note(f"write {' '.join(words)}" if here.settings else "leave it out", here.note)


def as_yaml(here: Here) -> str:
    """Return what to write instead in a YAML file, and why."""
    sections: dict[str, list[str]] = {}
    for name, value in here.settings.items():
        section, _, leaf = name.rpartition(".")
        sections.setdefault(section, []).append(f"{leaf}: {dump_inline(value)}")
    texts = [
        f"{f'under {section}: ' if section else ''}write {', '.join(items)}"
        for section, items in sections.items()
    ]
    return _with_note("; ".join(texts) or "leave it out", here.note)


def as_text(value: Any) -> str:
    """Return a value as the command line has it."""
    return value if isinstance(value, str) else dump_inline(value)


def _with_note(text: str, note: str) -> str:
    return f"{text}; {note}" if note else text
