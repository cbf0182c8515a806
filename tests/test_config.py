"""Settings: files and overrides, what is refused and how it is said."""

from pathlib import Path

import pytest

from fastserve_jax.config import Settings, load_settings
from fastserve_jax.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "serve").glob("*.toml")), ids=lambda p: p.stem)
def test_every_file_in_configs_loads_and_names_its_command(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# fastserve serve")
    assert str(path.relative_to(CONFIGS.parent)) in first
    load_settings(path)


def test_the_cpu_file_is_the_defaults():
    assert load_settings(CONFIGS / "serve" / "cpu.toml") == Settings()


def test_overrides_win_over_the_file_and_the_last_wins(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text("[engine]\npolicy = 'mlfq'\nmax_slots = 4\n[kv]\npages = 9\n")
    sets = ("engine.max_slots=8", "engine.overlap=false", "kv.pages=7", "kv.pages=11")
    settings = load_settings(file, sets)
    assert settings.engine.policy == "mlfq"
    assert settings.engine.max_slots == 8
    assert settings.engine.overlap is False
    assert settings.kv.pages == 11


def test_a_bare_word_is_a_string():
    assert load_settings(None, ["engine.policy=mlfq", "server.host=0.0.0.0"]).server.host == (
        "0.0.0.0"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.max_slot=3", "did you mean engine.max_slots"),
        ("engin.max_slots=3", "did you mean engine"),
        ("kv=3", "kv is a section"),
        ("kv.pages", "section.name=value"),
        ("kv.pages=many", "kv.pages"),
        ("kv.pages=-1", "at least 0"),
        ("kv.page_size=0", "at least 1"),
        ("kv.host_pages=-2", "at least -1"),
        ("engine.step_tokens=8", "at least 32"),
        ("engine.speculate=always", "auto, off"),
        ("model.dtype=int3", "auto, bf16, int8, f32"),
        ("server.port=70000", "65535"),
        ("fleet.cpus=0", "gpus and tpus are all 0"),
        ("server.port=true", "server.port"),
    ],
)
def test_what_is_wrong_is_named(override, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        load_settings(None, [override])


def test_a_bad_file_is_named(tmp_path):
    file = tmp_path / "s.toml"
    for text in ("[engine", "[engine]\npolicies = 1", "[engine]\nmax_slots = 'x'"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"s\.toml"):
            load_settings(file)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_settings(tmp_path / "none.toml")
