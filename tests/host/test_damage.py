"""Damaged, foreign and hostile checkpoints and config files."""

import hashlib
import importlib
import io
import json
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from commands import accept_results, logged
from hypothesis import HealthCheck, given, settings

from faults import scenario  # isort: skip

import purejaxppo as ppo
from purejaxppo.checks import RunWarning
from purejaxppo.cli import main
from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.host import checkpoint, checkpoints
from purejaxppo.host.configfile import RunSettings, Settings, dump_settings, load_settings
from purejaxppo.host.rundir import sealed, unsealed
from purejaxppo.host.summary import METRICS_DIGEST
from purejaxppo.sweeps.engine import resume_sweep
from purejaxppo.sweeps.report import write_report

SMALL = ppo.Config(total_timesteps=192, num_steps=8, hidden_sizes=(4,))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after 2, 4 and 6 updates."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    ppo.run(
        SMALL, run_dir=directory, checkpoint_every=2, checkpoint_unit="updates", eval_episodes=2,
        keep=9, progress=False,
    )  # fmt: skip
    return directory


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def folder(run: Path, updates: int) -> Path:
    return run / "checkpoints" / f"{updates:09d}"


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def assert_skipped(run: Path, name: str, words: str) -> None:
    """Assert that the checkpoint before is found, and the damaged one is named."""
    found, skipped = checkpoints.find(run)
    assert found.position.updates == 4
    assert len(skipped) == 1
    assert name in skipped[0]
    assert words in skipped[0]


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("manifest_bytes", [40, pytest.param(None, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_detected(copy: Path, manifest_bytes: int | None):
    """Flips the first, the last and some other bytes of each file. None: the whole manifest."""
    rng = np.random.default_rng(0)
    for path in files(folder(copy, 6)):
        content = path.read_bytes()
        everywhere = range(len(content))
        count = manifest_bytes if path.name == "manifest.json" else 5
        some = rng.permutation(everywhere)[:count].tolist()
        for at in sorted({*everywhere[:1], *everywhere[-1:], *some}):
            flip(path, at)
            assert_skipped(copy, "000000006", "" if path.name == "manifest.json" else path.name)
            path.write_bytes(content)
    assert checkpoints.find(copy)[0].position.updates == 6


def test_a_missing_file_is_named(copy: Path):
    for path in files(folder(copy, 6)):
        content = path.read_bytes()
        path.unlink()
        assert_skipped(copy, "000000006", path.name)
        path.write_bytes(content)


def test_an_empty_folder_is_skipped_and_the_run_resumes_before_it(copy: Path, original: Path):
    shutil.rmtree(folder(copy, 6))
    folder(copy, 6).mkdir()
    assert_skipped(copy, "000000006", "manifest.json cannot be read: No such file")
    with pytest.warns(RunWarning, match=r"skipped .*000000006: manifest.json cannot be read"):
        ppo.resume(copy, progress=False)
    assert checkpoints.find(copy)[0].position.updates == 6
    assert logged(copy) == logged(original)


def test_if_all_checkpoints_are_damaged_each_is_named_and_nothing_changes(copy: Path, capsys: Any):
    for updates in (2, 4, 6):
        flip(files(folder(copy, updates))[0], 5)
    metrics = (copy / "metrics.csv").read_bytes()
    for command in (["resume", str(copy)], ["eval", str(copy)]):
        assert main(command) == 2
        text = capsys.readouterr().err
        assert f"no complete checkpoint found in {str(copy)!r} (existing: 2, 4, 6)" in text
        assert all(f"{updates:09d}" in text for updates in (2, 4, 6))
    assert (copy / "metrics.csv").read_bytes() == metrics


def test_other_format_versions_are_refused(copy: Path):
    path = folder(copy, 6) / "manifest.json"
    for version, words in ((0, "format 0"), (2, "format 2"), ("x", "format 'x'")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
        assert_skipped(
            copy, "000000006", f"has {words}, but this version of purejaxppo reads format 1"
        )
    for text in ("", "{", "[]", "7", '"x"', "null", "[" * 100_000):
        path.write_text(text)
        assert_skipped(copy, "000000006", "manifest.json ")


@pytest.mark.parametrize(
    "change",
    [
        {"position": None}, {"position": {}}, {"settings": 7}, {"settings": "x"}, {"leaves": 3},
        {"settings": "num_envs = 0"}, {"settings": "a." * 9999}, {"files": []},
        {"eval_return": "x"}, {"leaves": {"x": "float32[99999999999999]"}, "files": None},
    ],
)  # fmt: skip
def test_a_malformed_manifest_with_a_valid_digest_is_skipped(copy: Path, change: dict[str, Any]):
    rewrite(folder(copy, 6), change)
    assert_skipped(copy, "000000006", "manifest.json is malformed")


@pytest.mark.parametrize("name", ["../../config.toml", "/etc/passwd", "x" * 9999])
def test_file_names_in_a_manifest_are_never_opened(copy: Path, name: str):
    rewrite(folder(copy, 6), {"files": {name: "0" * 64}})
    assert_skipped(copy, "000000006", f"the file {name} is missing")


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """Change a manifest and update its digest."""
    manifest = json.loads((path / "manifest.json").read_text()) | change
    checkpoint._write_manifest(path, manifest)


# Hostile


class Payload:
    def __reduce__(self) -> Any:
        return (Path("pwned").touch, ())


FORBIDDEN = ("pickle.find_class", "exec", "os.system", "subprocess.Popen")
INSTALLED = (sys.prefix, sys.base_prefix)
watching: list[list[str]] = []


def watch(event: str, arguments: Any) -> None:
    if watching and event in FORBIDDEN and not (event == "exec" and installed(arguments[0])):
        watching[0].append(f"{event} {arguments}"[:200])


def installed(code: Any) -> bool:
    """Whether this imports an installed module, as pytest does for its warnings."""
    return code.co_name == "<module>" and code.co_filename.startswith(INSTALLED)


sys.addaudithook(watch)


@pytest.fixture
def seen() -> Any:
    """Code that was loaded or run during the test."""
    watching.append([])
    yield watching[0]
    watching.clear()


def test_the_audit_hook_detects_a_pickle(seen: list[str], tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    pickle.load(io.BytesIO(pickle.dumps(Payload())))
    assert any(line.startswith("pickle.find_class") for line in seen)
    assert (tmp_path / "pwned").exists()
    (tmp_path / "hostile.py").write_text("planted = True")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("hostile")
    assert any(line.startswith("exec") for line in seen)


def test_no_code_is_run_from_a_checkpoint(copy: Path, monkeypatch: Any, seen: list[str]):
    """Replaces each file in turn by a pickle, and adds more, with valid digests."""
    monkeypatch.chdir(copy)
    states = jax.eval_shape(lambda: ppo.load(copy, seed=None).state)
    seen.clear()
    learner = ppo.make_learner(SMALL)

    def init() -> Any:
        keys = jax.random.split(jax.random.key(0), 1)
        return jax.vmap(learner.init, (0, None))(keys, ppo.HParams())

    jax.eval_shape(init)
    assert jax.tree.structure(jax.eval_shape(init)) == jax.tree.structure(states)
    checkpoint.restore(checkpoints.find(copy)[0], init)
    seen.clear()
    path = folder(copy, 6)
    for name in ("state.pkl", "state/extra.pickle", "__init__.py"):
        (path / name).write_bytes(pickle.dumps(Payload()))
    for target in files(path):
        content = target.read_bytes()
        if target.name != "manifest.json":
            target.write_bytes(pickle.dumps(Payload()))
        rewrite(path, {"files": checkpoint._digests(path)})
        with suppress(ConfigError):
            checkpoint.restore(checkpoints.find(copy)[0], init)
        target.write_bytes(content)
    assert seen == []
    assert not (copy / "pwned").exists()


@pytest.mark.slow
def test_no_code_is_run_from_a_sweep(tmp_path: Path, monkeypatch: Any, seen: list[str]):
    """Replaces each file in turn by a pickle, with valid digests."""
    monkeypatch.chdir(tmp_path)
    scenario.speed_up(monkeypatch.setattr)
    sweep = tmp_path / "s"
    ppo.sweep(SMALL, {"gamma": [0.9, 0.99]}, run_dir=sweep, eval_episodes=2, progress=False)
    ppo.load_trial(sweep)
    resume_sweep(sweep, progress=False)
    write_report(sweep)
    wave = sweep / "waves/0000"
    hostile, arrays = pickle.dumps(Payload()), io.BytesIO()
    np.savez(arrays, trial=np.array([Payload()], dtype=object))
    seen.clear()
    for target, content in (
        (sweep / "curves.npz", arrays.getvalue()),
        (sweep / "curves.npz", hostile),
        (sweep / "results.csv", hostile),
        (sweep / "winner.json", hostile),
        (wave / "metrics.f32", hostile),
    ):
        before = {path: path.read_bytes() for path in files(sweep)}
        target.write_bytes(content)
        if target.parent == sweep and target.name != "finished.json":
            accept_results(sweep)
        if target.name == "metrics.f32":
            summary = unsealed(wave / "summary.json")
            digest = {METRICS_DIGEST: hashlib.sha256(hostile).hexdigest()}
            (wave / "summary.json").write_text(sealed(summary | digest))
        for read in (ppo.load_trial, write_report):
            with suppress(ConfigError):
                read(sweep)
        if target.parent == wave:
            with suppress(ConfigError):
                resume_sweep(sweep, progress=False)
        for path, old in before.items():
            path.write_bytes(old)
    # Flax uses exec to define dataclasses whenever it makes a network.
    assert [event for event in seen if not event.startswith("exec ")] == []
    assert not (tmp_path / "pwned").exists()


def test_no_code_is_run_from_a_config_file(tmp_path: Path, monkeypatch: Any, seen: list[str]):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.toml"
    load(path, b"num_envs = 4")
    seen.clear()
    hostile = pickle.dumps(Payload())
    for text in (hostile, b"env_id = \"__import__('os').system('touch pwned')\"", b"!!python/x"):
        load(path, text)
    assert seen == []
    assert not (tmp_path / "pwned").exists()


# Config files


def load(path: Path, content: bytes) -> Settings | None:
    """Load settings; None if they are refused in one message."""
    path.write_bytes(content)
    try:
        return load_settings(path)
    except ConfigError as refused:
        if f"config file {str(path)!r}: " not in str(refused):
            raise
        return None


KEYS = {
    "": [f for f in vars(Config()) if f != "env_id"],
    "hparams.": list(vars(HParams())),
    "run.": list(vars(RunSettings())),
}
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-3, 300), st.floats(-1, 2))
SCALARS = st.one_of(NUMBERS, st.booleans(), st.text(max_size=8), st.dates())
VALUES = st.one_of(
    SCALARS,
    st.sampled_from(["auto", "mlp", "gru", "tanh", "normal", "linear", "updates", "none"]),
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from("ab"), SCALARS, max_size=2),
)


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=True)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    return str(value)


ASSIGNMENTS = st.dictionaries(
    st.sampled_from([prefix + key for prefix, keys in KEYS.items() for key in keys]),
    VALUES,
    max_size=4,
)
WORDS = st.sampled_from(
    [
        *r"""[ ] { } = . , " ' # - \u0000 é [hparams] [run] [[run]] gamma num_envs =1""".split(),
        *["inf", "nan", "0x", "1e999", "1_0", "true", "1979-05-27", "\n", "\x00", " "],
    ]
)
many = settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@many
@given(content=st.one_of(st.binary(max_size=200), st.lists(WORDS, max_size=25)))
def test_any_file_gives_settings_or_one_message(tmp_path: Path, content: Any):
    content = content if isinstance(content, bytes) else "".join(content).encode()
    assert isinstance(load(tmp_path / "any.toml", content), Settings | None)


@many
@given(assignments=ASSIGNMENTS)
def test_any_values_give_settings_or_one_message(tmp_path: Path, assignments: dict[str, Any]):
    """Accepted settings also read back as the same."""
    text = "".join(f"{key} = {toml(value)}\n" for key, value in assignments.items())
    loaded = load(tmp_path / "any.toml", text.encode())
    if loaded is None:
        return
    again = load(tmp_path / "again.toml", dump_settings(loaded).encode())
    assert again == loaded


@pytest.mark.parametrize("key", ["num_envs", "seed", "hidden_sizes", "lr_schedule", "gamma"])
@pytest.mark.parametrize("number", ["1" * 5000, "0x" + "f" * 5000, "1e5000", "-" + "9" * 400])
def test_very_long_numbers_are_refused(tmp_path: Path, key: str, number: str):
    for value in (number, f"[{number}]"):
        section = "[run]\n" if key == "seed" else "[hparams]\n" if key == "gamma" else ""
        assert load(tmp_path / "any.toml", f"{section}{key} = {value}\n".encode()) is None


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    assignments=st.fixed_dictionaries(
        {},
        optional={
            "encoder": st.sampled_from(["auto", "mlp", "cnn"]),
            "memory": st.sampled_from(["none", "gru", "lstm"]),
            "hidden_sizes": st.lists(st.integers(1, 8), max_size=2).map(tuple),
            "action_distribution": st.sampled_from(["auto", "normal", "tanh_normal"]),
            "shared_trunk": st.booleans(),
            "num_envs": st.integers(1, 5),
            "num_steps": st.integers(1, 9),
            "num_minibatches": st.integers(1, 3),
            "env_id": st.sampled_from(["CartPole-v1", "Pendulum-v1", "Catch-bsuite", "x"]),
        },
    )
)
def test_accepted_settings_can_be_trained(assignments: dict[str, Any]):
    try:
        learner = ppo.make_learner(Config(**assignments))
    except ConfigError:
        return
    state = jax.eval_shape(learner.init, jax.random.key(0), HParams())
    trained, metrics = jax.eval_shape(learner.update, state, HParams())
    assert jax.tree.structure(trained) == jax.tree.structure(state)
    assert metrics["policy_loss"].shape == ()
