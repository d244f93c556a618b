"""Runs a sweep: batch by batch, wave by wave, so that it can be interrupted anywhere."""

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from purejaxppo.config import Config, ConfigError, HParams, why_unread
from purejaxppo.host.configfile import RunSettings, Settings
from purejaxppo.host.load import task_of
from purejaxppo.host.loggers import binary_metrics
from purejaxppo.host.parallel import choose_spread, use_all_cores
from purejaxppo.host.program import enable_compilation_cache
from purejaxppo.host.run import check_scalars
from purejaxppo.host.rundir import SWEEP, Held
from purejaxppo.host.summary import METRICS_COLUMNS, SETTINGS_DIGEST, settings_digest
from purejaxppo.objectives.table import objective_of
from purejaxppo.sweeps import files
from purejaxppo.sweeps.files import PlannedBatch, PlannedWave, wave_directory
from purejaxppo.sweeps.onray import OnRay, cluster, leave_memory
from purejaxppo.sweeps.outcomes import Outcome, SweepResult, curve_columns, ranked, result_rows
from purejaxppo.sweeps.plan import Wave, filled, make_groups
from purejaxppo.sweeps.progress import SweepProgress
from purejaxppo.sweeps.report import write_report
from purejaxppo.sweeps.settings import Definition, SweepSettings, load_definition
from purejaxppo.sweeps.space import apply, space_texts
from purejaxppo.sweeps.strategies import Batch, Strategy, Trial, make_strategy
from purejaxppo.sweeps.trials import alone, last_hparams
from purejaxppo.sweeps.waves import Job, Local, Work, Workers, trial_rows
from purejaxppo.sweeps.winner import Winner, best_of, evaluate_again, write_winner
from purejaxppo.task import PartArguments, Task, as_task, own_class
from purejaxppo.types import TrainState


def sweep(
    config: Config | Task,
    space: Mapping[str, Any],
    *,
    hparams: HParams | None = None,
    strategy: Literal["random", "sobol", "optuna", "halving", "pbt"] = "random",
    trials: int = 16,
    batch: int = 16,
    eta: int = 3,
    rungs: int = 3,
    interval: int = 10,
    num_seeds: int = 1,
    seed: int = 0,
    devices: int = 0,
    run_dir: str | Path | None = None,
    eval_episodes: int = 128,
    checkpoint_every: float = 300.0,
    compilation_cache: bool = True,
    progress: bool = True,
    env: Any = None,
    env_params: Any = None,
    memory_gb: float = 0.0,
    engine: Literal["local", "ray"] = "local",
    wave_cpus: int = 1,
    wave_gpus: int = 0,
    wave_tpus: int = 0,
    **parts: Unpack[PartArguments],
) -> SweepResult:
    """Train every trial of a space with `num_seeds` seeds, select the best by its mean return in
    the final evaluation, and evaluate it again on fresh episodes.

    Trials of the same shapes share one compiled program. Seed s of each trial is seed s of `run`
    with its settings, bit for bit on CPU.

    Args:
        space: settings by name. Each value of a list is tried, in every combination; `uniform`,
            `loguniform` and `choice` are drawn from.
        hparams: hyperparameters that are not swept.
        strategy: how samples are drawn, see `SweepSettings.strategy`: random, sobol, optuna,
            halving (successive halving) or pbt (population-based training).
        trials: samples drawn, each tried at every point of the grid; with optuna all trials.
        batch: with optuna, trials that run side by side.
        eta: with halving, the best 1 / eta of the trials continue, eta times as long.
        rungs: with halving, the maximum number of selections.
        interval: with pbt, updates between exchanges.
        num_seeds: seeds (S) per trial.
        devices: how many to spread over; 0 takes all if there are enough trainings.
        run_dir: directory for `sweep.toml`, `results.csv`, `curves.npz`, `winner.toml`,
            `winner.json`, `report.html` and the waves; None writes nothing.
        checkpoint_every: seconds between checkpoints.
        seed, eval_episodes, compilation_cache, progress, env, env_params: as in `run`.
        memory_gb: memory on each device for trainings; trials that do not fit run one wave after
            the other. 0 takes half of the free memory.
        engine: where waves run: local, or ray (a Ray cluster, see `SweepSettings.engine`).
        wave_cpus, wave_gpus, wave_tpus: with ray, CPU cores, GPUs and TPU chips per wave.

    Raises:
        ConfigError: before anything is compiled or written, if the space or a setting cannot work.
        StorageError: as `run`.
        LostError: with engine = ray, if machines are lost too often.
    """
    task = as_task(
        config, "sweep", env=env, env_params=env_params, hparams=own_class(hparams), **parts
    )
    host = RunSettings(
        seed=seed, num_seeds=num_seeds, devices=devices, eval_episodes=eval_episodes,
        checkpoint_every=checkpoint_every, keep=1, passed=task.passed,
    )  # fmt: skip
    search = SweepSettings(
        *space_texts(space), strategy, trials, batch, eta, rungs, interval, memory_gb, engine,
        wave_cpus, wave_gpus, wave_tpus,
    )  # fmt: skip
    settings = Settings(task.config, task.hparams if hparams is None else hparams, host)
    definition = Definition(settings, search)
    found = start_sweep(
        definition, None if run_dir is None else Path(run_dir), task, progress=progress,
        compilation_cache=compilation_cache,
    )  # fmt: skip
    assert found is not None
    return found


def start_sweep(
    definition: Definition,
    directory: Path | None,
    task: Task | None = None,
    *,
    dry_run: bool = False,
    progress: bool = True,
    compilation_cache: bool = True,
) -> SweepResult | None:
    """`sweep`, for a definition as a file gives it; None if it is only planned (`dry_run`).

    Args:
        task: None makes the one that the config describes.
    """
    if not definition.sweep.space.names:
        raise ConfigError("the sweep changes nothing: give a grid, or something to sample")
    check_scalars(definition.settings.hparams, "sweep")
    if definition.sweep.strategy == "pbt" and definition.settings.run.num_seeds != 1:
        raise ConfigError(
            f"num_seeds = {definition.settings.run.num_seeds}: must be 1 with strategy = pbt, each "
            "of whose members has its own random numbers; set trials instead"
        )
    if definition.sweep.engine == "ray" and directory is None and not dry_run:
        raise ConfigError(
            "engine = ray: waves hand over their results in the run directory; give run_dir, on a "
            "disk that all machines share"
        )
    use_all_cores()
    leave_memory(definition.sweep)
    task = task_of(definition.settings, None, {}) if task is None else task
    # A named objective may have other defaults for settings left at auto.
    settings = dataclasses.replace(definition.settings, config=task.config)
    definition = dataclasses.replace(definition, settings=settings)
    _check_first_batch(definition, task)
    if compilation_cache:
        enable_compilation_cache()
    with ExitStack() as stack:
        stack.enter_context(cluster(definition.sweep))
        held = None
        if directory is not None and not dry_run:
            held = stack.enter_context(files.new_sweep(directory, definition))
        work = Work(definition, None if dry_run else directory, task)
        engine = _Engine(work, SweepProgress(definition, progress), held)
        return engine.plan_only() if dry_run else engine.run()


def resume_sweep(
    run_dir: str | Path,
    task: Task | None = None,
    *,
    progress: bool = True,
    compilation_cache: bool = True,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartArguments],
) -> SweepResult:
    """Resume a sweep that was stopped or killed. Finished waves are not repeated, and the current
    one continues from its newest checkpoint; the results are those of an undisturbed sweep, bit for
    bit if trials do not depend on each other.

    Args:
        task: the task passed to `sweep`, if one was.
        env, env_params, parts: those passed to `sweep`, if any were.

    Raises:
        ConfigError: if there is no sweep, or another process writes there.
        StorageError: as `run`.
    """
    directory = Path(run_dir)
    use_all_cores()
    if compilation_cache:
        enable_compilation_cache()
    with files.old_sweep(directory) as held, ExitStack() as stack:
        definition = load_definition(directory / SWEEP)
        leave_memory(definition.sweep)
        task = task_of(definition.settings, task, {"env": env, "env_params": env_params, **parts})
        stack.enter_context(cluster(definition.sweep))
        shown = SweepProgress(definition, progress)
        return _Engine(Work(definition, directory, task), shown, held).run()


def _check_first_batch(definition: Definition, task: Task) -> None:
    """Every setting of it, before anything is compiled."""
    batch = make_strategy(definition.sweep, definition.settings.run.seed).ask()
    groups = make_groups(definition.settings, batch.trials if batch else [])
    _check_effects(definition, [group.settings.config for group in groups])
    for group in groups:
        own = task.with_config(group.settings.config)
        if definition.sweep.engine == "local":
            wave = group.waves(filled(len(group.members), group.settings))[0]
            choose_spread(wave.settings, own)


def _check_effects(definition: Definition, configs: list[Any]) -> None:
    """Each hyperparameter that is swept has to matter to some trial."""
    configs = [config for config in configs if isinstance(config, Config)]
    for name in definition.sweep.space.names:
        if name not in HParams.__dataclass_fields__:
            continue
        reasons = [why_unread(config, name) for config in configs]
        controller = objective_of(definition.settings.config).kl if configs else None
        once = controller is not None and name in controller.read_once
        if definition.sweep.strategy == "pbt" and once:
            objective = definition.settings.config.objective
            reasons = [f"objective = {objective}, after the first update"]
        if reasons and all(reasons):
            raise ConfigError(
                f"{name} is swept, and has no effect with {reasons[0]}; leave it out, or choose "
                "settings that read it"
            )


@dataclass
class _Engine:
    work: Work
    shown: SweepProgress
    held: Held | None
    """The directory."""
    jobs: list[Job] = field(default_factory=list)
    """Waves begun, by their index."""
    latest: dict[int, tuple[Wave, int]] = field(default_factory=dict)
    """Of each trial, the wave that trained it last, and that wave's index."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Of the waves that are finished, by their index."""

    def __post_init__(self) -> None:
        self.definition, self.directory = self.work.definition, self.work.directory
        sweep, run = self.definition.sweep, self.definition.settings.run
        self.here = Local(self.work, self.shown)
        ray = sweep.engine == "ray"
        self.workers: Workers = OnRay(self.work, self.shown) if ray else self.here
        self.strategy: Strategy = make_strategy(sweep, run.seed)

    def plan_only(self) -> None:
        """Compile and print what the first batch would be."""
        if batch := self.strategy.ask():
            self._plan(batch)

    def run(self) -> SweepResult:
        batches = []
        if self.directory is not None:
            batches = files.read_plan(self.directory, self.definition)
            files.remove(self.directory / files.FINISHED)
        for planned in batches:
            self._train(planned)
        while batch := self.strategy.ask():
            planned = self._plan(batch)
            batches.append(planned)
            if self.directory is not None:
                self._check_directory()
                files.write_plan(self.directory, self.definition, batches)
            self._train(planned)
        return self._finish()

    def _plan(self, batch: Batch) -> PlannedBatch:
        """Compiles what the batch needs, to know what fits."""
        waves, rows = [], []
        groups = make_groups(self.definition.settings, batch.trials)
        for group in groups:
            cut, size = self.workers.cut(group)
            rows.append((group, len(cut), size))
            waves += [self._planned(wave, batch) for wave in cut]
        self.shown.batch(len(batch.trials), batch.share, rows)
        return PlannedBatch(batch, waves)

    def _planned(self, wave: Wave, batch: Batch) -> PlannedWave:
        total = wave.settings.config.num_updates
        before = {self.outcomes[t.number].updates for t in wave.trials if t.number in self.outcomes}
        last = total if batch.share == 1 else max(1, round(batch.share * total))
        numbers = [trial.number for trial in wave.trials]
        return PlannedWave(numbers, len(wave.settings.trials), max(before, default=0), last)

    def _train(self, planned: PlannedBatch) -> None:
        """All waves of a batch that are not finished; then tell the strategy."""
        left = []
        for job in self._jobs_of(planned):
            self.jobs.append(job)
            summary = self._finished(job)
            if summary is None:
                left.append(job)
            else:
                self._take(job, summary)
        self._check_directory()
        for job, summary in self.workers.train(left):
            self._take(job, summary)
            self._write_results()
        scores = [self.outcomes[trial.number].score for trial in planned.batch.trials]
        self.strategy.tell(planned.batch, np.asarray(scores))

    def _jobs_of(self, planned: PlannedBatch) -> list[Job]:
        trials, jobs = {trial.number: trial for trial in planned.batch.trials}, []
        for index, wave in enumerate(planned.waves, len(self.jobs)):
            members = [trials[number] for number in wave.numbers]
            (group,) = make_groups(self.definition.settings, members)
            before = {n: self.latest[n] for n in wave.numbers if n in self.latest}
            jobs.append(Job(index, wave, group.waves(wave.size)[0], before))
        return jobs

    def _finished(self, job: Job) -> dict[str, Any] | None:
        """The summary of a wave that an earlier process trained to its end."""
        if self.directory is None:
            return None
        directory = wave_directory(self.directory, job.index)
        summary = files.wave_outcome(directory)
        if summary and summary[SETTINGS_DIGEST] != settings_digest(job.wave.settings):
            raise files.damaged_wave(directory, "was trained with other settings than planned")
        return summary

    def _take(self, job: Job, summary: dict[str, Any]) -> None:
        seeds = self.definition.settings.run.num_seeds
        self.summaries[job.index] = summary
        failed = {int(row): entry["update"] for row, entry in summary["failed_seeds"].items()}
        means = np.array([np.nan if x is None else x for x in summary["eval_return_per_seed"]])
        means[list(failed)] = np.nan
        for i, trial in enumerate(self._with_last_values(job.wave, job.index)):
            rows = range(i * seeds, (i + 1) * seeds)
            own = {row - rows.start: failed[row] for row in rows if row in failed}
            returns = means[rows.start : rows.stop]
            self.outcomes[trial.number] = Outcome(trial, returns, own, job.planned.last, job.index)
            self.latest[trial.number] = (job.wave, job.index)

    def _with_last_values(self, wave: Wave, index: int) -> list[Trial]:
        """The wave's trials with the values that they ended with, which differ in a population."""
        sweep = self.definition.sweep
        if sweep.strategy != "pbt":
            return wave.trials
        states = self.here.states_after(index)
        ended = [
            last_hparams(sweep, began, states, i) for i, began in enumerate(wave.settings.trials)
        ]
        return [
            Trial(trial.number, {name: getattr(hparams, name) for name in sweep.space.names})
            for trial, hparams in zip(wave.trials, ended, strict=False)
        ]

    def _check_directory(self) -> None:
        if self.held is not None:
            self.held.check()

    def _write_results(self) -> bytes:
        """Write `results.csv` and return its content."""
        self._check_directory()
        rows = result_rows(self.outcomes, self.definition)
        content = files.results_text(rows).encode()
        if self.directory is not None:
            files.write(self.directory / files.RESULTS, content)
        return content

    def _finish(self) -> SweepResult:
        """Rebuild everything that is derived from the waves, whatever is there."""
        winner = self._winner()
        written = {files.RESULTS: self._write_results()}
        if self.directory is not None:
            written |= write_winner(self.directory, winner)
            written[files.CURVES] = files.curves_content(self._curves(self.directory))
            files.write(self.directory / files.CURVES, written[files.CURVES])
            files.write_finished(self.directory, written)
            write_report(self.directory)
        order = ranked(self.outcomes, self.definition)
        self.shown.best([(o.trial, o.score, float(np.min(o.returns))) for o in order])
        self.shown.finished(self.directory, None if winner is None else winner.table())
        settings = self.definition.settings if winner is None else winner.settings
        return SweepResult(
            outcomes=[self.outcomes[n] for n in sorted(self.outcomes)],
            best=None if winner is None else winner.outcome,
            tied=[] if winner is None else winner.tied,
            best_returns=np.zeros((0, 0)) if winner is None else winner.returns,
            config=settings.config,
            hparams=settings.hparams,
            _states=self._states,
        )

    def _winner(self) -> Winner | None:
        equals = best_of(self.outcomes, self.definition)
        if not equals:
            return None
        best, settings = equals[0], self.definition.settings
        wave, _ = self.latest[best.trial.number]
        _, hparams = apply(best.trial.values, settings.config, settings.hparams)
        own = alone(wave.settings, hparams, settings.run.num_seeds)
        with self.shown.evaluating():
            returns = evaluate_again(
                own, self._states(best.trial.number), self.work.task.with_config(own.config)
            )
        return Winner(best, [other.trial.number for other in equals[1:]], own, returns)

    def _states(self, number: int) -> TrainState:
        """States `[S, ...]` of a trial."""
        wave, index = self.latest[number]
        position = [trial.number for trial in wave.trials].index(number)
        seeds = self.definition.settings.run.num_seeds
        return trial_rows(self.here.states_after(index), position, seeds)

    def _curves(self, directory: Path) -> list[dict[str, np.ndarray]]:
        seeds = self.definition.settings.run.num_seeds
        parts = []
        for job in self.jobs:
            wave = wave_directory(directory, job.index)
            content = files.binary_content(wave, self.summaries[job.index])
            columns = self.summaries[job.index][METRICS_COLUMNS]
            metrics = binary_metrics(content, columns, job.wave.settings.num_trainings)
            parts.append(curve_columns(metrics, job.planned.numbers, seeds, job.planned.first))
        return parts
