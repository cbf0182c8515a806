"""Training: what it learns, that it is the same however it is split up or interrupted, and what is
left when something goes wrong."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fastserve_jax.errors import ConfigError, TrainingFailed
from fastserve_jax.lifecycle import train as module
from fastserve_jax.lifecycle.checkpoints import Checkpoints
from fastserve_jax.lifecycle.commands import run_train
from fastserve_jax.lifecycle.lora import Lora, adapters
from fastserve_jax.lifecycle.origin import open_arrays
from fastserve_jax.lifecycle.steps import Steps
from fastserve_jax.lifecycle.train import points, train
from fastserve_jax.models.decoder import parameters
from fastserve_jax.weights.load import open_folder
from fastserve_jax.weights.registry import Registry
from tests.lifecycle import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run to its end, which others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train(runs.settings(data, out))


def arrays(folder):
    files = open_folder(folder / "model", "model")
    shapes = {n: a.shape for n, a in parameters(module.Model(files.config).empty).items()}
    return {name: np.asarray(array, np.float32) for name, array in files.tensors(shapes)}


def test_one_batch_is_learned_by_heart(data, tmp_path):
    one = next(module.Dataset(data).batches("train", 8, 0))

    class Endless:
        def __next__(self):
            return one

        def get_state(self):
            return {}

    class Same(module.Dataset):
        def batches(self, part, rows, seed):
            return Endless() if part == "train" else super().batches(part, rows, seed)

    changes = {"steps": 150, "evaluate_every": 150, "optimiser.weight_decay": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Dataset", Same)
        train(runs.settings(data, tmp_path / "run", **changes))
    last = list(points(tmp_path / "run"))[-1]
    assert last.loss < 0.15
    assert last.accuracy > 0.97


def test_it_learns_and_what_is_kept_is_what_was_best(whole):
    out, done = whole
    curve = list(points(out))
    assert [point.step for point in curve] == list(range(1, 13))
    assert curve[-1].loss < 0.9 * curve[0].loss
    measured = {p.step: p.valid_loss for p in curve if p.valid_loss is not None}
    assert set(measured) == {4, 8, 12}
    assert done.valid_loss == min(measured.values())
    assert measured[done.best_step] == done.valid_loss
    assert arrays(out)["embed.weight"].shape == (300, 32)


@pytest.mark.parametrize("stop_at", [2, 7])
def test_interrupted_it_goes_on_to_the_bit(data, whole, tmp_path, stop_at):
    out = tmp_path / "cut"
    real = Steps.compiled

    class Stopped(Exception):
        pass

    def failing(self, now):
        step_of, done = real(self, now), []

        def step(*given):
            done.append(0)
            if len(done) > stop_at:
                raise Stopped
            return step_of(*given)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "compiled", failing)
        with pytest.raises(Stopped):
            train(runs.settings(data, out))
    with (out / "curves.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    if stop_at == 7:
        with pytest.raises(ConfigError, match="was begun with seed 0, not 1: take another"):
            train(runs.settings(data, out, seed=1))
    said = []
    train(runs.settings(data, out), say=said.append)
    assert said == ["goes on after step 4"][: stop_at // 4]
    assert runs.losses(out) == runs.losses(whole[0])
    found, wanted = arrays(out), arrays(whole[0])
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def in_process(folder, *runs):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.lifecycle.runs", str(folder), *map(json.dumps, runs)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )


MESHES = {
    "data": {"mesh.data": 4},
    "fsdp": {"mesh.fsdp": 4},
    "tensor": {"mesh.tensor": 4},
    "data and tensor, in two parts": {"mesh.data": 2, "mesh.tensor": 2, "accumulate": 2},
}


def test_four_devices_do_as_one(data, whole, tmp_path):
    four = [
        {"out": str(tmp_path / name), "mesh.cpu_devices": 4, **mesh}
        for name, mesh in MESHES.items()
    ]
    with in_process(data, *four) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    wanted = runs.losses(whole[0])
    for run in four:
        np.testing.assert_allclose(runs.losses(run["out"]), wanted, rtol=1e-5)


def test_in_bf16_it_learns_as_well(data, tmp_path):
    last = {}
    for dtype in ("f32", "bf16"):
        changes = {"steps": 200, "evaluate_every": 200, "dtype": dtype, "log_every": 50}
        changes |= {"optimiser.learning_rate": 3e-3, "batch_rows": 4}
        train(runs.settings(data, tmp_path / dtype, **changes))
        last[dtype] = runs.losses(tmp_path / dtype)[-1]
    assert last["bf16"] == pytest.approx(last["f32"], rel=0.01)
    assert last["f32"] < 4.5


def test_recomputed_layers_change_nothing(data, whole, tmp_path):
    train(runs.settings(data, tmp_path / "run", remat=True))
    np.testing.assert_allclose(runs.losses(tmp_path / "run"), runs.losses(whole[0]), rtol=1e-5)


def test_a_model_goes_on_from_another(data, whole, tmp_path):
    config = open_folder(whole[0] / "model", "m").config
    base = module.Model(config), arrays(whole[0])
    train(runs.settings(data, tmp_path / "full", base="it"), base=base)
    assert runs.losses(tmp_path / "full")[0] < runs.losses(whole[0])[-2]
    lora = {"lora.rank": 2, "base": "it"}
    train(runs.settings(data, tmp_path / "lora", **lora), base=base)
    first, *_, last = runs.losses(tmp_path / "lora")
    assert first == pytest.approx(runs.losses(tmp_path / "full")[0], rel=1e-5), "B is nothing yet"
    assert last < first
    found = arrays(tmp_path / "lora")
    changed = {name for name in found if not np.array_equal(found[name], _as_kept(base[1][name]))}
    layers = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("attn.qkv", "attn.out")}
    assert changed == layers | {f"layers.{i}.mlp.{m}.weight" for i in (0, 1) for m in MLP}

    # Thought better of: what is trained already remains by itself.
    shutil.copytree(tmp_path / "lora", tmp_path / "kept", ignore=lambda *_: ["model"])
    kept = lora | {"lora.merge": False}
    done = train(runs.settings(data, tmp_path / "kept", **kept), base=base)
    registry = Registry(tmp_path / "registry")
    registry.add("it", whole[0] / "model", "train")
    registry.add("beside", done.folder, "train", parent="it")
    again = open_arrays("beside", tmp_path, np.float32)[1]
    for name, array in found.items():
        np.testing.assert_allclose(again[name], array, rtol=0.01, atol=1e-3)
    with pytest.raises(ConfigError, match=r"embed\.weight cannot have an adapter of its own"):
        train(runs.settings(data, tmp_path / "e", **kept, **{"lora.targets": ["embed"]}), base=base)


MLP = ("gate_up", "down")


def _as_kept(array):
    return np.asarray(jax.numpy.asarray(array).astype("bfloat16"), np.float32)


def test_it_ends_early_where_nothing_gets_better(data, tmp_path):
    changes = {"patience": 2, "evaluate_every": 1, "optimiser.learning_rate": 1e-12, "steps": 50}
    said = []
    done = train(runs.settings(data, tmp_path / "run", **changes), say=said.append)
    assert done.steps < 50
    assert said[-1].startswith("ends early")


def test_a_loss_that_is_no_number_ends_it_and_what_was_good_is_kept(data, tmp_path):
    out = tmp_path / "run"
    train_some = runs.settings(data, out, steps=4)
    train(train_some)
    (out / "model").rename(out / "kept")
    changes = {"steps": 12, "optimiser.learning_rate": 1e30}
    with pytest.raises(TrainingFailed, match=r"take a smaller learning rate than 1e\+30"):
        train(runs.settings(data, out, **changes))
    assert not (out / "model").exists()
    with Checkpoints(out / "checkpoints", 2) as kept:
        assert kept._manager.all_steps() == [4]


def test_held_out_text_that_is_no_number_ends_it_too(data, tmp_path, monkeypatch):
    def measured(self, now, point):
        return dataclasses.replace(point, valid_loss=float("nan"))

    monkeypatch.setattr(module._Loop, "_measured", measured)
    with pytest.raises(TrainingFailed, match="of held-out text nan"):
        train(runs.settings(data, tmp_path / "run", evaluate_every=1))


def test_the_newest_checkpoints_stay_and_the_best(tmp_path):
    now = {"a": jax.numpy.zeros(3)}
    with Checkpoints(tmp_path, 2) as kept:
        for step, loss in enumerate((0.3, 0.1, 0.3, 0.4, 0.5), 1):
            kept.save(step, now, {"at": step}, loss)
    with Checkpoints(tmp_path, 2) as kept:
        assert kept._manager.all_steps() == [2, 4, 5]
        assert kept.best(now, 2) == (2, now, {})
        step, after, stood = kept.newest(now)
        assert (step, stood) == (5, {"at": 5})
        assert now["a"].is_deleted()
        assert kept.best(after, 5)[0] == 2


def test_a_model_is_there_with_its_vocabulary_or_not_at_all(data, tmp_path):
    asked = runs.settings(data, tmp_path / "run", steps=1, name="it")
    with pytest.MonkeyPatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(module, "copy_vocabulary", full)
        with pytest.raises(TrainingFailed, match=r"cannot be written: .* No space left"):
            run_train(asked, tmp_path)
    assert not (tmp_path / "run" / "model").exists()
    run_train(asked, tmp_path)
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()
    assert Registry(tmp_path / "registry").find("it") is not None
    with pytest.raises(ConfigError, match="is there already"):
        run_train(dataclasses.replace(asked, base="never opened"), tmp_path)


def test_what_is_trained_is_no_array_of_its_base():
    base = {
        name: jax.numpy.zeros((4, 4)) for name in ("classifier.weight", "layers.0.mlp.up.weight")
    }
    assert adapters(base, Lora(2), 0)["classifier.weight"] is not base["classifier.weight"]


def test_rows_that_do_not_divide_among_devices_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "make_mesh", lambda *_: SimpleNamespace(shape={"data": 3, "fsdp": 2})
    )
    with pytest.raises(ConfigError, match="8 rows at a time do not divide among 6 devices"):
        module.checked(runs.settings(data, tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path):
    out, said = tmp_path / "run", []
    train(runs.settings(data, out))
    (out / "model").rename(out / "kept")
    newest = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name))
    damaged = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size > 2000]
    assert damaged
    for path in damaged:
        os.truncate(path, 100)
    train(runs.settings(data, out), say=said.append)
    assert "passed over" in said[0]
    assert said[1] == "goes on after step 8"
    assert (out / "model").exists()


def test_a_killed_trainer_goes_on(data, whole, tmp_path):
    out = tmp_path / "run"
    slow = {"steps": 12, "out": str(out)}
    process = in_process(data, slow)
    until = time.monotonic() + 120
    while not (out / "checkpoints" / "4").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (out / "model").exists():
        pytest.fail("it was killed too late to say anything")
    train(runs.settings(data, out))
    assert runs.losses(out) == runs.losses(whole[0])


def test_a_full_disk_is_said_and_what_was_good_is_kept(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(runs.settings(data, out, steps=4))
    (out / "model").rename(out / "kept")
    with Checkpoints(out / "checkpoints", 2) as kept:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kept._manager, "save", full)
        with pytest.raises(TrainingFailed, match="No space left on device; the last good one"):
            kept.save(8, {}, {}, 1.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": ""}, "data is missing"),
        ({"steps": 0}, "steps is at least 1"),
        ({"accumulate": 3}, "8 rows do not divide into 3 parts"),
        ({"dtype": "f16"}, "dtype is one of auto, f32, bf16"),
        ({"lora.rank": 2}, "name its base"),
        ({"lora.merge": False}, "name a lora.rank"),
        ({"patience": -1}, "patience is at least 0"),
        ({"optimiser.clip": -1.0}, r"optimiser\.clip is at least 0"),
        ({"optimiser.warmup_steps": -1}, r"optimiser\.warmup_steps is at least 0"),
        ({"lora.rank": -1, "base": "it"}, r"lora\.rank is at least 0"),
        ({"shape.num_heads": 0}, r"shape\.num_heads is at least 1"),
        ({"shape.hidden_size": 36}, "36 by 4 heads is odd"),
        ({"shape.num_heads": 3}, "do not divide among 3 heads"),
        ({"mesh.fsdp": 3}, "does not make"),
        ({"optimiser.schedule": "stairs"}, "no schedule stairs: there are cosine"),
        ({"optimiser.learning_rate": 0.0}, "teaches nothing"),
        ({"shape.depth": 3}, "no setting shape.depth"),
    ],
)
def test_settings_that_cannot_be_are_refused(data, tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        train(runs.settings(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
