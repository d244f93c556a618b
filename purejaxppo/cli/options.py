"""The options of each command, in the groups shown by `--help`."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from purejaxppo.cli.arguments import Switch
from purejaxppo.config import AUTO, Config, HParams
from purejaxppo.host.configfile import RunSettings
from purejaxppo.rlhf.config import NEVER_READ, DecoderConfig, RLHFConfig, RLHFHParams
from purejaxppo.rlhf.table import TOKEN_OBJECTIVES
from purejaxppo.rlhf.text_config import (
    DPOConfig,
    RewardConfig,
    SFTConfig,
    TextConfig,
    TextHParams,
)
from purejaxppo.sweeps.settings import SweepSettings

_Positional = tyro.conf.Positional


@dataclass
class ProcessFlags:
    """Options for training one run in several processes, on one or more machines."""

    coordinator: str | None = None
    """HOST:PORT of process 0, to which the others connect; pass the same to all processes."""
    num_processes: int = 1
    """Number of processes."""
    process_id: int = 0
    """Index of this process, from 0; process 0 writes and reports."""
    wait_seconds: float = 60.0
    """Seconds to wait for the other processes to connect."""


@dataclass
class Outputs:
    """Output options of a run."""

    run_dir: Path | None = None
    """Directory to write to; must not contain a run yet. None uses runs/ENV_ID/DATE-TIME."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the effective settings as a config file and stop."""


@dataclass
class SweepOutputs(Outputs):
    """Output options of a sweep."""

    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile, print the plan and stop."""


_RUN_OF_SWEEP = "seed num_seeds devices eval_episodes checkpoint_every"
_FIRST = (
    "task data total_timesteps num_envs num_steps num_prompts group_size response_length objective "
    "learning_rate gamma ent_coef kl_coef num_seeds seed"
)
_GROUPS = {
    "common": f"{_FIRST} run_dir",
    "search": " ".join(f.name for f in dataclasses.fields(SweepSettings)),
    "environment": (
        "env_id randomize frame_stack action_repeat sticky_actions time_limit obs_clip reward_clip "
        "opponent opponent_pool opponent_every"
    ),
    "text": (
        "tokenizer init start reward reward_combine retokenize held_out bad_lines loss loss_on "
        "batch_rows row_length accumulation warmup"
    ),
    "algorithm": (
        "oversampling overlong_buffer averaging kl_in kl_estimator kl_control whiten_rewards "
        "advantage bootstrap_steps bootstrap_time_limits baseline causality discount_weight "
        "update_epochs num_minibatches advantage_normalization normalize_obs normalize_reward "
        "lr_schedule clip_schedule optimizer cg_iterations line_search_steps"
    ),
    "network": (
        "network encoder memory hidden_sizes memory_size memory_window memory_layers memory_heads "
        "activation shared_trunk "
        "action_distribution log_std_init num_layers width num_heads num_kv_heads mlp_width "
        "positions norm tied_embeddings context critic critic_init"
    ),
    "hyperparameter": " ".join(
        dict.fromkeys(
            f.name
            for table in (HParams, RLHFHParams, TextHParams)
            for f in dataclasses.fields(table)
        )
    ),
    "run": (
        "eval_episodes eval_every eval_unit checkpoint_every checkpoint_unit keep tensorboard "
        "wandb loggers compilation_cache print_config dry_run"
    ),
    "device": "devices coordinator num_processes process_id wait_seconds",
}
"""Groups of settings in `--help`; a name in several groups is shown in the first."""
_NOT_OPTIONS = ("passed", "env_params", "task_params")


@dataclass
class Resume:
    """Resume a run or sweep that was stopped or killed, or extend a finished run.

    The results equal those of an uninterrupted run, bit for bit. Damaged checkpoints are skipped. A
    finished run is not changed, unless --total-timesteps extends it.
    """

    run_dir: _Positional[Path]
    """A directory that `train` or `sweep` wrote."""
    trial: str | None = None
    """Of a finished sweep: continue this trial (`best` or its number) as a separate run."""
    seed: int | None = None
    """With --trial: continue only this seed, counted from 0."""
    total_timesteps: int | None = None
    """New length of the run; schedules then run over the new length."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""
    processes: Annotated[ProcessFlags, tyro.conf.arg(name="process")] = dataclasses.field(
        default_factory=ProcessFlags
    )


@dataclass
class Eval:
    """Evaluate a checkpoint of a run, or a trial of a sweep, on fresh episodes."""

    run_dir: _Positional[Path]
    """A directory that `train` or `sweep` wrote."""
    trial: str | None = None
    """Of a sweep: trial to use, `best` or its number; None uses the best."""
    seed: int | None = None
    """Evaluate only this seed, counted from 0; None evaluates all."""
    checkpoint: str = "newest"
    """Of a run: `newest`, `best` (by evaluation), or a number of updates."""
    episodes: int = 128
    """Episodes per seed."""
    deterministic: tyro.conf.FlagCreatePairsOff[bool] = False
    """Use the policy's most likely action instead of sampling."""
    eval_seed: int = 0
    """Random seed of the evaluation."""
    grid: str | None = None
    """Evaluate with each of these values of a parameter of the environment, such as
    masspole=0.05,0.1,0.5, and draw the returns in `grid_<name>.png`."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""


@dataclass
class Export:
    """Export a policy as StableHLO, for programs that have JAX but not this package."""

    run_dir: _Positional[Path]
    """A directory that `train` or `sweep` wrote."""
    file: _Positional[Path]
    """The file to write; must not exist yet."""
    trial: str | None = None
    """Of a sweep: trial to use, `best` or its number; None uses the best."""
    seed: int = 0
    """Export the policy of this seed, counted from 0."""
    checkpoint: str = "newest"
    """Of a run: `newest`, `best` (by evaluation), or a number of updates."""
    sample: tyro.conf.FlagCreatePairsOff[bool] = False
    """Sample actions with a key from the caller instead of using the most likely action."""


@dataclass
class Render:
    """Render episodes of a policy as a GIF or MP4 file, or as a page with the run's results.

    purejaxppo render runs/first first.gif
    """

    run_dir: _Positional[Path]
    """A directory that `train` or `sweep` wrote."""
    file: _Positional[Path]
    """The file to write, .gif, .mp4 or .html; must not exist yet."""
    trial: str | None = None
    """Of a sweep: trial to use, `best` or its number; None uses the best."""
    seed: int = 0
    """Render the policy of this seed, counted from 0."""
    checkpoint: str = "newest"
    """Of a run: `newest`, `best` (by evaluation), or a number of updates."""
    episodes: int = 3
    """Number of episodes."""
    max_steps: int | None = None
    """Maximum number of steps of an episode; None uses the environment's time limit, or 1,000 steps
    if it has none."""
    deterministic: tyro.conf.FlagCreatePairsOff[bool] = False
    """Use the policy's most likely action instead of sampling."""
    rollout_seed: int = 0
    """Random seed of the episodes."""
    fps: int | None = None
    """Images per second; at most 50, except for MP4. There is one image per step. None uses 30, and
    2 for board games."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""


@dataclass
class Plot:
    """Redraw the plots of a sweep and report.html, which contains them all."""

    run_dir: _Positional[Path]
    """A directory that `sweep` wrote."""


@dataclass
class Envs:
    """List environments, with their observations and actions, or say all about one."""

    pattern: _Positional[str] = ""
    """A name, a part of names, or a suite's prefix such as `jumanji/`. Without it, gymnax's
    environments and the suites are listed."""


@dataclass
class Generate:
    """Generate text with the policy of a run that `rlhf` wrote."""

    run_dir: _Positional[Path]
    """A directory that `rlhf` wrote."""
    prompt: str | None = None
    """One prompt."""
    prompts: Path | None = None
    """A file with one prompt per line."""
    num_responses: int = 1
    """Responses per prompt."""
    best_of: int = 1
    """Generate best_of * num_responses responses per prompt, and print those with the highest
    scores."""
    greedy: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take the most likely token instead of sampling."""
    temperature: float = 1.0
    """Sampling temperature, which divides the logits."""
    top_k: int = 0
    """Sample only from this many most likely tokens; 0 samples from all."""
    top_p: float = 1.0
    """Sample only from the most likely tokens with this total probability."""
    max_tokens: int | None = None
    """Maximum length of a response; None uses the run's response_length."""
    seed: int = 0
    """Use the policy of this seed, counted from 0."""
    generation_seed: int = 0
    """Random seed of the responses."""
    checkpoint: str = "newest"
    """`newest`, `best` (by evaluation), or a number of updates."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object per response."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""


@dataclass
class Score:
    """Score texts with a reward model that `rlhf reward` trained."""

    run_dir: _Positional[Path]
    """A directory that `rlhf reward` wrote."""
    prompt: str | None = None
    """One prompt; needs --response."""
    response: str | None = None
    """The response to score."""
    data: Path | None = None
    """A JSON Lines file with prompt and completion on each line."""
    combine: Literal["mean", "min", "mean_minus_variance"] = "mean"
    """How the scores of several seeds (an ensemble) are combined."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object per text."""


@dataclass
class Evaluate:
    """Evaluate a policy on held-out prompts, and compare it with its reference or a different run.

    purejaxppo rlhf evaluate runs/aligned

    Prints the mean score, the share of exact answers and pass@k if answers can be exact, the win
    rate, the KL divergence from the reference, and best-of-n of the reference. Intervals are over
    prompts.
    """

    run_dir: _Positional[Path]
    """A directory that `rlhf`, `rlhf sft` or `rlhf dpo` wrote."""
    against: str | None = None
    """`reference`, or the directory of a different run. None uses the reference if the run has one:
    that of its KL penalty, or the run that `rlhf sft` started from."""
    reward: Path | None = None
    """Directory of a reward model, whose scores are reported instead of the task's own."""
    combine: Literal["mean", "min", "mean_minus_variance"] = "mean"
    """With --reward: how the scores of several seeds (an ensemble) are combined."""
    prompts: Path | None = None
    """A JSON Lines file with prompts; None uses the held-out prompts of the run."""
    num_prompts: int | None = None
    """Use only this many prompts, the first ones; None uses all."""
    num_responses: int = 16
    """Responses per prompt."""
    k: tuple[int, ...] = ()
    """Values of k for pass@k, such as 1,4,16; at most num_responses. By default those of 1, 4 and
    16, if answers can be exact."""
    best_of: tuple[int, ...] = (1, 4, 16, 64)
    """Values of n for best-of-n; the reference generates as many responses to each prompt."""
    temperature: float = 1.0
    """Sampling temperature of all policies, which divides the logits."""
    max_tokens: int | None = None
    """Of `rlhf sft` and `rlhf dpo`: maximum length of a response; None uses 64, or less if the
    context is shorter."""
    seed: int = 0
    """Use the policy of this seed, counted from 0."""
    generation_seed: int = 0
    """Random seed of the responses."""
    checkpoint: str = "newest"
    """`newest`, `best` (by evaluation), or a number of updates."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder."""


@dataclass
class Refresh:
    """Tune a policy in rounds: train a reward model, continue the policy against it, and label its
    responses for the next reward model.

    purejaxppo rlhf refresh aligned reward --init runs/sft --label gold --run-dir runs/refresh
    """

    policy: _Positional[str]
    """Config file or name of a shipped config of the policy (kind rlhf). Each round trains it for
    its total_timesteps."""
    reward: _Positional[str]
    """Config file or name of a shipped config of the reward model (kind reward). Its data are the
    pairs of the first round."""
    run_dir: Path
    """Directory for the runs of all rounds."""
    init: str = ""
    """Replaces init of the policy config."""
    data: str = ""
    """Replaces data of the reward config."""
    label: str = "none"
    """How new pairs are labelled. gold: by the task's own score, with random errors. A function,
    package.module:name, of (prompts, first, second): whether the first completion is better. none:
    the pairs are written to a file, and the command stops until you have labelled them."""
    rounds: int = 3
    """Number of rounds."""
    pairs: int = 500
    """New pairs per round."""
    num_reward_seeds: int = 1
    """Members of the reward ensemble of each round."""
    seed: int = 0
    """Base random seed."""


class Setting(typing.NamedTuple):
    """An option generated from a field of a settings class."""

    hint: Any
    default: Any
    field: Any


def _settings(*tables: Any) -> dict[str, Setting]:
    found = {}
    for table in tables:
        hints = typing.get_type_hints(table, include_extras=True)
        for f in dataclasses.fields(table):
            if f.name not in _NOT_OPTIONS:
                has_auto = f.default == AUTO and hints[f.name] is int
                hint = int | Literal["auto"] if has_auto else hints[f.name]
                found.setdefault(f.name, Setting(hint, f.default, f))
    return found


_CONFIG_HELP = (
    "A config file (TOML), the name of a shipped config (cartpole), or an environment "
    "(CartPole-v1). Options override it. --env-params.NAME VALUE sets a parameter of the "
    "environment, as in --env-params.max-steps-in-episode 200."
)
_TASK_HELP = (
    'A config file (TOML) with kind = "rlhf", the name of a shipped config (sort) or task '
    "(countdown), package.module:name of your own task, or a JSON Lines file with prompts "
    "(.jsonl). Options override it. --task-params.NAME VALUE sets an argument of the task, as in "
    "--task-params.longest 5."
)


def _command(
    name: str, doc: str, settings: Mapping[str, Setting], config_help: str = _CONFIG_HELP
) -> Any:
    """A dataclass with a positional argument and one nested dataclass per group of settings."""
    positional = Annotated[_Positional[str | None], tyro.conf.arg(metavar="[CONFIG]")]
    fields: list[Any] = [
        ("config", positional, dataclasses.field(default=None, metadata={"help": config_help}))
    ]
    left = dict(settings)
    for group, names in _GROUPS.items():
        own = {n: left.pop(n) for n in names.split() if n in left}
        if own:
            fields.append((group, _group(group, own), dataclasses.field(default=None)))
    assert not left, f"options in no group: {sorted(left)}"
    made: Any = dataclasses.make_dataclass(name, fields)
    made.__doc__ = doc
    return made


def _group(name: str, settings: Mapping[str, Setting]) -> Any:
    fields: list[Any] = []
    for key, setting in settings.items():
        append = typing.get_origin(setting.hint) is tuple and setting.hint == tuple[str, ...]
        hint = tyro.conf.UseAppendAction[setting.hint] if append else setting.hint
        made = dataclasses.field(default=setting.default, metadata={"source": setting.field})
        fields.append((key, hint, made))
    table: Any = dataclasses.make_dataclass(name.title(), fields)
    table.__doc__ = None
    return table


TRAIN_SETTINGS = _settings(Config, HParams, RunSettings, Outputs, ProcessFlags)


def _read(settings: dict[str, Setting]) -> dict[str, Setting]:
    """Without the hyperparameters that no language model reads."""
    return {name: x for name, x in settings.items() if name not in NEVER_READ}


def _text_settings(config: Any, *others: Any) -> dict[str, Setting]:
    """The options of a run on texts, with only the hyperparameters that it reads."""
    unread = {f.name for f in dataclasses.fields(TextHParams)} - {*config().reads}
    found = _settings(config, TextHParams, *others)
    return {name: x for name, x in found.items() if name not in unread}


RLHF_SETTINGS = _read(_settings(RLHFConfig, RLHFHParams, RunSettings, Outputs, ProcessFlags))
_OF_SWEEPS = {
    name: setting
    for name, setting in _settings(RunSettings).items()
    if name in _RUN_OF_SWEEP.split()
}
SWEEP_SETTINGS = _settings(Config, HParams, SweepSettings, SweepOutputs) | _OF_SWEEPS
RLHF_SWEEP_SETTINGS = (
    _read(_settings(RLHFConfig, RLHFHParams, SweepSettings, SweepOutputs)) | _OF_SWEEPS
)
Train = _command(
    "Train",
    "Train an agent and write the results to a run directory.\n\n"
    "purejaxppo train CartPole-v1\n\npurejaxppo train cartpole --num-seeds 8 --learning-rate 1e-3",
    TRAIN_SETTINGS,
)
Sweep = _command(
    "Sweep",
    "Train with many settings, several seeds each, and find the best.\n\n"
    "purejaxppo sweep cartpole --num-seeds 4 --trials 8 --grid num_envs=4,16 --sample "
    "learning_rate=loguniform:1e-4,1e-2 trains 8 samples at each point of the grid. A config file "
    "may have a table [sweep]. The plan is printed first.",
    SWEEP_SETTINGS,
)
RLHF = _command(
    "RLHF",
    "Train a language model to maximise a score and write the results to a run directory.\n\n"
    "purejaxppo rlhf sort --objective grpo\n\n"
    "Objectives, with the advantage A:\n\n"
    + "\n".join(f"  {x.name}: {x.objective.maximises}" for x in TOKEN_OBJECTIVES.values()),
    RLHF_SETTINGS,
    _TASK_HELP,
)  # fmt: skip
RLHFSweep = _command(
    "RLHFSweep",
    "Train a language model with many settings, several seeds each, and find the best.\n\n"
    "purejaxppo sweep sort --trials 8 --sample learning_rate=loguniform:1e-4,1e-2",
    RLHF_SWEEP_SETTINGS,
    _TASK_HELP,
)
_TEXT_HELP = (
    'A config file (TOML) with kind = "{kind}", the name of a shipped config, a JSON Lines file, '
    "or letters for the example data. Options override it."
)
_TEXT_DOCS = {
    "sft": (
        SFTConfig,
        "Fine-tune a language model on demonstrations: JSON Lines with prompt and completion.",
    ),
    "reward": (
        RewardConfig,
        "Train a reward model on preferences: JSON Lines with prompt, chosen and rejected. Several "
        "seeds are an ensemble.",
    ),
    "dpo": (
        DPOConfig,
        "Train a policy on preferences by direct preference optimisation: JSON Lines with prompt, "
        "chosen and rejected.",
    ),
}
TEXT_COMMANDS = {
    f"rlhf {kind}": _command(
        f"{kind.upper()}Run",
        f"{doc}\n\npurejaxppo rlhf {kind} letters --learning-rate 1e-3",
        _text_settings(config, RunSettings, Outputs, ProcessFlags),
        _TEXT_HELP.format(kind=kind),
    )
    for kind, (config, doc) in _TEXT_DOCS.items()
}
"""Commands of runs on texts, by their two words."""
TEXT_SWEEPS = {
    kind: _command(
        f"{kind.upper()}Sweep",
        f"{doc}\n\nTrains with many settings, several seeds each, and finds the best.",
        _text_settings(config, SweepSettings, SweepOutputs) | _OF_SWEEPS,
        _TEXT_HELP.format(kind=kind),
    )
    for kind, (config, doc) in _TEXT_DOCS.items()
}
SETTINGS_OF = {
    Train: (Config, HParams), Sweep: (Config, HParams),
    RLHF: (RLHFConfig, RLHFHParams), RLHFSweep: (RLHFConfig, RLHFHParams),
    **{TEXT_COMMANDS[f"rlhf {k}"]: (config, TextHParams) for k, (config, _) in _TEXT_DOCS.items()},
    **{TEXT_SWEEPS[k]: (config, TextHParams) for k, (config, _) in _TEXT_DOCS.items()},
}  # fmt: skip
"""The classes of the config and the hyperparameters of each command in `GENERATED`."""
GENERATED = tuple(SETTINGS_OF)
"""Commands whose options are settings."""
COMMANDS = {
    "train": Train,
    "sweep": Sweep,
    "rlhf": RLHF,
    **TEXT_COMMANDS,
    "rlhf refresh": Refresh,
    "rlhf score": Score,
    "rlhf evaluate": Evaluate,
    "generate": Generate,
    "resume": Resume,
    "eval": Eval,
    "export": Export,
    "render": Render,
    "plot": Plot,
    "envs": Envs,
}


def flags_of(command: Any) -> dict[str, Any]:
    """The type of each option of a command, by its name."""
    hints = typing.get_type_hints(command, include_extras=True)
    plain, found = typing.get_type_hints(command), {}
    for name, hint in plain.items():
        if dataclasses.is_dataclass(hint):
            found |= flags_of(hint)
        elif hints[name] == hint or tyro.conf.Positional[hint] != hints[name]:
            only_on = hints[name] == tyro.conf.FlagCreatePairsOff[bool]
            found[name] = Switch if only_on else hint
    found.pop("config", None)
    return found


def with_defaults(command: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a command in `GENERATED` whose settings have these values as defaults."""
    groups = {}
    for f in dataclasses.fields(command):
        if f.name != "config":
            table: Any = f.type
            own = {x.name: values.get(x.name, x.default) for x in dataclasses.fields(table)}
            groups[f.name] = table(**own)
    return command(config=None, **groups)


def values_of(parsed: Any) -> dict[str, Any]:
    """The settings of a parsed command in `GENERATED`, by name."""
    groups = [value for name, value in vars(parsed).items() if name != "config"]
    return {name: value for group in groups for name, value in vars(group).items()}


def pick(values: Mapping[str, Any], table: Any) -> dict[str, Any]:
    """The values that are fields of a settings class."""
    names = {f.name for f in dataclasses.fields(table)}
    return {name: value for name, value in values.items() if name in names}


def join_help_lines() -> None:
    """Set each option's help to its docstring in one line; tyro would keep the line breaks.

    Takes 0.15 s, so it is called only if help is shown.
    """
    from docstring_parser import parse_from_object

    tables = (
        Config, HParams, DecoderConfig, RLHFConfig, RLHFHParams, TextConfig, SFTConfig,
        RewardConfig, DPOConfig, TextHParams, RunSettings, SweepSettings, ProcessFlags,
        Outputs, SweepOutputs,
    )  # fmt: skip
    texts = {}
    for table in (*tables, Resume, Eval, Export, Render, Plot, Generate, Refresh, Score, Evaluate):
        own = {p.arg_name: p.description for p in parse_from_object(table).params}
        for f in dataclasses.fields(table):
            if f.name in own:
                texts[(table, f.name)] = " ".join((own[f.name] or "").split())
                f.metadata = MappingProxy({**f.metadata, "help": texts[(table, f.name)]})
    for command in GENERATED:
        groups: list[Any] = [f.type for f in dataclasses.fields(command) if f.name != "config"]
        for group in groups:
            for f in dataclasses.fields(group):
                f.metadata = MappingProxy({**f.metadata, **_help_of(f.metadata["source"])})


def _help_of(source: Any) -> dict[str, str]:
    return {"help": source.metadata["help"]} if "help" in source.metadata else {}


MappingProxy = types.MappingProxyType


def names(flags: Iterable[str]) -> list[str]:
    """Options as typed on the command line."""
    return [f"--{name.replace('_', '-')}" for name in flags]
