"""Makes a small set of chats that every machine has: what do the functions and classes of Python's library do?

    python examples/docstring_chats.py EXPORT FOLDER

Writes FOLDER/chats.jsonl, one question with the first sentence of a docstring as its answer per line, and
FOLDER/tokenizer, that of the Hugging Face folder EXPORT with a chat template.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# The model has seen Python files, so a chat is two comments. The loss counts on what is within {% generation %}.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '# Q: ' + m['content'] + '\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '# A: ' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '# A: ' }}{% endif %}"
)
LONGEST_CHARS = 160


def documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Name and first sentence of each public function and class of a module, and of their methods."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for item, prefix in ((node, module), *((method, f"{module}.{node.name}") for method in inner)):
            if not isinstance(item, ast.FunctionDef | ast.ClassDef) or item.name.startswith("_"):
                continue
            first = (
                " ".join((ast.get_docstring(item) or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
            )
            if 10 < len(first) <= LONGEST_CHARS:
                yield f"{prefix}.{item.name}", f"{first}."


def chats() -> Iterator[list[dict[str, str]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in ("site-packages", "dist-packages", "test", "tests", "idlelib") for part in parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and files that are broken on purpose
        for name, sentence in documented(tree, module):
            yield [
                {"role": "user", "content": f"What does {name} do?"},
                {"role": "assistant", "content": sentence},
            ]


def main(export: Path, folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(export / name, tokenizer)
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    lines = [json.dumps({"messages": chat}) for chat in chats()]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} chats in {folder / 'chats.jsonl'}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "tokenizer.json").exists():
        sys.exit(
            "usage: python docstring_chats.py EXPORT FOLDER, with EXPORT such as runs/demo/export after `make demo`"
        )
    main(Path(sys.argv[1]), Path(sys.argv[2]))
