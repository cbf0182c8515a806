"""What a training file says. Each part's own values keep their meaning in that part."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig

from .distil import Distil
from .lora import Lora
from .optimiser import Optimiser
from .pruning import Prune

DTYPES = ("auto", "f32", "bf16")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model that is trained from nothing: a Llama of these sizes."""

    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    intermediate_size: int = 768
    rope_base: float = 10_000.0
    tied_head: bool = True

    def config(self, vocab_size: int, context: int) -> ModelConfig:
        """Raises ConfigError."""
        sizes = (name for name in self.__slots__ if name not in ("rope_base", "tied_head"))
        if few := [name for name in sizes if getattr(self, name) < 1]:
            raise ConfigError(f"shape.{few[0]} is at least 1, not {getattr(self, few[0])}")
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"shape: {self.hidden_size} do not divide among {self.num_heads} heads, or these "
                f"among {self.num_kv_heads} KV heads"
            )
        if self.hidden_size // self.num_heads % 2:
            raise ConfigError(
                f"shape: {self.hidden_size} by {self.num_heads} heads is odd: positions turn pairs"
            )
        return ModelConfig(
            family="llama",
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            intermediate_size=self.intermediate_size,
            max_context=context,
            norm_eps=1e-5,
            tied_head=self.tied_head,
            rope_base=self.rope_base,
        )


@dataclass(frozen=True, slots=True)
class MeshShape:
    data: int = 0  # 0: what the devices leave
    fsdp: int = 0
    tensor: int = 0
    cpu_devices: int = 0  # into which a CPU is divided; 0: one


@dataclass(frozen=True, slots=True)
class TrainSettings:
    data: str = ""  # a prepared folder
    out: str = ""  # where checkpoints, curves and the finished model go
    base: str = ""  # a model to go on from; without it one of `shape` is begun
    name: str = ""  # under which it is registered; "": it is not
    steps: int = 1000
    batch_rows: int = 32  # in a step, on all devices together
    accumulate: int = 1  # parts that a step's rows are split into, one after the other
    dtype: str = "auto"  # that is computed in: bf16 on an accelerator; weights are kept in f32
    remat: bool = False
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 200  # steps; held-out text is measured, and the best kept
    keep: int = 2  # checkpoints
    patience: int = 0  # evaluations without a better one, after which it ends; 0: never
    shape: Shape = field(default_factory=Shape)
    optimiser: Optimiser = field(default_factory=Optimiser)
    lora: Lora = field(default_factory=Lora)
    distil: Distil = field(default_factory=Distil)
    prune: Prune = field(default_factory=Prune)
    mesh: MeshShape = field(default_factory=MeshShape)

    def check(self) -> None:
        """Raises ConfigError."""
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is missing: name a folder")
        for name in ("steps", "batch_rows", "accumulate", "log_every", "evaluate_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.patience < 0:
            raise ConfigError(f"patience is at least 0, not {self.patience}")
        if self.batch_rows % self.accumulate:
            raise ConfigError(f"{self.batch_rows} rows do not divide into {self.accumulate} parts")
        if self.lora.rank and not self.base:
            raise ConfigError("lora is trained beside a model: name its base")
        if self.lora.rank and (self.prune.share or self.prune.keep):
            raise ConfigError("what lora adds has no zeros: prune, or train lora, not both")
        if self.prune.keep and not self.base:
            raise ConfigError("prune.keep keeps the zeros of a base: name it")
        self.prune.check(self.steps)
        if not self.lora.merge and not self.lora.rank:
            raise ConfigError("lora.merge is false, and there is no adapter: name a lora.rank")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, not {self.dtype}")
