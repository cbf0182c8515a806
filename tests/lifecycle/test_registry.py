"""Versions: numbered, never changed, whole or not there, and one of them what the name means."""

import json

import numpy as np
import pytest

from fastserve_jax.errors import ConfigError, ModelFileError
from fastserve_jax.lifecycle.cli import models
from fastserve_jax.lifecycle.shown import show_models, show_version
from fastserve_jax.weights import registry as module
from fastserve_jax.weights.load import open_model
from fastserve_jax.weights.orbax import write_model
from fastserve_jax.weights.registry import Registry
from tests.models.families import FAMILIES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    write_model(folder, FAMILIES["llama"], {"embed.weight": np.zeros((4, 4), np.float32)})
    return folder


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_versions_are_counted_and_the_first_is_current(registry, model):
    first = registry.add("stories", model, "train", data="d1", metrics={"valid_loss": 2.0})
    second = registry.add("stories", model, "train", parent="stories@1", settings={"steps": 3})
    assert (str(first), str(second)) == ("stories@1", "stories@2")
    assert registry.versions("stories") == [first, second]
    assert registry.find("stories") == first
    assert registry.find("stories@2") == second
    assert registry.find("others") is None
    assert registry.find("hf:a/b") is registry.find("../stories") is None
    with pytest.raises(ModelFileError, match="there are stories@1, stories@2"):
        registry.find("stories@3")


def test_promotion_and_back(registry, model):
    for _ in range(3):
        registry.add("a", model, "train")
    assert registry.promote("a@3") == registry.find("a")
    assert str(registry.rollback("a")) == "a@2"
    assert str(registry.find("a")) == "a@2"
    registry.rollback("a")
    with pytest.raises(ModelFileError, match="a@1 is the first version"):
        registry.rollback("a")
    with pytest.raises(ModelFileError, match="no model b@1 is registered: there are a"):
        registry.promote("b@1")


def test_what_is_cut_off_is_not_there(registry, model, monkeypatch):
    registry.add("a", model, "train")

    def full(source, target):
        (target).mkdir()
        (target / "model.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copytree", full)
    with pytest.raises(OSError, match="No space"):
        registry.add("a", model, "train")
    assert [str(v) for v in registry.versions("a")] == ["a@1"]
    assert not list((registry.folder / "a").glob(".writing*")), "nothing is left lying about"


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a/b", "-a", "x" * 65])
def test_names_that_are_none(registry, model, name):
    with pytest.raises(ModelFileError, match="is no name"):
        registry.add(name, model, "train")
    assert not registry.folder.exists()


def test_names_of_others(registry, model):
    for name in ("tiny", "smollm2-135m-instruct"):
        with pytest.raises(ModelFileError, match="is a model of the catalogue"):
            registry.add(name, model, "train")


def test_what_is_no_number_is_not_registered(registry, model):
    with pytest.raises(ConfigError, match="valid_loss of a is not finite"):
        registry.add("a", model, "train", metrics={"steps": 3, "valid_loss": float("nan")})
    assert registry.names() == []


def test_a_folder_that_is_no_model(registry, tmp_path):
    with pytest.raises(ModelFileError, match=r"no model\.json"):
        registry.add("a", tmp_path, "train")


def test_a_version_is_opened_and_shown(registry, model, tmp_path, capsys, monkeypatch):
    registry.add("a", model, "train", parent="smollm2", metrics={"valid_loss": 1.25})
    registry.add("a", model, "compress", parent="a@1")
    assert open_model("a", tmp_path).name == "a@1"
    assert open_model("a@2", tmp_path).name == "a@2"
    assert open_model("a", tmp_path).config == FAMILIES["llama"]
    show_models(tmp_path)
    told = capsys.readouterr().out
    assert "a@1" in told
    monkeypatch.setattr("fastserve_jax.lifecycle.cli.cache_folder", lambda: tmp_path)
    for words in ([], ["list"]):
        models(words, result_action="return_value")
        assert capsys.readouterr().out == told
    assert "1.250" in told
    show_version("a@2", tmp_path)
    assert "made of a@2 < a@1 < smollm2" in capsys.readouterr().out
    with pytest.raises(ModelFileError, match="there are a"):
        show_version("b", tmp_path)
    (registry.folder / "a" / "0002" / "version.json").write_text(json.dumps({"name": 1}))
    assert [str(v) for v in registry.versions("a")] == ["a@1"]
    assert str(registry.add("a", model, "train")) == "a@3"
