"""Run a sweep batch by batch and wave by wave, so that it can be interrupted anywhere."""

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from purejaxppo.config import ConfigError, HParams, TaskConfig
from purejaxppo.host.configfile import RunSettings, Settings
from purejaxppo.host.load import task_of
from purejaxppo.host.loggers import binary_metrics
from purejaxppo.host.parallel import choose_spread, use_all_cores
from purejaxppo.host.program import enable_compilation_cache
from purejaxppo.host.run import check_scalars
from purejaxppo.host.rundir import SWEEP, Held
from purejaxppo.host.summary import METRICS_COLUMNS, SETTINGS_DIGEST, settings_digest
from purejaxppo.sweeps import files
from purejaxppo.sweeps.files import PlannedBatch, PlannedWave, wave_directory
from purejaxppo.sweeps.onray import OnRay, cluster, disable_preallocation
from purejaxppo.sweeps.outcomes import Outcome, SweepResult, curve_columns, ranked, result_rows
from purejaxppo.sweeps.plan import Wave, make_groups, padded_count
from purejaxppo.sweeps.progress import SweepProgress
from purejaxppo.sweeps.report import write_report
from purejaxppo.sweeps.settings import Definition, SweepSettings, load_definition
from purejaxppo.sweeps.space import apply, space_texts
from purejaxppo.sweeps.strategies import Batch, Strategy, Trial, make_strategy
from purejaxppo.sweeps.trials import final_hparams, single_trial_settings
from purejaxppo.sweeps.waves import Job, Local, Work, Workers, trial_rows
from purejaxppo.sweeps.winner import Winner, best_trials, evaluate_on_fresh_episodes, write_winner
from purejaxppo.task import PartArguments, Task, as_task, own_class
from purejaxppo.types import TrainState


def sweep(
    config: TaskConfig | Task,
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
    """Train every trial of a search space, and evaluate the best one again on fresh episodes.

    Each trial has `num_seeds` seeds. The best is selected by its mean return in the final
    evaluation.

    Trials of the same shapes share one compiled program. Seed s of each trial equals seed s of
    `run` with the trial's settings, bit for bit on CPU. Arguments that are not listed are as in
    `run`.

    Args:
        space: values to search, by setting name. Lists are tried in every combination; `uniform`,
            `loguniform` and `choice` are sampled.
        hparams: hyperparameters that are not swept.
        strategy: search strategy, see `SweepSettings.strategy`: random, sobol, optuna, halving
            (successive halving) or pbt (population-based training).
        trials: number of samples, each tried at every point of the grid; with optuna, number of
            trials.
        batch: with optuna, trials that run in parallel.
        eta: with halving, the best 1 / eta of the trials continue for eta times as many updates.
        rungs: with halving, maximum number of selections.
        interval: with pbt, updates between replacements.
        num_seeds: seeds (S) per trial.
        devices: number of devices to use; 0 uses all if there are enough runs.
        run_dir: directory for `sweep.toml`, `results.csv`, `curves.npz`, `winner.toml`,
            `winner.json`, `report.html` and the waves; None writes nothing.
        checkpoint_every: seconds between checkpoints.
        memory_gb: memory to use on each device, in GB; trials that do not fit run in several waves,
            one after the other. 0 uses half of the free memory.
        engine: where waves run: local, or ray (a Ray cluster, see `SweepSettings.engine`).
        wave_cpus: with ray, CPU cores per wave.
        wave_gpus: with ray, GPUs per wave.
        wave_tpus: with ray, TPU chips per wave.
        **parts: see `make_task`.

    Raises:
        ConfigError: if the space or a setting is invalid, before anything is compiled or written.
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
    """Run the sweep that a definition describes; with `dry_run`, only print the plan (None).

    Args:
        task: the task to train; None builds it from the config.
    """
    if not definition.sweep.space.names:
        raise ConfigError(
            "nothing to sweep; add --grid or --sample (in Python, give a non-empty space)"
        )
    check_scalars(definition.settings.hparams, "sweep")
    if definition.sweep.strategy == "pbt" and definition.settings.run.num_seeds != 1:
        raise ConfigError(
            f"num_seeds = {definition.settings.run.num_seeds}: must be 1 with strategy = pbt; "
            "its members have their own random numbers; set trials instead"
        )
    if definition.sweep.engine == "ray" and directory is None and not dry_run:
        raise ConfigError(
            "engine = ray: waves pass their results through the run directory; give run_dir, on a "
            "disk that all machines share"
        )
    use_all_cores()
    disable_preallocation(definition.sweep)
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
    """Resume a sweep that was stopped or killed.

    Finished waves are not repeated; the current one continues from its newest checkpoint. The
    results equal those of an uninterrupted sweep, bit for bit if trials are independent.

    Args:
        task: the task passed to `sweep`, if one was.
        env: the environment passed to `sweep`, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to `sweep`.

    Raises:
        ConfigError: if the directory holds no sweep, or another process is writing there.
        StorageError: as `run`.
    """
    directory = Path(run_dir)
    use_all_cores()
    if compilation_cache:
        enable_compilation_cache()
    with files.existing_sweep(directory) as held, ExitStack() as stack:
        definition = load_definition(directory / SWEEP)
        disable_preallocation(definition.sweep)
        task = task_of(definition.settings, task, {"env": env, "env_params": env_params, **parts})
        stack.enter_context(cluster(definition.sweep))
        reports = SweepProgress(definition, progress)
        return _Engine(Work(definition, directory, task), reports, held).run()


def _check_first_batch(definition: Definition, task: Task) -> None:
    """Check all settings of the first batch before anything is compiled."""
    batch = make_strategy(definition.sweep, definition.settings.run.seed).ask()
    groups = make_groups(definition.settings, batch.trials if batch else [])
    _check_effects(definition, [group.settings.config for group in groups])
    for group in groups:
        own = task.with_config(group.settings.config)
        if definition.sweep.engine == "local":
            wave = group.waves(padded_count(len(group.members), group.settings))[0]
            choose_spread(wave.settings, own)


def _check_effects(definition: Definition, configs: list[Any]) -> None:
    """Raise `ConfigError` if a swept hyperparameter has no effect in any trial."""
    settings, pbt = definition.settings, definition.sweep.strategy == "pbt"
    for name in definition.sweep.space.names:
        if name not in {f.name for f in dataclasses.fields(settings.hparams)}:
            continue
        reasons = [config.why_unread(name) for config in configs]
        if pbt and name in settings.config.read_once:
            reasons = [f"objective = {settings.config.objective}, after the first update"]
        if reasons and all(reasons):
            raise ConfigError(
                f"{name} is swept, and has no effect with {reasons[0]}; leave it out, or choose "
                "settings that read it"
            )


@dataclass
class _Engine:
    work: Work
    progress: SweepProgress
    held: Held | None
    """Lock of the directory."""
    jobs: list[Job] = field(default_factory=list)
    """All waves of the batches so far, by index."""
    latest: dict[int, tuple[Wave, int]] = field(default_factory=dict)
    """For each trial, the wave that trained it last, and that wave's index."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Summaries of the finished waves, by wave index."""

    def __post_init__(self) -> None:
        self.definition, self.directory = self.work.definition, self.work.directory
        sweep, run = self.definition.sweep, self.definition.settings.run
        self.local = Local(self.work, self.progress)
        ray = sweep.engine == "ray"
        self.workers: Workers = OnRay(self.work, self.progress) if ray else self.local
        self.strategy: Strategy = make_strategy(sweep, run.seed)

    def plan_only(self) -> None:
        """Compile the first batch and print its plan."""
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
        """Compile the batch's programs to find out how many trials fit in a wave."""
        waves, rows = [], []
        groups = make_groups(self.definition.settings, batch.trials)
        for group in groups:
            parts, size = self.workers.split(group)
            rows.append((group, len(parts), size))
            waves += [self._planned(wave, batch) for wave in parts]
        self.progress.batch(len(batch.trials), batch.share, rows)
        return PlannedBatch(batch, waves)

    def _planned(self, wave: Wave, batch: Batch) -> PlannedWave:
        total = wave.settings.config.num_updates
        before = {self.outcomes[t.number].updates for t in wave.trials if t.number in self.outcomes}
        last = total if batch.share == 1 else max(1, round(batch.share * total))
        numbers = [trial.number for trial in wave.trials]
        return PlannedWave(numbers, len(wave.settings.trials), max(before, default=0), last)

    def _train(self, planned: PlannedBatch) -> None:
        """Train the unfinished waves of a batch, then tell the strategy the returns."""
        left = []
        for job in self._jobs_of(planned):
            self.jobs.append(job)
            summary = self._finished(job)
            if summary is None:
                left.append(job)
            else:
                self._record(job, summary)
        self._check_directory()
        for job, summary in self.workers.train(left):
            self._record(job, summary)
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
        """The summary of a wave that an earlier process finished; None if it is not finished."""
        if self.directory is None:
            return None
        directory = wave_directory(self.directory, job.index)
        summary = files.finished_summary(directory)
        if summary and summary[SETTINGS_DIGEST] != settings_digest(job.wave.settings):
            raise files.damaged_wave(directory, "was trained with other settings than planned")
        return summary

    def _record(self, job: Job, summary: dict[str, Any]) -> None:
        seeds = self.definition.settings.run.num_seeds
        self.summaries[job.index] = summary
        failed = {int(row): entry["update"] for row, entry in summary["failed_seeds"].items()}
        means = np.array([np.nan if x is None else x for x in summary["eval_return_per_seed"]])
        means[list(failed)] = np.nan
        for i, trial in enumerate(self._with_final_values(job.wave, job.index)):
            rows = range(i * seeds, (i + 1) * seeds)
            own = {row - rows.start: failed[row] for row in rows if row in failed}
            returns = means[rows.start : rows.stop]
            self.outcomes[trial.number] = Outcome(trial, returns, own, job.planned.last, job.index)
            self.latest[trial.number] = (job.wave, job.index)

    def _with_final_values(self, wave: Wave, index: int) -> list[Trial]:
        """The wave's trials with their final values; only those of a population change."""
        sweep = self.definition.sweep
        if sweep.strategy != "pbt":
            return wave.trials
        states = self.local.states_after(index)
        ended = [
            final_hparams(sweep, began, states, i) for i, began in enumerate(wave.settings.trials)
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
        """Rebuild all files that are derived from the waves, even if they exist already."""
        winner = self._winner()
        written = {files.RESULTS: self._write_results()}
        if self.directory is not None:
            written |= write_winner(self.directory, winner)
            written[files.CURVES] = files.curves_content(self._curves(self.directory))
            files.write(self.directory / files.CURVES, written[files.CURVES])
            files.write_finished(self.directory, written)
            write_report(self.directory)
        order = ranked(self.outcomes, self.definition)
        self.progress.best([(o.trial, o.score, float(np.min(o.returns))) for o in order])
        self.progress.finished(self.directory, None if winner is None else winner.table())
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
        tied = best_trials(self.outcomes, self.definition)
        if not tied:
            return None
        best, settings = tied[0], self.definition.settings
        wave, _ = self.latest[best.trial.number]
        _, hparams = apply(best.trial.values, settings.config, settings.hparams)
        own = single_trial_settings(wave.settings, hparams, settings.run.num_seeds)
        with self.progress.evaluating():
            returns = evaluate_on_fresh_episodes(
                own, self._states(best.trial.number), self.work.task.with_config(own.config)
            )
        return Winner(best, [other.trial.number for other in tied[1:]], own, returns)

    def _states(self, number: int) -> TrainState:
        """States `[S, ...]` of a trial."""
        wave, index = self.latest[number]
        position = [trial.number for trial in wave.trials].index(number)
        seeds = self.definition.settings.run.num_seeds
        return trial_rows(self.local.states_after(index), position, seeds)

    def _curves(self, directory: Path) -> list[dict[str, np.ndarray]]:
        seeds = self.definition.settings.run.num_seeds
        parts = []
        for job in self.jobs:
            wave = wave_directory(directory, job.index)
            content = files.metrics_content(wave, self.summaries[job.index])
            columns = self.summaries[job.index][METRICS_COLUMNS]
            metrics = binary_metrics(content, columns, job.wave.settings.num_runs)
            parts.append(curve_columns(metrics, job.planned.numbers, seeds, job.planned.first))
        return parts
