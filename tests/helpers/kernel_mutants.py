"""Wrong versions of response_logps.metal, and how the executor must report each."""

LOOP = "start < size;\n       start += int(position.count) * READS) {\n    float"

# What is changed in the kernel, and which kinds of problem the executor must report for it; none
# where only the numbers show it. (Some of those that are reported give the right numbers.)
MUTANTS: dict[str, tuple[str, str, set[str]]] = {
    "no barrier": (
        "  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n",
        "",
        {"race", "uninitialised-read"},
    ),
    "barrier for other memory": ("mem_flags::mem_threadgroup", "mem_flags::mem_device", {"race"}),
    "tail not guarded": (
        "start + i < size ? logit(float(raw_logits[start + i]), scale, softcap) : -INFINITY",
        "logit(float(raw_logits[start + i]), scale, softcap)",
        {"out-of-bounds"},
    ),
    "gradient beyond the row": (
        "v < start + READS && v < size",
        "v < start + READS",
        {"out-of-bounds", "race"},
    ),
    "tail not read": (LOOP, LOOP.replace("start < size", "start + READS <= size"), set()),
    "absent simdgroups read": (
        "position.lane < position.simdgroups",
        "true",
        {"uninitialised-read"},
    ),
    "only one simdgroup": (
        "position.lane < position.simdgroups",
        "position.lane < 1",
        set(),
    ),
    "barrier that some threads skip": (
        "  if (position.lane == 0) {\n",
        "  if (position.lane != 0) return own; {\n",
        {"divergent-barrier"},
    ),
    "row not written": (
        "    return;\n  }\n\n  MaxAndSum total",
        "    return;\n  }\n  if (target == 0) return;\n  MaxAndSum total",
        {"unwritten-output"},
    ),
    "ignored row not written": ("      *logp = 0.0f;\n", "", {"unwritten-output"}),
    "next token's logit": ("raw_logits[target]", "raw_logits[target + 1]", set()),
}
