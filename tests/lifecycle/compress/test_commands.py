"""`fastserve compress`, from a model and prepared text to a registered version that serves."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fastserve_jax.cli import app
from fastserve_jax.config import load_settings
from fastserve_jax.errors import ConfigError, ModelFileError
from fastserve_jax.fitting import precision_of
from fastserve_jax.lifecycle.compress import commands
from fastserve_jax.lifecycle.compress.measure import perplexity, speeds
from fastserve_jax.lifecycle.dataset import TOKENIZER, VALID, Dataset
from fastserve_jax.lifecycle.losses import Model
from fastserve_jax.lifecycle.origin import arrays_of
from fastserve_jax.lifecycle.vocabulary import copy_vocabulary
from fastserve_jax.models.decoder import abstract, parameters
from fastserve_jax.models.precision import INT4, INT8, Stored
from fastserve_jax.weights.converted import parameters_as
from fastserve_jax.weights.load import open_folder, open_model
from fastserve_jax.weights.orbax import QUANTISED, write_model
from fastserve_jax.weights.registry import REGISTRY, Registry
from tests.lifecycle import runs
from tests.lifecycle.compress import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text in its vocabulary, and a cache with what was made of it."""
    folder = tmp_path_factory.mktemp("compress")
    data = runs.data(folder)
    config = tiny.config(vocab_size=300, intermediate_size=128)
    arrays = {n: a.astype(ml_dtypes.bfloat16) for n, a in tiny.arrays(config).items()}
    write_model(folder / "model", config, arrays)
    copy_vocabulary(data / TOKENIZER, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSERVE_CACHE", str(folder / "cache"))
        rates = {"before": 2.0, "after": 3.0}
        patch.setattr(commands, "speeds", lambda *_: rates)  # which has a test of its own
        given = (str(folder / "model"), str(data), "--calibrate", "4", "--measure", "2")
        rows = ["compress", "quantise", *given, "--to", INT4, "--group", "32", "--name", "small"]
        app([*rows, "--rounds", "1"], result_action="return_value")
        rows = ["compress", "prune", *given, "--pattern", "structured", "--name", "less"]
        app([*rows, "--heads", "0.5", "--rounds", "0"], result_action="return_value")
        yield folder, config, data


def test_the_report_is_kept_and_says_what_is_there(made):
    folder, _, data = made
    registry = Registry(folder / "cache" / REGISTRY)
    small, less = (registry.find(name) for name in ("small", "less"))
    assert (small.how, small.parent) == ("compress", str(folder / "model"))
    assert small.data == Dataset(data).facts.fingerprint
    assert small.settings["quantise"]["to"] == INT4
    assert small.metrics["weight_bytes_after"] < 0.5 * small.metrics["weight_bytes_before"]
    assert small.metrics["file_bytes_after"] < small.metrics["file_bytes_before"]
    assert (small.metrics["tokens_per_s_before"], small.metrics["tokens_per_s_after"]) == (2, 3)
    change = small.metrics["perplexity_after"] / small.metrics["perplexity_before"]
    assert 0.5 < change < 2
    assert small.metrics["valid_loss"] == pytest.approx(np.log(small.metrics["perplexity_after"]))
    assert less.metrics["weight_bytes_after"] < 0.8 * less.metrics["weight_bytes_before"]
    files = open_model("less", folder / "cache")
    assert (files.config.intermediate_size, files.config.num_kv_heads) == (64, 1)


def test_it_is_served_as_it_is_stored(made):
    folder, config, _ = made
    files = open_model("small", folder / "cache")
    assert files.stored["layers.0.attn.qkv"] == Stored(INT4, 32)
    assert files.stored["embed"] == Stored(INT8)
    precision = precision_of(load_settings().model, files)
    wanted = parameters(abstract(config, precision)[1])
    assert wanted["layers.1.mlp.down.weight"].dtype == jnp.int4
    found = dict(parameters_as(files, wanted, folder))
    assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
        n: (w.shape, w.dtype) for n, w in wanted.items()
    }
    floats = arrays_of(files)  # as training and export read it
    scale = found["layers.1.mlp.down.scale"].T.repeat(32, 1)
    back = found["layers.1.mlp.down.weight"].astype(np.float32) * scale
    assert np.array_equal(floats["layers.1.mlp.down.weight"], back)
    # Asked for another type, it is that.
    asked = precision_of(load_settings(overrides=["model.dtype=bf16"]).model, files)
    wanted = parameters(abstract(config, asked)[1])
    wide = dict(parameters_as(files, wanted, folder))
    assert "layers.1.mlp.down.scale" not in wide
    assert np.array_equal(wide["layers.1.mlp.down.weight"], back.astype(ml_dtypes.bfloat16))


def test_it_decodes_as_a_server_does(made):
    folder, _, _ = made
    found = speeds({"it": ("small", "auto")}, tuple(range(20)), 1, folder / "cache")
    assert found["it"] > 0


def test_perplexity_is_that_of_the_floats_it_stands_for(made):
    folder, _, data = made
    files = open_model("small", folder / "cache")
    rows = Dataset(data).arrays(VALID)
    chosen = {name: array[[0, -1]] for name, array in rows.items()}
    found = perplexity(files, "f32", chosen, folder / "cache")
    version = Registry(folder / "cache" / REGISTRY).find("small")
    assert found.perplexity == pytest.approx(version.metrics["perplexity_after"], rel=0.02)
    assert found.perplexity != version.metrics["perplexity_after"]
    given = {n: jnp.asarray(array) for n, array in arrays_of(files).items()}
    nats, (count, _) = Model(files.config).loss(
        given, {n: jnp.asarray(a) for n, a in chosen.items()}
    )
    assert found.perplexity == pytest.approx(np.exp(float(nats) / int(count)), rel=1e-4)
    nothing = chosen | {"learned": chosen["learned"] & False}
    with pytest.raises(ConfigError, match="no token of the rows to measure with counts"):
        perplexity(files, "f32", nothing, folder / "cache")


def test_damage_is_named(made, tmp_path):
    _, config, _ = made
    arrays = tiny.arrays(config)
    name = "layers.0.attn.qkv"
    with pytest.raises(KeyError):
        write_model(tmp_path / "no", config, arrays, {name: Stored(INT8)})
    assert not list(tmp_path.iterdir())
    write_model(tmp_path / "own", config, arrays)
    for text, said in (
        ("{", "cannot read"),
        ('{"layers.0.attn.qkv": {"kind": "int3"}}', "int3 by 0: this version knows int8"),
        ('{"layers.0.attn.qkv": {"kind": "int8"}}', "no weight and scale of int8"),
    ):
        (tmp_path / "own" / QUANTISED).write_text(text)
        with pytest.raises(ModelFileError, match=said):
            open_folder(tmp_path / "own", "own")


def test_nothing_is_registered_of_what_cannot_be(made, tmp_path):
    folder, _, data = made
    registry = Registry(folder / "cache" / REGISTRY)
    for model, name, flags, kind in (
        (str(folder / "model"), "Bad Name", ["--to", INT8], ModelFileError),
        (str(folder / "model"), "tiny", ["--to", INT8], ModelFileError),
        (str(folder / "model"), "new", ["--to", "int5"], ConfigError),
        ("tiny", "new", ["--to", INT8], ConfigError),  # of another vocabulary
    ):
        with pytest.raises(kind):
            app(
                ["compress", "quantise", model, str(data), "--name", name, *flags],
                result_action="return_value",
            )
    assert registry.names() == ["less", "small"]


def test_what_it_was_made_of_is_a_version_and_a_full_disk_is_said(made, monkeypatch):
    folder, _, data = made
    registry, asked = Registry(folder / "cache" / REGISTRY), []
    monkeypatch.setattr(commands, "speeds", lambda models, *_: asked.append(models) or {})
    given = ["compress", "quantise", "small", str(data), "--to", INT8, "--method", "nearest"]
    given += ["--name", "again", "--measure", "1"]
    app(given, result_action="return_value")
    assert registry.find("again").parent == "small@1"
    assert asked[0]["before"][0] == "small@1"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commands, "write_model", full)
    with pytest.raises(ConfigError, match=r"cannot write in .*cache: .*No space left"):
        app(given, result_action="return_value")
    assert len(registry.versions("again")) == 1
    assert not [*(folder / "cache").glob(".writing*")]
