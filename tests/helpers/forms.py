"""The same pairs in every form of record, and the same records in every format of file.

What writes the files is what people write them with: csv, pandas, pyarrow and datasets.
"""

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
from helpers.tiny import assistant, some_pairs, system, tiny_tokenizer, user, write_jsonl

from mlx_simpo import DataConfig
from mlx_simpo.data.encode import Encoder, encode_pairs
from mlx_simpo.data.export import json_line
from mlx_simpo.data.records import parse_pair
from mlx_simpo.data.rows import Source
from mlx_simpo.data.tokens import content_sha256

Record = dict[str, Any]
# {{name, arguments}} is written so that a call's arguments change the tokens.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}<|im_end|>\n{% endfor %}{{ tools or '' }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"name": "look", "arguments": {"at": "the sky"}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
STRINGS = some_pairs(6)


# --- tokens ----------------------------------------------------------------------------------


def tokens(source: Source, encoder: Encoder | None = None) -> str:
    """The hash of the tokens of all pairs of a source, none of which may be quarantined."""
    pairs = [parse_pair(row) for row in source.rows()]
    encoder = encoder or Encoder(tiny_tokenizer(TEMPLATE), DataConfig())
    encoded, quarantined = encode_pairs(encoder, pairs)
    assert quarantined == []
    assert len(encoded) == source.count() > 0
    return content_sha256(encoded)


# --- forms -----------------------------------------------------------------------------------


def as_chat(pair: Record, *before: Record, **more: Any) -> Record:
    """A pair of strings as TRL's explicit messages, with turns before the question."""
    return {
        "prompt": [*before, user(pair["prompt"])],
        "chosen": [assistant(pair["chosen"])],
        "rejected": [assistant(pair["rejected"])],
        **more,
    }


def human(text: str) -> Record:
    return {"from": "human", "value": text}


def gpt(text: str) -> Record:
    return {"from": "gpt", "value": text}


def _responses(pair: Record, chosen: str = "chosen", rejected: str = "rejected") -> Record:
    return {chosen: pair["chosen"], rejected: pair["rejected"]}


def _alpaca(pair: Record) -> tuple[Record, Record]:
    first, _, rest = pair["prompt"].partition(" ")
    record = {"instruction": first, "input": rest, **_responses(pair)}
    return record, {**pair, "prompt": f"{first}\n{rest}"}


def _alpaca_history(pair: Record) -> tuple[Record, Record]:
    record = {"instruction": pair["prompt"], "input": "", "history": [["Hi", "Hello"]]}
    record |= {"system": "Be brief", **_responses(pair)}
    return record, as_chat(pair, system("Be brief"), user("Hi"), assistant("Hello"))


def _older_alpaca(pair: Record) -> tuple[Record, Record]:
    both = [pair["chosen"], pair["rejected"]]
    return {"instruction": pair["prompt"], "input": "", "output": both}, pair


def _argilla(pair: Record) -> tuple[Record, Record]:
    record = {"instruction": pair["prompt"], "source": "x", "chosen_avg_rating": 4.5}
    return record | _responses(pair, "chosen_response", "rejected_response"), pair


def _argilla_prompt(pair: Record) -> tuple[Record, Record]:
    record = {"prompt": pair["prompt"], "chosen-rating": 5}
    return record | _responses(pair, "chosen_response", "rejected_response"), pair


def _distilabel(pair: Record) -> tuple[Record, Record]:
    record = {"system": "Be kind", "input": pair["prompt"], **_responses(pair)}
    record |= {"generations": [pair["chosen"], pair["rejected"]], "order": ["chosen", "rejected"]}
    record |= {"rating": [9.0, 1.0], "status": "unchanged", "chosen_score": 9.0}
    return record, as_chat(pair, system("Be kind"))


def _orca(pair: Record) -> tuple[Record, Record]:
    record = {"system": "Think", "question": pair["prompt"], **_responses(pair)}
    return record, as_chat(pair, system("Think"))


def _sharegpt(pair: Record) -> tuple[Record, Record]:
    record = {
        "conversations": [human("Hi"), gpt("Hello"), human(pair["prompt"])],
        "chosen": gpt(pair["chosen"]),
        "rejected": gpt(pair["rejected"]),
        "system": "Be brief",
    }
    return record, as_chat(pair, system("Be brief"), user("Hi"), assistant("Hello"))


def _sharegpt_tools(pair: Record) -> tuple[Record, Record]:
    call = {"from": "function_call", "value": json.dumps(CALL)}
    record = {
        "conversations": [
            {"from": "system", "value": "Be brief"},
            human(pair["prompt"]),
            call,
            {"from": "observation", "value": "blue"},
        ],
        "chosen": gpt(pair["chosen"]),
        "rejected": gpt(pair["rejected"]),
        "tools": json.dumps(TOOLS),
    }
    calling = assistant("", tool_calls=[{"type": "function", "function": CALL}])
    expected = as_chat(pair, system("Be brief"), tools=TOOLS)
    expected["prompt"] += [calling, {"role": "tool", "content": "blue"}]
    return record, expected


def _axolotl(pair: Record) -> tuple[Record, Record]:
    record = {
        "messages": [system("Be kind"), user(pair["prompt"])],
        "chosen": assistant(pair["chosen"]),
        "rejected": assistant(pair["rejected"]),
    }
    return record, as_chat(pair, system("Be kind"))


def _openai(pair: Record) -> tuple[Record, Record]:
    # The API has the arguments as text, and the tools beside the messages.
    function = {"name": "look", "arguments": json.dumps(CALL["arguments"])}
    calls = [{"id": "1", "type": "function", "function": function}]
    record = {
        "input": {
            "messages": [user(pair["prompt"]), assistant("", tool_calls=calls)],
            "tools": TOOLS,
            "parallel_tool_calls": True,
        },
        "preferred_output": [assistant(pair["chosen"])],
        "non_preferred_output": [assistant(pair["rejected"])],
    }
    record["input"]["messages"].append({"role": "tool", "content": "blue"})
    expected = as_chat(pair, tools=TOOLS)
    calling = assistant("", tool_calls=[{"id": "1", "type": "function", "function": CALL}])
    expected["prompt"] += [calling, {"role": "tool", "content": "blue"}]
    return record, expected


def _transcript(pair: Record) -> tuple[Record, Record]:
    start = f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {pair['prompt']}\n\nAssistant: "
    record = {name: start + pair[name] for name in ("chosen", "rejected")}
    return record, as_chat(pair, user("Hi"), assistant("Hello"))


def _same(pair: Record) -> tuple[Record, Record]:
    return pair, pair


def _system_column(pair: Record) -> tuple[Record, Record]:
    return {**pair, "system": "Be kind"}, as_chat(pair, system("Be kind"))


def _whole_with_system_column(pair: Record) -> tuple[Record, Record]:
    chat = as_chat(pair)
    whole = {name: chat["prompt"] + chat[name] for name in ("chosen", "rejected")}
    return {**whole, "prompt": pair["prompt"], "system": "Be kind"}, as_chat(
        pair, system("Be kind")
    )


# Each form's record of a pair, and the plain record that means the same.
FORMS: dict[str, Callable[[Record], tuple[Record, Record]]] = {
    "strings": _same,
    "system column": _system_column,
    "ultrafeedback with a system column": _whole_with_system_column,
    "Alpaca's form": _alpaca,
    "Alpaca's form with history": _alpaca_history,
    "LLaMA-Factory's older Alpaca form": _older_alpaca,
    "argilla's form": _argilla,
    "argilla's form with prompt": _argilla_prompt,
    "Alpaca's form with input alone": _distilabel,
    "Intel Orca's form": _orca,
    "ShareGPT's form": _sharegpt,
    "ShareGPT's form with tools": _sharegpt_tools,
    "axolotl's form": _axolotl,
    "OpenAI's form": _openai,
    "transcripts of Human and Assistant (hh-rlhf)": _transcript,
}


def in_form(form: str, pairs: Sequence[Record] = STRINGS) -> tuple[list[Record], list[Record]]:
    """(records in a form, plain records that mean the same) of some pairs of strings."""
    records, expected = zip(*map(FORMS[form], pairs), strict=True)
    return list(records), list(expected)


# --- formats ---------------------------------------------------------------------------------

Write = Callable[[Path, list[Record]], Any]


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _in_cells(records: list[Record]) -> list[Record]:
    """Records as a table of text has them: messages as JSON."""
    return [{name: _cell(value) for name, value in record.items()} for record in records]


def write_json(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps(records, indent=2))


def write_csv(path: Path, records: list[Record], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(_in_cells(records))


def _compressed(suffix: str, write: Write) -> Write:
    def write_compressed(path: Path, records: list[Record]) -> None:
        plain = path.with_name("plain")
        write(plain, records)
        content = plain.read_bytes()
        plain.unlink()
        if suffix == ".gz":
            path.write_bytes(gzip.compress(content))
        else:
            with pa.CompressedOutputStream(str(path), "zstd") as file:
                file.write(content)

    return write_compressed


def _table(records: list[Record]) -> pa.Table:
    return pa.Table.from_pylist(records)


def _write_ipc(create: Any) -> Write:
    def write(path: Path, records: list[Record]) -> None:
        table = _table(records)
        with pa.OSFile(str(path), "wb") as file, create(file, table.schema) as writer:
            writer.write_table(table)

    return write


_TEXT: dict[str, Write] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".tsv": lambda path, records: write_csv(path, records, "\t"),
}
# How a file is written, by what its name ends in; what comes before "~" is just a name.
FORMATS: dict[str, Write] = {
    **_TEXT,
    **{f"{end}.gz": _compressed(".gz", write) for end, write in _TEXT.items()},
    **{f"{end}.zst": _compressed(".zst", write) for end, write in _TEXT.items()},
    "wrapped~.json": lambda path, records: path.write_text(
        json.dumps({"version": {"n": 1}, "data": records, "tags": ["a"]})
    ),
    "lines~.json": write_jsonl,
    "array~.jsonl": write_json,
    "pandas~.csv": lambda path, records: pd.DataFrame(_in_cells(records)).to_csv(path),
    "semicolons~.csv": lambda path, records: write_csv(path, records, ";"),
    "bom~.csv": lambda path, records: pd.DataFrame(_in_cells(records)).to_csv(
        path, encoding="utf-8-sig", index=False
    ),
    ".parquet": lambda path, records: pq.write_table(_table(records), path),
    "pandas~.parquet": lambda path, records: pd.DataFrame(records).to_parquet(path),
    ".arrow": _write_ipc(pa.ipc.new_file),
    "stream~.arrow": _write_ipc(pa.ipc.new_stream),
    ".feather": lambda path, records: pyarrow.feather.write_feather(_table(records), str(path)),
    "saved~dataset": lambda path, records: datasets.Dataset.from_list(records).save_to_disk(path),
}


def write_format(folder: Path, kind: str, records: list[Record]) -> Path:
    """Write records in one of FORMATS and return the path."""
    path = folder / f"pairs{kind.rpartition('~')[2]}"
    FORMATS[kind](path, records)
    return path


def plain_lines(path: Path, pairs: list[Any]) -> Path:
    """Write pairs as `data convert` does."""
    path.write_bytes(b"".join(map(json_line, pairs)))
    return path
