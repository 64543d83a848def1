"""``digrap-scale compare``: search, select on ID validation, train the other seeds, and report.

Two phases. First every setting of every method (within the budget) trains on the first seeds; the best by ID validation is
chosen, for each method and domain by itself. Then the chosen settings train on the other seeds. A trial that is done is never
run again; one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from digrap_scale.compare.cost import costs_of
from digrap_scale.compare.executors import run_trials
from digrap_scale.compare.grid import Setting, Space, Trial, TrialMaker, describe_setting, domains, spaces
from digrap_scale.compare.load import WISE_FT, ZERO_SHOT, load_grid
from digrap_scale.compare.pictures import draw
from digrap_scale.compare.report import REPORT, write_all
from digrap_scale.compare.results import Comparison, Row, SearchPoint, results_of, validation_of
from digrap_scale.compare.schema import GridConfig
from digrap_scale.compare.select import select
from digrap_scale.compare.table import tables_of, terminal
from digrap_scale.errors import ConfigError, Preempted, SaveError, TrialError
from digrap_scale.evaluation.suite import SuiteResult
from digrap_scale.training.launch import timed_lines


def compare(path: str, *, dry_run: bool = False, console: Console | None = None) -> None:
    """Run what is missing of the grid in the file ``path``, and report.

    Args:
        dry_run: print search space, budget and what is missing; run nothing.
        console: where to show the tables; standard output if None.

    Raises:
        ConfigError: the grid, or a config that comes out of it, is wrong: every problem, before anything runs.
        TrialError: some trials failed; everything else is done and reported.
        Preempted: asked to stop; the same command goes on.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "compare starts its trials' processes itself: run it without a launcher, and set executor.ranks"
        )
    grid = load_grid(path)
    plan = _Plan(grid, path)
    console = console or _console()
    if dry_run:
        _show(console, [*plan.notes(), *plan.missing()])
        return
    out = Path(grid.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        with lock.acquire(timeout=0):
            with _stoppable():
                comparison = plan.run(out, timed_lines())
            _report(comparison, out, console)
    except Timeout:
        raise ConfigError(f"out: {out} is in use by another comparison; wait for it, or set another folder") from None
    except OSError as error:
        raise SaveError(f"out: {out}: {error}") from error
    if comparison.failed:
        lines = "\n".join(comparison.failed)
        raise TrialError(f"{len(comparison.failed)} trials failed; run the same command to try them again:\n{lines}")


class _Plan:
    """A grid's trials in their two phases, and what came out of them."""

    def __init__(self, grid: GridConfig, path: str) -> None:
        self.grid = grid
        self.spaces: dict[str, Space] = spaces(grid)
        self.domains = list(domains(grid))
        self._maker = TrialMaker(grid, path)
        self._zero_shot: dict[str, Trial] = {}
        # (domain, method, setting) → seed → trial
        self._search: dict[tuple[str, str, Setting], dict[int, Trial]] = {}
        self._make()

    def _make(self) -> None:
        """Every trial of the search. Raises: ConfigError: all problems of all configs."""
        problems: dict[str, None] = {}
        for domain in self.domains:
            for method, space in self.spaces.items():
                for setting in space.settings:
                    try:
                        self._search[domain, method, setting] = {
                            seed: self._maker.train(domain, method, setting, seed) for seed in self._seeds()
                        }
                    except ConfigError as error:
                        problems.update(dict.fromkeys(f"{method}: {problem}" for problem in error.problems))
            if self.grid.zero_shot and not problems:
                self._zero_shot[domain] = self._maker.zero_shot(domain)
        if problems:
            raise ConfigError(list(problems))

    def _seeds(self) -> list[int]:
        return self.grid.seeds[: self.grid.search_seeds]

    def notes(self) -> list[str]:
        """Search space, budget, and how things were done, a line each."""
        grid = self.grid
        lines = [f"searched alike by all methods: {_values(grid.shared_search)}"]
        for name, space in self.spaces.items():
            own = {key: values for key, values in space.values.items() if key not in grid.shared_search}
            drawn = "all" if len(space.settings) == space.size else f"{len(space.settings)} drawn"
            lines.append(f"{name}: own hyper-parameters: {_values(own)}; tried: {drawn} of {space.size} settings")
            if overrides := grid.methods[name].overrides:
                lines.append(f"{name}: differs in {'; '.join(f'{key}: {value}' for key, value in overrides.items())}")
        differing = [key for entry in grid.methods.values() for key in (*entry.overrides, *entry.search)]
        alike = not any(key.split(".")[0] == "training" for key in differing)
        lines.append(
            f"budget: at most {grid.budget} settings a method and domain, each on {len(self._seeds())} seed(s) "
            f"({', '.join(map(str, self._seeds()))}); {'no method trains more' if alike else 'runs differ as told above'}"
        )
        lines.append(
            "selected by accuracy on ID validation (withheld from training) alone, for each method and domain by itself; the "
            f"chosen setting then trains on seeds {', '.join(map(str, grid.seeds))}, those of the search included"
        )
        if grid.wise_ft is not None:
            alphas = ", ".join(f"{alpha:g}" for alpha in grid.wise_ft.alphas)
            lines.append(
                f"{WISE_FT}: of {grid.wise_ft.of}'s chosen runs, α in {alphas} by ID validation, a choice more than the budget; "
                "needs no training"
            )
        lines.append(
            f"intervals: {100 * grid.confidence:g} per cent, of paired differences (same domain, same seed), not corrected for "
            "the number of comparisons; ± is over seeds and holds no sampling error of the test sets"
        )
        return lines

    def missing(self) -> list[str]:
        """What would run now, a line each."""
        trials = [*self._zero_shot.values(), *(trial for seeds in self._search.values() for trial in seeds.values())]
        open_ = [trial for trial in trials if results_of(trial) is None]
        rest = len(self.domains) * len(self.spaces) * (len(self.grid.seeds) - len(self._seeds()))
        lines = [
            f"first phase: {len(open_)} of {len(trials)} trials are missing",
            *(f"  {trial.name}" for trial in open_),
        ]
        return [*lines, f"second phase: {rest} trials, of the settings that are chosen by then"]

    def run(self, out: Path, say: Callable[[str], None]) -> Comparison:
        """Both phases."""
        for line in self.notes():
            say(line)
        failed: dict[Trial, str] = {}
        first = [*self._zero_shot.values(), *(trial for seeds in self._search.values() for trial in seeds.values())]
        failed |= self._run("search", first, out, say)
        points = self._points()
        chosen = _chosen(points)
        for (domain, method), setting in chosen.items():
            say(f"{domain}: {method}: chosen by ID validation: {describe_setting(setting) or 'its only setting'}")
        final: dict[tuple[str, str], dict[int, Trial]] = {
            (domain, method): {
                seed: self._search[domain, method, setting].get(seed)
                or self._maker.train(domain, method, setting, seed)
                for seed in self.grid.seeds
            }
            for (domain, method), setting in chosen.items()
        }
        failed |= self._run("other seeds", [t for k in final.values() for t in k.values() if t not in failed], out, say)
        return self._comparison(points, chosen, final, failed)

    def _run(self, phase: str, trials: list[Trial], out: Path, say: Callable[[str], None]) -> dict[Trial, str]:
        missing = [trial for trial in trials if results_of(trial) is None]
        say(f"{phase}: {len(missing)} of {len(trials)} trials to run")
        failed = run_trials(missing, self.grid.executor, out, say)
        for trial in missing:
            if trial not in failed and results_of(trial) is None:
                failed[trial] = f"it ended well, but left no results ({trial.folder / 'log.txt'})"
        return failed

    def _points(self) -> list[SearchPoint]:
        """Settings whose every run of the search is done: those with fewer seeds would be judged on others' luck."""
        points = []
        for (domain, method, setting), seeds in self._search.items():
            results = [found[0] for trial in seeds.values() if (found := results_of(trial)) is not None]
            if len(results) == len(seeds):
                points.append(SearchPoint(domain, method, setting, results, list(seeds.values())))
        return points

    def _comparison(
        self,
        points: list[SearchPoint],
        chosen: dict[tuple[str, str], Setting],
        final: dict[tuple[str, str], dict[int, Trial]],
        failed: dict[Trial, str],
    ) -> Comparison:
        rows: list[Row] = []
        if self._zero_shot:
            row = Row(ZERO_SHOT)
            for domain, trial in self._zero_shot.items():
                if (found := results_of(trial)) is not None:
                    row.results[domain] = {None: found[0]}
            rows += [row] if row.results else []
        curve: dict[float, dict[str, list[SuiteResult]]] = {}
        for method in self.spaces:
            row, wise = Row(method), Row(WISE_FT)
            for domain in self.domains:
                found_of = {
                    seed: (trial, found)
                    for seed, trial in final.get((domain, method), {}).items()
                    if (found := results_of(trial)) is not None
                }
                if not found_of:
                    continue
                row.results[domain] = {seed: found[0] for seed, (_, found) in found_of.items()}
                row.trials[domain] = {seed: trial for seed, (trial, _) in found_of.items()}
                row.settings[domain] = describe_setting(chosen[domain, method])
                if self.grid.wise_ft is not None and self.grid.wise_ft.of == method:
                    self._interpolated(domain, {seed: found for seed, (_, found) in found_of.items()}, wise, curve)
            rows += [one for one in (row, wise) if one.results]
        settings = [
            f"{row.name} in {domain}: {setting}" for row in rows for domain, setting in row.settings.items() if setting
        ]
        lines = [f"{trial.name}: {reason}" for trial, reason in failed.items()]
        if not any(row.name == self.grid.baseline for row in rows):
            told = "\n".join(lines)
            raise TrialError(f"no run of the baseline {self.grid.baseline} is done: nothing to compare with:\n{told}")
        notes = [*self.notes(), *(f"chosen: {line}" for line in settings)]
        grid = self.grid
        costs = costs_of({row.name: [t for seeds in row.trials.values() for t in seeds.values()] for row in rows})
        return Comparison(
            rows, grid.baseline, points, curve, notes, lines, grid.confidence, grid.bootstrap_samples, costs
        )

    def _interpolated(
        self,
        domain: str,
        found: dict[int, list[SuiteResult]],
        row: Row,
        curve: dict[float, dict[str, list[SuiteResult]]],
    ) -> None:
        """WiSE-FT's row and curve in a domain; α is chosen on the seeds of the search, as every other setting."""
        assert self.grid.wise_ft is not None
        of_alpha = {
            alpha: {seed: results[1 + number] for seed, results in found.items()}
            for number, alpha in enumerate(self.grid.wise_ft.alphas)
        }
        searched = [seed for seed in self._seeds() if seed in found] or list(found)
        best = select({alpha: [validation_of(of_seed[s]) for s in searched] for alpha, of_seed in of_alpha.items()})
        row.results[domain] = {seed: result for seed, result in of_alpha[best].items()}
        row.settings[domain] = f"α {best:g}"
        for alpha, of_seed in of_alpha.items():
            curve.setdefault(alpha, {})[domain] = list(of_seed.values())


def _chosen(points: list[SearchPoint]) -> dict[tuple[str, str], Setting]:
    """(domain, method) → its setting with the best ID validation."""
    validation: dict[tuple[str, str], dict[Setting, list[float]]] = {}
    for point in points:
        validation.setdefault((point.domain, point.method), {})[point.setting] = point.validation
    return {key: select(of_settings) for key, of_settings in validation.items()}


def _values(search: dict[str, list[Any]]) -> str:
    return "; ".join(f"{key} in {', '.join(map(str, values))}" for key, values in search.items()) or "none"


def _report(comparison: Comparison, out: Path, console: Console) -> None:
    tables = tables_of(comparison)
    files = write_all(comparison, tables, draw(comparison), out)
    for table in tables:
        console.print(terminal(table, console.width))
    _show(console, comparison.notes)
    console.print(f"written: {', '.join(str(file) for file in files)}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {out / REPORT}", markup=False, highlight=False, soft_wrap=True)


def _show(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(f"· {line}", markup=False, highlight=False, soft_wrap=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=200)  # a file or a pipe: rich would guess 80 columns


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, a terminal that closes and Ctrl-C stop the trials, which save their state, and then us."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        raise Preempted("stopped; the same command goes on with what is missing") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
