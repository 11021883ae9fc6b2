"""``hf-attn evaluate --lm-eval``: tasks of lm-evaluation-harness on a model that is loaded already."""

from __future__ import annotations

import re
from typing import Any

from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.errors import ConversionError, one_line

#: requests at a time
BATCH = 8


def import_lm_eval() -> Any:
    """The package ``lm_eval``; :class:`ConversionError` with the way to get it where it is missing."""
    try:
        import lm_eval
    except ImportError:
        raise ConversionError("--lm-eval needs lm-evaluation-harness: pip install 'hf-attn-patch[eval]'") from None
    return lm_eval


def task_names(tasks: str) -> tuple[list[str], list[str]]:
    """The tasks' names, and the folders that tasks given as YAML files are in.

    >>> task_names("hellaswag,arc_easy")
    (['hellaswag', 'arc_easy'], [])

    Raises:
        ConversionError: a YAML file is missing or names no task.
    """
    names, folders = [], []
    for entry in filter(None, (part.strip() for part in tasks.split(","))):
        if not entry.endswith((".yaml", ".yml")):
            names.append(entry)
            continue
        path = user_path(entry)
        if not path.is_file():
            raise ConversionError(f"--lm-eval: there is no file {entry}")
        named = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if named is None:
            raise ConversionError(f"--lm-eval: {entry} names no task (a line such as 'task: my_task')")
        names.append(named[1])
        folders.append(str(path.parent))
    if not names:
        raise ConversionError("--lm-eval names no task")
    return names, folders


def run_lm_eval(model: Any, tokenizer: Any, tasks: str) -> dict[str, dict[str, float]]:
    """lm-evaluation-harness on a loaded model.

    Args:
        tasks: names of tasks that the harness knows, or YAML files of your own, with commas between.

    Returns:
        {task: {metric: value}}, such as {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.01}}.

    Raises:
        ConversionError: there is no such task, or its data cannot be had.
    """
    harness = import_lm_eval()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names, folders = task_names(tasks)
    try:
        manager = TaskManager(
            include_path=list(dict.fromkeys(folders)) or None, include_defaults=len(folders) < len(names)
        )
        found = harness.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH), tasks=names, task_manager=manager
        )
    except (KeyError, ValueError, OSError) as error:  # an unknown task, a data set that is not there
        raise ConversionError(f"--lm-eval {tasks}: {type(error).__name__}: {one_line(error)}") from None
    return {task: {k: float(v) for k, v in r.items() if isinstance(v, float)} for task, r in found["results"].items()}
