"""A plan on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from digrap_scale.config import Config
from digrap_scale.planning.plan import Alternative, Plan
from digrap_scale.planning.states import KINDS, Memory

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def show_bytes(size: int) -> str:
    """``size`` with a binary unit, three digits or so."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return (
        f"{size} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}" if value < 1000 else f"{value:.0f} {_UNITS[unit]}"
    )


def show_plan(plan: Plan, config: Config, world_size: int, device_memory: int | None, console: Console) -> None:
    """Memory of the rank that needs most, traffic of a step, and notes."""
    trained = sum(weight.numel for weight in plan.model.trained)
    frozen = sum(weight.numel for weight in plan.model.frozen)
    sharding = config.sharding
    console.print(
        f"{config.model.path} · {config.method.name} · {sharding.backend} on {world_size} ranks · {trained:,} parameters "
        f"train, {frozen:,} do not · {plan.micro_batch_samples} samples a forward, {plan.accumulation_steps} forwards a step",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    rank, memory = plan.largest
    console.print(_memory_table(rank, memory, plan))
    if device_memory is not None:
        console.print(_verdict(memory, device_memory), highlight=False, markup=False, soft_wrap=True)
    if plan.traffic:
        console.print(_traffic_table(plan))
    for note in plan.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _memory_table(rank: int, memory: Memory, plan: Plan) -> Table:
    many = len(plan.memory) > 1
    table = Table(title=f"memory of rank {rank}" + (", the one that needs most" if many else ""), title_justify="left")
    table.add_column("")
    table.add_column("device", justify="right")
    table.add_column("host", justify="right")
    if many:
        table.add_column("device, all ranks", justify="right")
    for kind in KINDS:
        of_ranks = [one.device[kind] for one in plan.memory.values()]
        low, high = min(of_ranks), max(of_ranks)
        row = [_LABELS.get(kind, kind), show_bytes(memory.device[kind]), show_bytes(memory.host[kind])]
        if many:
            row.append(show_bytes(low) if low == high else f"{show_bytes(low)} to {show_bytes(high)}")
        table.add_row(*row)
    table.add_row("while the optimizer steps", show_bytes(memory.step), "", *[""] * many)
    peaks = [one.peak for one in plan.memory.values()]
    row = ["peak", show_bytes(memory.peak), show_bytes(sum(memory.host.values()))]
    if many:
        row.append(f"{show_bytes(min(peaks))} to {show_bytes(max(peaks))}")
    table.add_section()
    table.add_row(*row)
    return table


_LABELS = {
    "previous": "before the last step (p_t-1)",
    "buffers": "buffers and buckets",
    "gathered": "gathered for a while (estimate)",
    "activations": "activations (estimate)",
}


def _verdict(memory: Memory, device_memory: int) -> str:
    fits = memory.peak <= device_memory
    room = show_bytes(abs(device_memory - memory.peak))
    return f"{'fits' if fits else 'does not fit'} {show_bytes(device_memory)}: {room} {'left' if fits else 'too much'}"


def _traffic_table(plan: Plan) -> Table:
    table = Table(title="communication of a step", title_justify="left")
    for name, justify in (("collective", "left"), ("what", "left"), ("calls", "right"), ("ranks", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("payload", justify="right")
    table.add_column("sent by a rank (ring)", justify="right")
    for one in plan.traffic:
        sizes = (show_bytes(one.payload_bytes), show_bytes(one.sent_bytes))
        table.add_row(one.collective, one.what, str(one.count), str(one.ranks), *sizes)
    table.add_section()
    table.add_row("all", "", "", "", "", show_bytes(sum(one.sent_bytes for one in plan.traffic)))
    return table


def show_alternatives(found: Sequence[Alternative], device_memory: int | None, console: Console) -> None:
    """Backends and placements by what they need; with ``device_memory``, those that fit first, and whether any does."""
    table = Table(title="the same run otherwise (▸ as the config has it)", title_justify="left")
    for name in ("", "backend", "offload", "reference"):
        table.add_column(name)
    for name in ("device peak", "host", "sent in a step", "fits"):
        if name != "fits" or device_memory is not None:
            table.add_column(name, justify="right")
    for one in found:
        row = ["▸" if one.chosen else "", one.backend, one.offload, one.placement]
        row += [show_bytes(one.memory.peak), show_bytes(sum(one.memory.host.values())), show_bytes(one.sent_bytes)]
        if device_memory is not None:
            row.append("yes" if one.memory.peak <= device_memory else "no")
        table.add_row(*row)
    console.print(table)
    if device_memory is not None and not any(one.memory.peak <= device_memory for one in found):
        least = show_bytes(min(one.memory.peak for one in found))
        console.print(
            f"nothing fits {show_bytes(device_memory)}: the least is {least}; more ranks, a smaller "
            "training.micro_batch_samples, or model.lora",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
