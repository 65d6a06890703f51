"""TRL 1.16.0 CPOTrainer with loss_type "simpo" and cpo_alpha 0, on torch's CPU back end in float32.

On the timed path, all TRL's own: the trainer's data collator, CPOTrainer.training_step (forward of
the chosen and rejected rows together, logits of every position, its loss, the metrics it logs at
every step, backward) and the AdamW that the trainer creates. LoRA by PEFT, attention by torch's
scaled_dot_product_attention. Not timed: the data loader, callbacks, the schedule, clipping.

No stand-ins; the trainer's constructor is given one short text pair, because it insists on a
dataset to tokenize itself. TRL pads to the longest sequence of the batch, so `pad_to` is unused.

Runs in a process of its own, without OpenBLAS in LD_PRELOAD: that would take the place of the MKL
inside torch and make it about ten times slower.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
REQUIRES = ("trl==1.16.0",)
Pair = dict[str, Any]


def prepare(spec: dict[str, Any]) -> Callable[[list[Pair]], dict[str, Any]]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    if "openblas" in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("LD_PRELOAD has OpenBLAS, which replaces torch's own, faster BLAS")
    torch.set_num_threads(2)
    arguments = CPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="simpo",
        beta=spec["beta"],
        simpo_gamma=spec["beta"] * spec["gamma_beta_ratio"],  # absolute here, not a ratio
        cpo_alpha=0.0,
        learning_rate=spec["learning_rate"],
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        gradient_accumulation_steps=1,
        gradient_checkpointing=spec["checkpoint"],
        seed=spec["seed"],
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if tokenizer.pad_token is None:  # its collator refuses to pad, which a user would fix like this
        tokenizer.pad_token = tokenizer.eos_token
    trainer = CPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        # "all-linear" does not include the output layer.
        peft_config=LoraConfig(
            r=spec["rank"],
            lora_alpha=spec["rank"] * spec["scale"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    model = trainer.model
    # Trainer.train() would do these two.
    trainer.current_gradient_accumulation_steps = 1
    if spec["checkpoint"]:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    optimizer = trainer.create_optimizer()

    def row(pair: Pair) -> dict[str, list[int]]:
        features = {}
        for name in ("chosen", "rejected"):
            ids = pair[name]
            features[f"{name}_input_ids"] = ids
            features[f"{name}_attention_mask"] = [1] * len(ids)
            features[f"{name}_labels"] = [-100] * pair["start"] + ids[pair["start"] :]
        return features

    def step(batch: list[Pair]) -> dict[str, Any]:
        inputs = trainer.data_collator([row(pair) for pair in batch])
        loss = trainer.training_step(model, inputs)
        optimizer.step()
        optimizer.zero_grad()
        width = max(inputs[f"{name}_input_ids"].shape[1] for name in ("chosen", "rejected"))
        positions = 2 * len(batch) * width
        return {"loss": loss.item(), "positions": positions, "logit_rows": positions}

    return step
