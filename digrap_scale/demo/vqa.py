"""``demo --task vqa``: the small VLM on questions about one style of drawings, fully and with LoRA, three methods each."""

from __future__ import annotations

from pathlib import Path

from digrap_scale.demo import pictogram_vqa, vqa_settings
from digrap_scale.evaluation.report import ReportRow, print_report, read_report, write_report
from digrap_scale.evaluation.strength import read_strength
from digrap_scale.training.evaluate import evaluate
from digrap_scale.training.launch import check_accelerators, command_of, launch, timed_lines


def demo_vqa(folder: str, *, backend: str = "fsdp2", processes: int = 2, steps: int | None = None) -> None:
    """Run the demo under ``folder``; the table and the pictures are written there and shown.

    Raises:
        ConfigError: more processes than accelerators.
        PeerError: a run failed; its own lines, above, say why.
    """
    steps = steps or vqa_settings.STEPS
    check_accelerators(processes)
    root = Path(folder)
    sets = root / "sets"
    say = timed_lines()
    say("composing the questions' pages from the shipped pictograms")
    vqa_settings.write_sets(sets)
    say("zero-shot evaluation of the shipped VLM")
    config, _ = vqa_settings.make_config(
        root / "zero-shot", sets, {"name": "none"}, "full", backend="single", steps=steps
    )
    rows = [ReportRow("zero-shot", evaluate(config, None, show=False))]
    runs = {}
    for tuning in vqa_settings.LEARNING_RATES:
        for name, method in vqa_settings.METHODS.items():
            title, run = f"{tuning}: {name}", root / f"{tuning.lower()}-{method['name']}"
            config_file = root / f"{run.name}.yaml"
            text = vqa_settings.make_config(run, sets, method, tuning, backend=backend, steps=steps)[1]
            config_file.write_text(text, encoding="utf-8")
            say(f"{title}: {steps} steps on {processes} processes ({backend}): digrap-scale train {config_file}")
            launch(command_of(backend, processes, config_file), processes, title)
            rows.append(ReportRow(title, read_report(run / "results.json")[0][0].result))
            runs[title] = run
    rates = ", ".join(f"{tuning} {rate:g}" for tuning, rate in vqa_settings.LEARNING_RATES.items())
    notes = [
        f"trained on {pictogram_vqa.SOURCE} only; but for names, questions are about concepts that no training set of any "
        "style holds",
        f"all runs: AdamW, learning rate: {rates}; {steps} steps of {vqa_settings.BATCH} samples, seed 0, "
        f"{processes} processes ({backend}); strength_lr {vqa_settings.STRENGTH_LR:g}",
        "one seed; the ± is the test set's",
    ]
    strength = {title: read_strength(run) for title, run in runs.items()}
    files = write_report(rows, root, notes=notes, strength=strength)
    print_report(rows, notes)
    say("written: " + ", ".join(str(file) for file in files))
