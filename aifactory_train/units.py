"""Print quantities with their units. Nothing else in the project formats numbers with units.

Inside the code every quantity is in a base unit that its name carries (`_bytes`, `_s`, `_flops_per_s`);
prefixes and percentages exist only in printed text.
"""

from __future__ import annotations

import re


def _scaled(value: float, units: tuple[str, ...], base: float) -> str:
    size = abs(value)
    index = 0
    while index + 1 < len(units) and size >= base:
        size /= base
        index += 1
    number = value / base**index
    digits = 0 if index == 0 and float(number).is_integer() else 3 - min(2, len(str(int(abs(number)))) - 1) - 1
    return f"{number:,.{max(digits, 0)}f} {units[index]}".rstrip()


def format_bytes(value: float | None) -> str:
    """1536 -> "1.50 KiB"; None -> "unknown"."""
    return "unknown" if value is None else _scaled(value, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 1024)


def format_count(value: float | None) -> str:
    """31_600_000 -> "31.6 M"."""
    return "unknown" if value is None else _scaled(value, ("", "k", "M", "G", "T"), 1000)


def format_flops_per_s(value: float | None) -> str:
    """9.89e14 -> "989 TFLOP/s"."""
    units = ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s", "EFLOP/s")
    return "unknown" if value is None else _scaled(value, units, 1000)


def format_bytes_per_s(value: float | None) -> str:
    """3.35e12 -> "3.35 TB/s": rates of memory and links are decimal, as vendors give them."""
    return "unknown" if value is None else _scaled(value, ("B/s", "kB/s", "MB/s", "GB/s", "TB/s"), 1000)


def format_gb_per_s(value: float | None) -> str:
    """1.25e10 -> "12.5": for tables and pictures whose head names GB/s, one scale for all cells."""
    return "unknown" if value is None else f"{value / 1e9:,.4g}"


def format_gbit_per_s(value: float | None) -> str:
    """200.0 -> "200 Gbit/s"."""
    return "unknown" if value is None else f"{value:,.4g} Gbit/s"


def format_watts(value: float | None) -> str:
    """560.0 -> "560 W"; 12_400.0 -> "12.4 kW"."""
    if value is None:
        return "unknown"
    return f"{value:,.4g} W" if abs(value) < 1e4 else _scaled(value, ("W", "kW", "MW"), 1000)


def format_kwh(value: float | None) -> str:
    """1_250_000.0 -> "1.25 GWh": energy, given in kWh."""
    return "unknown" if value is None else _scaled(value * 1e3, ("Wh", "kWh", "MWh", "GWh", "TWh"), 1000)


def format_hours(value: float | None) -> str:
    """48.0 -> "48 h"; 0.5 -> "30 min"."""
    if value is None:
        return "unknown"
    return f"{value:,.4g} h" if value >= 1 else f"{value * 60:.3g} min"


def format_rate(value: float | None, what: str) -> str:
    """1046.2, "tokens" -> "1.05 k tokens/s"."""
    return "unknown" if value is None else f"{format_count(value)} {what}/s".replace("  ", " ")


def format_seconds(value: float | None) -> str:
    """0.0123 -> "12.3 ms"; 4000 -> "66 min 40 s"; 10_000 -> "2 h 46 min"; 600_000 -> "6 d 22 h"."""
    if value is None:
        return "unknown"
    if 0 < value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    if value < 7200:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    if value < 96 * 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
    return f"{int(value // 86400)} d {int(value % 86400 // 3600)} h"


def format_days(value_s: float | None) -> str:
    """Seconds as days for tables: 129_600 -> "1.5"; 1.7e8 -> "1,968"."""
    if value_s is None:
        return "unknown"
    return f"{value_s / 86400:.3g}" if value_s < 100 * 86400 else f"{value_s / 86400:,.0f}"


def format_fraction(value: float | None) -> str:
    """0.4132 -> "41.3 %"."""
    return "unknown" if value is None else f"{value * 100:.1f} %"


def format_nats(value: float | None) -> str:
    """3.2141 -> "3.214 nats/token"."""
    return "unknown" if value is None else f"{value:.3f} nats/token"


def format_difference(value: float | None) -> str:
    """A signed fraction: 0.042 -> "+4.2 %"."""
    return "unknown" if value is None else f"{value * 100:+.1f} %".replace("-", "\N{MINUS SIGN}")


def format_quantity(value: float | None, unit: str) -> str:
    """1.2e11, "B/s" -> "120 GB/s": a value in the base unit that is named beside it."""
    if value is None:
        return "unknown"
    match unit:
        case "s":
            return format_seconds(value)
        case "B":
            return format_bytes(value)
        case "B/s":
            return format_bytes_per_s(value)
        case "FLOP/s":
            return format_flops_per_s(value)
        case "1":
            return format_fraction(value)
        case "W":
            return format_watts(value)
        case "J":
            return format_kwh(value / 3.6e6)
    if unit.endswith("/s"):
        return format_rate(value, unit.removesuffix("/s"))
    return f"{value:,.4g} {unit}"


def format_slurm_time(seconds: float) -> str:
    """90000 -> "1-01:00:00", as sbatch --time takes it."""
    total = int(seconds)
    days, rest = divmod(total, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def parse_duration_s(text: str) -> float | None:
    """Seconds of "10d", "36h", "90min", "1.5h", or of what sbatch --time takes with a colon or a dash; else None."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(d|h|min|s)", text.strip())
    if found is not None:
        return float(found[1]) * {"d": 86400, "h": 3600, "min": 60, "s": 1}[found[2]]
    return parse_slurm_time_s(text) if ":" in text or "-" in text else None


def parse_slurm_time_s(text: str) -> int | None:
    """Seconds of what sbatch --time takes: "90" (minutes), "90:30", "4:00:00", "1-12", "1-12:30:00"; else None."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if found is None:
        return None
    days, first, second, third = (None if g is None else int(g) for g in found.groups())
    assert first is not None
    if days is not None:
        return days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + (second or 0) * 60 + third
    return first * 60 + (second or 0)
