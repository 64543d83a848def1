"""Where a step's time goes: torch's profiler over the optimizer's step with a method, summarised by part.

    python benchmarks/profile_step.py                        separate and fused, 100 M parameters
    python benchmarks/profile_step.py --trace trace.json     and a trace for a browser's tracing page

The parts are the functions of the walk, wrapped in profiler ranges for this run; their kernels' time is inside.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from step_overhead import make_gradients, make_model
from torch.profiler import ProfilerActivity, profile, record_function

import digrap_scale
from digrap_scale.projector import Projector


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return inner


PARTS = {
    "_statistics": "statistics",
    "_project": "projection",
    "_step_fused": "projection and AdamW, fused",
    "_before_step": "pre hook",
    "_after_step": "post hook",
}


def run(projection: str, millions: float, layers: int | None, steps: int, trace: str | None, kernels: str) -> None:
    torch.manual_seed(0)
    model = make_model(millions, layers)
    make_gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for name, part in PARTS.items():
        if not hasattr(getattr(Projector, name), "__wrapped_part__"):
            wrapped = ranged(part, getattr(Projector, name))
            wrapped.__wrapped_part__ = True  # type: ignore[attr-defined]
            setattr(Projector, name, wrapped)
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            {n: (p.detach() * 0.1).bfloat16() for n, p in model.named_parameters()}, f"{folder}/model.safetensors"
        )
        projector = digrap_scale.attach(
            model, optimizer, reference=Path(folder), projection=projection, kernels=kernels
        )

    def step() -> None:
        projector.method.omega.value_L.fill_(0.5)
        with record_function("optimizer.step()"):
            optimizer.step()

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    if trace is not None:
        profiler.export_chrome_trace(f"{projection}-{trace}")
    totals = {event.key: event.cpu_time_total / steps / 1e3 for event in profiler.key_averages()}
    whole = totals["optimizer.step()"]
    elements = sum(p.numel() for p in model.parameters())
    count = len(list(model.parameters()))
    print(
        f"\n{projection}: {elements / 1e6:.1f} M parameters, {count} layers, {projector.method.kernels.name} kernels\n"
    )
    print("| part | ms | share |\n|:--|--:|--:|")
    hooks = totals.get("pre hook", 0.0) + totals.get("post hook", 0.0)
    rows = [(part, totals[part]) for part in list(PARTS.values())[:3] if part in totals]
    named = sum(value for _, value in rows)
    rows.append(("the hooks' own: views, ω, reports", hooks - named))
    rows.append(("torch's AdamW", totals.get("Optimizer.step#AdamW.step", whole) - hooks))
    for part, value in rows:
        print(f"| {part} | {value:.1f} | {100 * value / whole:.0f} % |")
    print(f"| optimizer.step() | {whole:.1f} | 100 % |")
    projector.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100, help="parameters, in millions (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=None, help="equal layers instead of transformer blocks")
    parser.add_argument("--steps", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--trace", default=None, help="write a trace by this name for each form")
    parser.add_argument(
        "--kernels", default="auto", choices=("auto", "native", "compile", "eager"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    for projection in ("separate", "fused"):
        run(projection, options.millions, options.layers, options.steps, options.trace, options.kernels)


if __name__ == "__main__":
    main()
