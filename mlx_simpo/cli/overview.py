"""The page that ``mlx-simpo`` alone and ``mlx-simpo help`` print."""

OVERVIEW = """\
mlx-simpo trains language models on preferences: SimPO with LoRA, on MLX.

1. Look at your pairs, one JSON object per line: prompt, chosen, rejected.
     mlx-simpo data inspect pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct
2. Train an adapter; every setting has a default.
     mlx-simpo train --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl \\
       --output runs/first --learning-rate 5e-5
3. Measure it on pairs that it has not seen.
     mlx-simpo evaluate --adapter runs/first --data test.jsonl
4. See what it says beside the base model.
     mlx-simpo generate --adapter runs/first --prompt "Why is the sky blue?"
5. Write the whole model, for transformers, llama.cpp, LM Studio and Ollama.
     mlx-simpo fuse runs/first-model --adapter runs/first

Settings: in a YAML file (train my.yaml), as lora.rank=8 or as --lora-rank 8.
The names of mlx_lm, TRL, axolotl, LLaMA-Factory and unsloth are understood.

  mlx-simpo config        print all settings, and where each comes from
  mlx-simpo help train    the options of a command, and the settings
More: convert, push, doctor, completion.
"""
