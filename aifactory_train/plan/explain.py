"""A plan as text for people."""

from __future__ import annotations

from aifactory_train import units
from aifactory_train.plan.memory import memory_per_rank_bytes
from aifactory_train.plan.plan import Plan


def explain(plan: Plan) -> str:
    """Layout, memory and time by term with their shares, predictions and notes."""
    sections = [_head(plan), _layout(plan), _memory(plan), _time(plan), _predictions(plan)]
    if plan.notes:
        sections.append("notes\n" + "\n".join(f"  - {note}" for note in plan.notes))
    return "\n\n".join(sections)


def _head(plan: Plan) -> str:
    recipe, shape = plan.recipe, plan.shape
    rows = [
        ("recipe", f"{recipe.name}  ({plan.recipe_hash[:12]})"),
        ("machine", f"{plan.machine.name}: {plan.machine.device.name}  ({plan.machine_hash[:12]})"),
        ("model", f"{units.format_count(shape.n_parameters)} parameters, {recipe.model.family}"),
        ("work", f"{units.format_count(shape.model_flops_per_token)} FLOP/token ({shape.flops_convention})"),
        ("budget", f"{units.format_count(recipe.train.budget_tokens)} tokens in {recipe.n_steps} steps"),
    ]
    return "\n".join(f"{name:<9}{text}" for name, text in rows)


def _layout(plan: Plan) -> str:
    layout, recipe = plan.layout, plan.recipe
    gathered = "block by block" if layout.reshard_after_forward else "once for forward and backward"
    rows = [
        ("ranks", f"{layout.world_size} on {layout.n_nodes} node(s), {layout.threads_per_rank} thread(s) each"),
        ("fsdp", f"dp_shard {layout.dp_shard}, parameters gathered {gathered}"),
        ("activations", "kept" if layout.remat == "none" else "of each block computed again in the backward pass"),
        ("precision", layout.precision),
        (
            "batch",
            f"{recipe.global_batch_rows} rows of {recipe.data.seq_len_tokens} tokens = {layout.world_size} ranks"
            f" x {layout.accumulation} x {layout.micro_batch_rows} rows",
        ),
    ]
    return "layout\n" + "\n".join(f"  {name:<22}{text}" for name, text in rows)


def _memory(plan: Plan) -> str:
    terms, peak = plan.predicted.memory_bytes, plan.predicted.peak_memory_bytes
    lines = [_term(name, units.format_bytes(value), value / peak) for name, value in terms.items()]
    limit = memory_per_rank_bytes(plan.machine, plan.layout.world_size // plan.layout.n_nodes)
    of = f" of {units.format_bytes(limit)}" if limit else ""
    return "\n".join(["memory per rank", *lines, f"  {'peak':<22}{units.format_bytes(peak):>12}{of}"])


def _time(plan: Plan) -> str:
    total = plan.predicted.total_step_time_s
    lines = []
    for name, value in plan.predicted.step_time_s.items():
        lines.append(_term(name, units.format_seconds(value), value / total if total and value is not None else None))
    return "\n".join(["time per step", *lines, f"  {'total':<22}{units.format_seconds(total):>12}"])


def _term(name: str, value: str, share_frac: float | None) -> str:
    share = "" if share_frac is None else f"{units.format_fraction(share_frac):>9}"
    return f"  {name.replace('_', ' '):<22}{value:>12}{share}".rstrip()


def _predictions(plan: Plan) -> str:
    predicted = plan.predicted
    hours = predicted.device_hours
    rows = [
        ("throughput", units.format_rate(predicted.tokens_per_s, "tokens")),
        ("MFU", units.format_fraction(predicted.mfu_frac)),
        ("run time", units.format_seconds(predicted.run_time_s)),
        ("device time", "unknown" if hours is None else f"{units.format_count(hours)} device-hours".replace("  ", " ")),
    ]
    return "predicted\n" + "\n".join(f"  {name:<22}{text:>12}" for name, text in rows)
