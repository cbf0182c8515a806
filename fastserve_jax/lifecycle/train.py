"""`fastserve train`: a model made, or made better, step by step, from a prepared folder.

What is there of an earlier run in the same folder is taken up where it stood, to the bit. Ends with
the best model by held-out text, in our own format beside its curves.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fastserve_jax.errors import ConfigError, TrainingFailed
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import parameters
from fastserve_jax.models.encoder import EncoderConfig
from fastserve_jax.weights.adapter import check_kept, write_adapter
from fastserve_jax.weights.orbax import write_model

from . import optimiser
from .checkpoints import Checkpoints
from .dataset import TOKENIZER, TRAIN, VALID, Dataset
from .distil import distilled
from .lora import adapters, halves, merged
from .losses import Classifier, Model
from .pruning import pruned
from .settings import TrainSettings
from .steps import DATA, FSDP, Steps, Told, Training, evaluation, make_mesh, place, place_batch
from .vocabulary import copy_vocabulary

CURVES, MODEL, ADAPTER, CHECKPOINTS = "curves.jsonl", "model", "adapter", "checkpoints"


@dataclass(frozen=True, slots=True)
class Point:
    """Of the curves. `loss` is nats for each token, or for each text that has a label."""

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    gradient: float
    tokens_per_s: float
    valid_loss: float | None = None
    valid_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    steps: int
    best_step: int
    valid_loss: float
    folder: Path


type Report = Callable[[Point], None]


def checked(settings: TrainSettings) -> tuple[Dataset, Mesh, Path]:
    """What a run needs that can be said before a model is opened; the path is of what it will have
    made. Raises ConfigError, DataError."""
    settings.check()
    data, asked = Dataset(Path(settings.data)), settings.mesh
    mesh = make_mesh(jax.devices(), asked.data, asked.fsdp, asked.tensor)
    rows, among = settings.batch_rows // settings.accumulate, mesh.shape[DATA] * mesh.shape[FSDP]
    if rows % among:
        raise ConfigError(f"{rows} rows at a time do not divide among {among} devices: batch_rows")
    made = Path(settings.out) / (MODEL if settings.lora.merge else ADAPTER)
    if made.exists():
        raise ConfigError(f"{made} is there already: take another `out`, or delete it")
    return data, mesh, made


def train(
    settings: TrainSettings,
    report: Report = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    base: tuple[Model | Classifier, dict[str, Any]] | None = None,
    teacher: tuple[Model, dict[str, Any]] | None = None,
) -> Trained:
    """`base` is what is trained, and the arrays to go on from; `teacher` what it learns from beside
    text. Raises OperatorErrors: ConfigError, DataError, TrainingFailed."""
    data, mesh, made = checked(settings)
    out, lora = Path(settings.out), settings.lora
    model, begin = base or _new(settings, data)
    arrays = place(begin, mesh)
    params, frozen = arrays, {"base": {}, "teacher": place(teacher[1], mesh) if teacher else {}}
    if lora.rank:
        params, frozen["base"] = place(adapters(arrays, lora, settings.seed), mesh), arrays
    if not lora.merge:
        check_kept(_of_decoder(model.config), halves(params))

    def whole(params: Any, frozen: Any) -> dict[str, jax.Array]:
        return merged(frozen["base"], params, lora) if lora.rank else params

    def loss(params: Any, frozen: Any, batch: Any) -> Any:
        return model.loss(whole(params, frozen), batch)

    def taught(params: Any, frozen: Any, batch: Any) -> Any:
        assert teacher is not None
        assert isinstance(model, Model)
        given = whole(params, frozen), frozen["teacher"], batch
        return distilled(model, teacher[0], *given, settings.distil)

    plain = optimiser.make(settings.optimiser, settings.steps)
    steps = Steps(taught if teacher else loss, pruned(plain, settings.prune, settings.steps))
    now = steps.begin(params, mesh)
    out.mkdir(parents=True, exist_ok=True)
    with Checkpoints(out / CHECKPOINTS, settings.keep, say) as kept:
        loop = _Loop(settings, data, mesh, steps, frozen, evaluation(loss), kept, out, report)
        done, best = loop.run(now, say)
    with Checkpoints(out / CHECKPOINTS, settings.keep, say) as kept:
        last = int(done.step)
        found = kept.best(done, last)
    assert found is not None, "the last step is kept"
    step, state, _ = found
    params = Training(*state).params
    if lora.merge:
        _finish(made, model.config, whole(params, frozen), data)
    else:
        trained = halves(jax.device_get(params))
        write_adapter(made, _of_decoder(model.config), trained, lora.alpha, settings.base)
    return Trained(last, step, best, made)


def _of_decoder(config: ModelConfig | EncoderConfig) -> ModelConfig:
    if not isinstance(config, ModelConfig) or config.labels:
        raise ConfigError("an adapter that says labels is not served: leave lora.merge true")
    return config


def _new(settings: TrainSettings, data: Dataset) -> tuple[Model, dict[str, jax.Array]]:
    if data.facts.kind != "text":
        raise ConfigError(f"{settings.data} has labels: name a base that learns them")
    config = settings.shape.config(data.facts.vocab_size, data.facts.context)
    return Model(config, dtype_of(settings), settings.remat), drawn(config, settings.seed)


def dtype_of(settings: TrainSettings) -> Any:
    if settings.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.float32 if settings.dtype == "f32" else jnp.bfloat16


def drawn(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """Matrices from a normal of .02, those that add to what goes through all layers less, the more
    there are (Radford et al., "GPT-2", 2019, section 2.3); norms are ones."""
    shapes = parameters(Model(config).empty)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    made = {}
    for key, (name, leaf) in zip(keys, sorted(shapes.items()), strict=True):
        if len(leaf.shape) < 2:
            fill = 0.0 if name.endswith("bias") else 1.0
            made[name] = jnp.full(leaf.shape, fill, leaf.dtype)
            continue
        adds = name.endswith(("attn.out.weight", "down.weight"))
        scale = 0.02 / math.sqrt(2 * config.num_layers) if adds else 0.02
        made[name] = scale * jax.random.normal(key, leaf.shape, leaf.dtype)
    return made


@dataclass(slots=True)
class _Loop:
    settings: TrainSettings
    data: Dataset
    mesh: Any
    steps: Steps
    frozen: dict[str, Any]
    evaluate: Callable[[Any, Any, Any], Told]
    kept: Checkpoints
    out: Path
    report: Report

    def run(self, now: Training, say: Callable[[str], None]) -> tuple[Training, float]:
        """To the last step, or until nothing gets better; returns it and the best loss."""
        settings = self.settings
        batches = self.data.batches(TRAIN, settings.batch_rows, settings.seed)
        best, worse, first = math.inf, 0, 0
        made_of = {"data": self.data.facts.fingerprint} | {
            name: getattr(settings, name) for name in ("base", "batch_rows", "seed")
        }
        if (found := self.kept.newest(now)) is not None:
            first, now, stood = found[0], Training(*found[1]), found[2]
            self._compare(stood.get("of", {}), made_of)
            batches.set_state(stood["batches"])
            best, worse = stood["best"], stood["worse"]
            say(f"goes on after step {first}")
        self._cut(first)
        step_of = self.steps.compiled(now)
        rate = optimiser.schedule(settings.optimiser, settings.steps)
        sums, began = _Sums(), time.perf_counter()
        for number in range(first + 1, settings.steps + 1):
            batch = place_batch(next(batches), self.mesh, settings.accumulate)
            now, told = step_of(now, self.frozen, batch)
            sums.add(told)
            is_last = number == settings.steps
            is_due = is_last or number % settings.evaluate_every == 0
            if not (is_due or number % settings.log_every == 0):
                continue
            point = sums.point(number, float(rate(number - 1)), began)
            point = self._measured(now, point) if is_due else point
            valid = point.loss if point.valid_loss is None else point.valid_loss
            if not all(map(math.isfinite, (point.loss, point.gradient, valid))):
                raise TrainingFailed(self._lost(number, point, valid))
            if is_due:
                valid += settings.prune.unfinished(number, settings.steps)
                worse = 0 if valid < best else worse + 1
                best = min(best, valid)
                stood = {"batches": batches.get_state(), "best": best, "worse": worse}
                stood["of"] = made_of
                self.kept.save(number, now, stood, valid)
            self._tell(point)
            sums, began = _Sums(), time.perf_counter()
            if settings.patience and worse >= settings.patience:
                say(f"ends early: nothing got better in {worse} evaluations")
                break
        return now, best

    def _measured(self, now: Training, point: Point) -> Point:
        if not self.data.facts.valid_rows:
            return point
        sums = _Sums()
        devices = self.mesh.size
        rows = max(devices, self.settings.batch_rows // self.settings.accumulate)
        for batch in self.data.batches(VALID, rows, None):
            short = -len(next(iter(batch.values()))) % devices
            padded = {n: _padded(a, short, n in ("learned", "lengths")) for n, a in batch.items()}
            placed = place_batch(padded, self.mesh, 1)
            first = {name: array[0] for name, array in placed.items()}
            sums.add(self.evaluate(now.params, self.frozen, first))
        loss, accuracy = sums.means()
        return Point(**asdict(point) | {"valid_loss": loss, "valid_accuracy": accuracy})

    def _compare(self, was: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in now.items():
            if was.get(name, value) != value:
                raise ConfigError(
                    f"{self.out} was begun with {name} {was[name]!r}, not {value!r}: take another "
                    "`out`, or delete it"
                )

    def _lost(self, number: int, point: Point, valid: float) -> str:
        return (
            f"at step {number} the loss is {point.loss:.3g}, of held-out text {valid:.3g}, and the "
            f"gradient {point.gradient:.3g}: "
            f"take a smaller learning rate than {self.settings.optimiser.learning_rate:g}, or a "
            f"longer warm-up; checkpoints in {self.kept.folder} are of the steps before"
        )

    def _tell(self, point: Point) -> None:
        with (self.out / CURVES).open("a") as file:
            file.write(json.dumps(asdict(point)) + "\n")
        self.report(point)

    def _cut(self, step: int) -> None:
        """What was written of steps that are done once more."""
        if (self.out / CURVES).exists():
            known = [asdict(point) for point in points(self.out) if point.step <= step]
            whole = self.out / f".{CURVES}"
            whole.write_text("".join(f"{json.dumps(point)}\n" for point in known))
            whole.replace(self.out / CURVES)


def _padded(array: Any, rows: int, says: bool) -> Any:
    """With rows that nothing is learned of, where it says of what something is."""
    if not rows:
        return array
    return np.concatenate([array, array[:1].repeat(rows, axis=0) * (not says)])


class _Sums:
    def __init__(self) -> None:
        self._told: list[Told] = []

    def add(self, told: Told) -> None:
        self._told.append(told)  # on the device, until somebody asks

    def means(self) -> tuple[float, float]:
        nats, tokens, right, _ = map(sum, zip(*jax.device_get(self._told), strict=True))
        return float(nats) / max(1, int(tokens)), float(right) / max(1, int(tokens))

    def point(self, step: int, rate: float, began: float) -> Point:
        loss, accuracy = self.means()
        elapsed_s = time.perf_counter() - began  # the means waited for the device
        tokens = sum(int(told.tokens) for told in self._told)
        gradient = float(self._told[-1].gradient)
        return Point(step, loss, accuracy, rate, gradient, tokens / elapsed_s)


def points(folder: Path) -> Iterator[Point]:
    """Of a run's curves. A line that was not written to its end is none."""
    for line in (folder / CURVES).read_text().splitlines():
        with suppress(ValueError):
            yield Point(**json.loads(line))


def _finish(folder: Path, config: ModelConfig | EncoderConfig, params: Any, data: Dataset) -> None:
    """The folder is there with all that serves it, or not at all."""
    writing = folder.with_name(f".{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)  # of one that was killed here
    write_model(writing, config, {n: a.astype(jnp.bfloat16) for n, a in params.items()})
    copy_vocabulary(data.folder / TOKENIZER, writing)
    writing.rename(folder)
