"""What mkdocs does besides rendering: tables from the code, results from files, sources for the API pages."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from hf_attn_patch.conversion.families.refused import REFUSED
from hf_attn_patch.conversion.families.table import FAMILIES, Stack
from hf_attn_patch.conversion.methods.registry import METHODS

ROOT = Path(__file__).parents[1]
#: from a line with >>> to the next empty line, or the end of the docstring
DOCTEST = re.compile(r'^( *)>>> .*(?:\n\1(?!""")(?=.*\S).*)*', re.MULTILINE)


def on_startup(**_: Any) -> None:
    """mkdocstrings reads files: give it the import packages as they are installed, the three folders as one."""
    target = ROOT / "build" / "api" / "hf_attn_patch"
    shutil.rmtree(target, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hf_attn_patch", target, ignore=skip)
    for folder in ("modeling", "conversion"):
        shutil.copytree(ROOT / folder, target / folder, ignore=skip)
    for path in target.rglob("*.py"):  # what docstrings have that Markdown would print as it stands, or quote
        text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", path.read_text(encoding="utf-8"))  # Sphinx's :class:`X`
        path.write_text(DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", text), encoding="utf-8")


def on_page_markdown(markdown: str, **_: Any) -> str:
    for mark, make in MARKS.items():
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", make())
    return markdown


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def methods() -> str:
    rows = [
        (f"`{m.name}`", m.summary, ", ".join(f"`--{o.name.replace('_', '-')}`" for o in m.options))
        for m in METHODS.values()
    ]
    return table(("Method", "What it does", "Options"), rows)


def special(stack: Stack) -> list[str]:
    """What is unlike Llama in an attention, in words."""
    facts = []
    fused = [p for p in stack.projections if len(p.holds) > 1]
    if fused:
        form = {"groups": "by groups", "heads": "by heads", "rows": ""}[
            fused[0].form
        ] or f"in {fused[0].blocks} blocks" * (fused[0].blocks > 1)
        facts.append(" ".join(filter(None, (f"fused `{fused[0].module}` ({fused[0].holds})", form))))
    if any(p.transposed for p in stack.projections):
        facts.append("weights [in, out]")
    if stack.part:
        facts.append(f"{stack.name} described in `{stack.part}`")
    if stack.rope == "none" and (not stack.cross or stack.fixed_heads):  # an encoder's output never turns
        facts.append("ALiBi or relative bias (heads keep their order)" if stack.fixed_heads else "no RoPE")
    elif stack.rope == "interleaved":
        facts.append("interleaved RoPE")
    if stack.rotary_fraction != 1.0 or stack.rotary_dim:
        facts.append("partial RoPE")
    if stack.no_rope_layers:
        facts.append("some layers without RoPE" if stack.no_rope_layers != "alibi" else "RoPE or ALiBi")
    if stack.shared_qk_norm:
        facts.append("norm on q and k before the scores")
    if stack.keys_fixed and not stack.shared_qk_norm:
        facts.append("norm without gains on q and k")
    if stack.values_fixed:
        facts.append("a gate or norm behind the values, which are averaged")
    if stack.sparse:
        facts.append("in some layers only")
    if stack.value_dim:
        facts.append("value heads of another width")
    if stack.kv_field.varies in ("layers", "types"):
        facts.append(f"KV heads by {'layer' if stack.kv_field.varies == 'layers' else 'type of layer'}")
    if stack.norms:
        forms = {"flat": "one norm over all heads", "heads": "a gain for each head", "list": "a norm for each head"}
        facts.append(forms[stack.norms[0].form])
    if stack.sinks:
        facts.append("attention sinks")
    if stack.caches_query_heads:
        facts.append("transformers caches all query heads")
    return facts


def families(grouped: bool) -> str:
    rows = []
    for family in FAMILIES:
        names = [n for n in family.model_types if not n.startswith("gqa_")]
        if (family.becomes is not None) != grouped or not names:
            continue
        facts = list(dict.fromkeys(fact for stack in family.stacks for fact in special(stack)))
        what = "; ".join(facts) or ("-" if grouped else "as Llama")
        if grouped:
            fields = ", ".join(f"`{stack.kv_field.name}`" for stack in family.stacks)
            rows.append((f"`{names[0]}`", f"`{family.becomes}`", fields, what))
        else:
            rows.append((", ".join(f"`{n}`" for n in names), what))
    if grouped:
        return table(("Family", "Becomes", "KV heads in", "What is special"), rows)
    return table(("Families", "What is special"), rows)


def refused() -> str:
    rows = [(", ".join(f"`{name}`" for name in names), why) for why, names in REFUSED.items()]
    return table(("Families", "Why"), rows)


def results() -> str:
    """benchmarks/results/*.md one after another, their headings one level down, their pictures beside the pages."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        fences = re.split(r"(^```.*?^```$)", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        fences[::2] = [re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE) for text in fences[::2]]  # not comments
        text = "".join(fences)
        parts.append(re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](results/\1)", text))
    return "\n\n".join(parts) or "No results are in the repository yet."


def on_files(files: Any, config: Any) -> Any:
    """Pictures and data beside the results belong to the site."""
    from mkdocs.structure.files import File

    folder = ROOT / "benchmarks" / "results"
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        name = f"results/{path.relative_to(folder).as_posix()}"
        files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def comparison() -> str:
    """The first page's table of alternatives, and when not to use this: written once, in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text[text.index("## Is it for you?") : text.index("## Three doors")]


def first_numbers() -> str:
    """The README's three numbers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text[text.index("| | before | with this package |") : text.index("\nWhere these are from")]


def engines() -> str:
    """What `make engines` found."""
    rows = json.loads((ROOT / "benchmarks/results/engines.json").read_text(encoding="utf-8"))
    lines = []
    for r in rows:
        said = f"not taken: {r['refused']}" if r["refused"] else r["fault"] or f"the same {r['tokens']} tokens"
        numbers = ("", "") if r["refused"] else (f"{r['difference']:.1e}", f"{r['exchanged']:.1f}")
        lines.append((f"{r['version']}, {r['date']}", r["family"], r["way"], said, *numbers))
    header = ("Engine", "Family", "Asked", "Greedy tokens", "Log probabilities, largest difference", "Heads exchanged")
    return table(header, lines)


MARKS = {
    "engines": engines,
    "comparison": comparison,
    "first numbers": first_numbers,
    "methods": methods,
    "families: stock": lambda: families(grouped=False),
    "families: refused": refused,
    "families: grouped": lambda: families(grouped=True),
    "results": results,
}
