"""docs/benchmarks.md: what each benchmark asks, with a prompt as lm-eval renders it, from what is configured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..data.benchmarks import KNOWN, Harness, known
from ..data.sources import ONE_IN, SOURCES, Source
from ..disk import write_atomically
from ..spec import CONF
from ..spec.run_spec import Eval
from .harness import OURS, task_manager, tasks_of

EXAMPLES = Path(__file__).parent / "examples"  # made-up rows in the schemas of the sets, by benchmark
PAGE = CONF.parent / "docs" / "benchmarks.md"

HEAD = f"""# Benchmarks

Written by `make docs` from `src/mora_repro/evaluation/`; change that, not this.

What stands behind the columns of the paper's tables, as lm-eval asks it. `eval.data.<name>=<path>` takes a local file
(jsonl, json, csv, parquet or arrow), which is the test set, or a folder with `test.jsonl` and, where they are asked
for, `validation.jsonl` and `dev.jsonl`, in one of the schemas below. Of a set without a validation split one row in
{ONE_IN}, by the hash of its content, is the validation set (`eval.split=validation`), and the others are the test set.
Every metric is in per cent; it comes with its standard error (analytic for means over samples, by bootstrap for F1 and
for means over tasks) and its number of samples. The prompts and answers below are made up, in the schema of each set.
"""


def main() -> None:
    """Writes it."""
    write_atomically(PAGE, page())
    print(f"written: {PAGE}")


def page() -> str:
    return "\n".join([HEAD, *map(_section, KNOWN), _generated("gsm8k"), _generated("math")])


def _section(name: str) -> str:
    settings = Eval(data={name: str(EXAMPLES / name)})
    parts = [f"## {name}\n", _comment(name), _source(SOURCES[name])]
    for benchmark in known(name, settings):
        parts.append(_asked(benchmark))
    return "\n".join(part for part in parts if part)


def _asked(benchmark: Harness) -> str:
    loaded = tasks_of(benchmark)
    name, task = next(iter(loaded.tasks.items()))
    task.set_fewshot_seed(0)
    row = task.eval_docs[0]
    shots = task.config.num_fewshot or 0
    prompt, gold = task.fewshot_context(row, shots), task.doc_to_target(row)
    if task.OUTPUT_TYPE == "multiple_choice":
        options = task.doc_to_choice(row)
        gold = options[gold] if isinstance(gold, int) else gold
        how = f"The likeliest of {', '.join(f'`{option}`' for option in options)}"
    else:
        how = f"At most {task.config.generation_kwargs['max_gen_toks']} tokens are generated, greedily, of one line"
    of = "" if loaded.by_size else ", the mean over tasks"
    metric = next(name for name, one in task.aggregation().items() if name == benchmark.metric)
    aggregation = task.aggregation()[metric].__name__
    return (
        f"`{benchmark.name}`: lm-eval's `{benchmark.task}`{f' (here `{name}`)' if name != benchmark.task else ''}, "
        f"{shots} shots from lm-eval; metric `{metric}`, aggregated by `{aggregation}`{of}. {how}.\n\n"
        f"```text\n{prompt}\n```\n\nGold: `{gold}`\n"
    )


def _source(source: Source) -> str:
    names = ", ".join(f"`{name}`" for name in source.names if name)
    splits = ", ".join(f"{ours}: {f'`{theirs}`' if theirs else 'held out'}" for ours, theirs in source.splits.items())
    columns = " or ".join(
        ", ".join(f"`{column}` ({kind.__name__})" for column, kind in form.columns.items()) for form in source.forms
    )
    return f"Data: `{source.path}`{f', {names}' if names else ''}; {splits}. Columns: {columns}.\n"


def _comment(name: str) -> str:
    """The comment at the head of one of our YAML files; nothing of lm-eval's own."""
    path = task_manager().task_index[KNOWN[name][0].task].yaml_path
    if path is None or path.parent != OURS:
        return ""
    lines = path.read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#")) + "\n"


def _generated(name: str) -> str:
    """GSM8K or MATH, which the suite asks by itself."""
    from ..data.gsm8k import Gsm8k

    recipe: dict[str, Any] = yaml.safe_load((CONF / "recipes" / "paper.yaml").read_text())["gsm8k"]
    configured: dict[str, Any] = yaml.safe_load((CONF / "task" / "gsm8k.yaml").read_text())
    wanted = {key: recipe.get(key.replace("steps", "problem_steps"), configured.get(key)) for key in Gsm8k.model_fields}
    task = Gsm8k(**wanted | {"data": "generated", "seed": 0, "math": None})
    settings = Eval(data={one: str(EXAMPLES / one) for one in ("gsm8k", "math")})
    [asked] = [one for one in task.benchmarks(settings) if one.name == name]
    prompt, gold = asked.pairs[0]
    [metric] = asked.score(gold, gold)
    return (
        f"## {name}\n\n{_source(SOURCES[name])}\n"
        f"Asked by the task `gsm8k` itself, with MetaMath's prompt; metric `{metric}`. At most {task.max_new_tokens} "
        f"tokens are generated, greedily.\n\n```text\n{prompt}\n```\n\nGold:\n\n```text\n{gold}\n```\n"
    )
