"""The catalogue that ships: every entry complete, pinned and as its first line says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.weights import catalogue as catalogue_module
from fastserve_jax.weights.catalogue import DEFAULT_MODEL, read_catalogue

_CONFIGS = Path(__file__).parents[2] / "configs" / "models"


def test_these_models_are_there() -> None:
    assert set(read_catalogue()) == {
        "all-minilm-l6-v2",
        "gemma3-270m",
        "qwen2.5-coder-0.5b-instruct",
        "smollm2-135m-instruct",
    }
    assert DEFAULT_MODEL in read_catalogue()


def test_every_entry_is_pinned() -> None:
    for name, model in read_catalogue().items():
        file = _CONFIGS / f"{name}.toml"
        assert file.read_text().startswith(f"# fastserve serve {name}\n")
        assert re.fullmatch("[0-9a-f]{64}", model.sha256)
        assert Path(model.file).name == model.file
        assert model.description
        assert model.licence
        packed = sum(wheel.size_bytes for wheel in model.wheels)
        assert 0.5 * model.size_bytes < packed < 1.1 * model.size_bytes
        for wheel in model.wheels:
            assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
            assert wheel.members or wheel.keep


def test_gemma_states_its_terms() -> None:
    assert read_catalogue()["gemma3-270m"].notice.startswith(
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("licence", "license"), "unknown field `license`"),
        (("size_bytes = 9\n", 'size_bytes = "9"\n'), "Expected `int`"),
        (("name =", "name"), "[Ee]xpected|[Ii]nvalid"),
    ],
)
def test_a_wrong_entry_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], reason: str
) -> None:
    text = (_CONFIGS / f"{DEFAULT_MODEL}.toml").read_text().replace("98_362_432", "9")
    (tmp_path / "bad.toml").write_text(text.replace(*change))
    monkeypatch.setattr(catalogue_module, "_FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=rf"models/bad\.toml: .*{reason}"):
        read_catalogue()
