"""The README's main job: zero-shot, fine-tuning three ways on several processes, WiSE-FT, and the table of all five."""

from __future__ import annotations

from pathlib import Path

from digrap_scale.checkpoint.interpolate import interpolate
from digrap_scale.demo import settings
from digrap_scale.evaluation.report import ReportRow, print_report, read_report, write_report
from digrap_scale.evaluation.strength import read_strength
from digrap_scale.evaluation.suite import SuiteResult
from digrap_scale.training.evaluate import evaluate
from digrap_scale.training.launch import check_accelerators, command_of, launch, timed_lines

WISE_ALPHA = 0.5


def demo(folder: str, *, backend: str = "fsdp2", processes: int = 2, steps: int | None = None) -> None:
    """Run the demo under ``folder``; the table and the pictures are written there and shown.

    Raises:
        ConfigError: more processes than accelerators.
        PeerError: a run failed; its own lines, above, say why.
    """
    steps = steps or settings.STEPS
    check_accelerators(processes)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    say = timed_lines()
    say("zero-shot evaluation of the shipped foundation model")
    rows = [ReportRow("zero-shot", _evaluate(root / "zero-shot", str(settings.FOUNDATION)))]
    runs = {name: root / method["name"] for name, method in settings.METHODS.items()}
    for name, run in runs.items():
        config_file = root / f"{run.name}.yaml"
        config_file.write_text(settings.make_config(run, settings.METHODS[name], backend=backend, steps=steps)[1])
        command = command_of(backend, processes, config_file)
        say(f"{name}: {steps} steps on {processes} processes ({backend}): digrap-scale train {config_file}")
        launch(command, processes, name)
        rows.append(ReportRow(name, read_report(run / "results.json")[0][0].result))
        if name == "FT":
            say(f"WiSE-FT: weights halfway between zero-shot and FT (alpha {WISE_ALPHA})")
            wise = root / "wise_ft"
            interpolate(settings.FOUNDATION, run / "final", wise, [WISE_ALPHA], overwrite=True)
            rows.append(ReportRow(f"WiSE-FT {WISE_ALPHA}", _evaluate(root / "wise-evaluation", str(wise))))
    notes = [
        f"trained on {settings.SOURCE} only; concepts of the test sets are in no training set of any style",
        f"all runs: AdamW, learning rate {settings.LEARNING_RATE:g}, {steps} steps of {settings.BATCH} samples, seed 0, "
        f"{processes} processes ({backend}); strength_lr {settings.STRENGTH_LR:g}",
        "one seed: other random crops move a run by several points, more than the ±, which is the test set's; "
        "nothing was selected on a validation set",
        "emojione-monotone is a line style, like the source: fine-tuning helps there; the others are what it forgets",
    ]
    strength = {name: read_strength(run) for name, run in runs.items()}
    files = write_report(rows, root, notes=notes, strength=strength)
    print_report(rows, notes)
    say("written: " + ", ".join(str(file) for file in files))


def _evaluate(folder: Path, weights: str) -> SuiteResult:
    config, _ = settings.make_config(folder, {"name": "none"}, backend="single", steps=settings.STEPS)
    return evaluate(config, weights, show=False)
