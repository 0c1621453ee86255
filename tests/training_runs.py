"""Real runs for tests: a small corpus, a small recipe, and the ranks started by the real launcher."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from aifactory_train.cli import main
from aifactory_train.rundir import RunDir, read_jsonl

WORDS = [
    "the",
    "ranks",
    "of",
    "a",
    "run",
    "read",
    "rows",
    "of",
    "tokens",
    "and",
    "write",
    "the",
    "loss",
    "that",
    "the",
    "model",
    "made",
    "of",
    "them",
]
MODEL = {
    "family": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "ffn_size": 128,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_size": 16,
    "max_seq_len_tokens": 128,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "tied_embeddings": False,
}


def write_corpus(folder: Path, n_documents: int = 300) -> Path:
    """JSON lines of made-up sentences, of very different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.jsonl"
    with open(path, "w") as f:
        for i in range(n_documents):
            words = [WORDS[(i * 7 + k * k + k // 3) % len(WORDS)] for k in range(5 + (i * 37) % 120)]
            f.write(json.dumps({"text": " ".join(words) + f" {i}."}) + "\n")
    return path


def write_recipe(folder: Path, prepared: Path, corpus: Path, **changes: object) -> Path:
    """A recipe of 20 steps of 16 rows of 64 tokens. `changes` has dotted keys with `__` for the dot."""
    recipe: dict = {
        "name": "tiny",
        "model": dict(MODEL),
        "data": {
            "sources": [{"name": "words", "path": str(corpus)}],
            "tokenizer": {"train_vocab_size": 384},
            "prepared_dir": str(prepared),
            "seq_len_tokens": 64,
        },
        "train": {"budget_tokens": 20 * 1024, "global_batch_tokens": 1024, "precision": "fp32"},
        "optim": {"name": "adamw", "lr": 3e-3},
        "schedule": {"warmup_tokens": 2048},
        "checkpoint": {"every_steps": 10},
        "metrics": {"log_every_steps": 1},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = recipe
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def aifactory(*args: object, timeout_s: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """One verb in a process of its own."""
    command = [sys.executable, "-m", "aifactory_train", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **env}, check=False
    )


def aifactory_here(*args: object) -> subprocess.CompletedProcess[str]:
    """One verb in this process, which has torch and transformers in memory already: seconds less than `aifactory`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def launch(recipe: Path, run: Path, ranks: int = 1, *args: object) -> subprocess.CompletedProcess[str]:
    return aifactory("launch", recipe, "--run", run, "--cpu-ranks", ranks, *args)


def launched(recipe: Path, run: Path, ranks: int = 1, *args: object) -> list[dict]:
    """Launch, demand success, and return the rows of metrics.jsonl."""
    done = launch(recipe, run, ranks, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_jsonl(RunDir(run).metrics)


def start_launch(recipe: Path, run: Path, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aifactory_train", "launch", str(recipe), "--run", str(run)]
    return subprocess.Popen([*command, "--cpu-ranks", str(ranks)], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def pids(run: Path) -> list[int]:
    """Every process that trains in this run folder, mpirun too."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "train" in words and str(run) in words:
            found.append(int(entry.name))
    return found


def kill_ranks(run: Path) -> int:
    """SIGKILL all of them; returns how many there were."""
    found = pids(run)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return len(found)


def wait_until(condition, what: str, timeout_s: float = 120.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.002)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one clear message with what, where and do, no traceback."""
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output, output
    assert "do: " in output, output
    for word in words:
        assert word in output, f"{word!r} is not in:\n{output}"
