"""Weights of every known layout -> our parameter names and a `Pi0Config`; and back into openpi's layout.

`open_checkpoint` reads names and shapes only, and refuses whatever does not fit to the last key. Weights are
memory-mapped: those kept in their dtype are never copied, others are converted one at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from pi0_ros.model import files, infer, layouts
from pi0_ros.model.config import ConfigError, Pi0Config
from pi0_ros.model.files import CheckpointError, inside, read_json, write_safetensors
from pi0_ros.model.pi0 import Pi0
from pi0_ros.wording import first_line

__all__ = ["Checkpoint", "CheckpointError", "from_state_dict", "open_checkpoint", "parameter_shapes", "save_openpi"]

Header = dict[str, tuple[tuple[int, ...], "torch.dtype | None"]]
_BLOCK = 2**25  # numbers converted at a time, so that the pages of a large tensor need not all be resident


class Source(Protocol):
    """Where tensors come from."""

    header: Header

    def read(self, key: str, keep: bool) -> torch.Tensor:
        """The tensor of that key; `keep`: it will stay in use, so its mapping may be shared with others."""


@dataclass
class SafetensorsSource:
    """One or several memory-mapped safetensors files."""

    paths: dict[str, Path]  # by key
    header: Header
    _mapped: dict[Path, Any] = field(default_factory=dict)

    def read(self, key: str, keep: bool) -> torch.Tensor:
        path = self.paths[key]
        if not keep:  # a mapping of its own: its pages go when the tensor goes
            return _checked_get(files.open_safetensors(path), key, path)
        if path not in self._mapped:
            self._mapped[path] = files.open_safetensors(path)
        return _checked_get(self._mapped[path], key, path)


@dataclass
class DictSource:
    """Tensors in memory."""

    tensors: Mapping[str, torch.Tensor]

    @property
    def header(self) -> Header:
        return {key: (tuple(t.shape), t.dtype if t.is_floating_point() else None) for key, t in self.tensors.items()}

    def read(self, key: str, keep: bool) -> torch.Tensor:
        return self.tensors[key]


@dataclass
class JoinedSource:
    """A base and an adapter: the adapter's keys stand before the base's."""

    base: Source
    adapter: Source
    header: Header

    def read(self, key: str, keep: bool) -> torch.Tensor:
        return (self.adapter if key in self.adapter.header else self.base).read(key, keep)


@dataclass(frozen=True)
class Checkpoint:
    """Weights that are known to be complete and well-shaped for `config`, not read yet."""

    layout: str  # pi0_ros, openpi, lerobot, transformers, transformers state dict, jax
    config: Pi0Config
    dtype: torch.dtype  # of most of the weights in the file
    num_tensors: int  # in the file
    notes: tuple[str, ...]  # what was assumed or left out, for the user
    data: Mapping[str, Any]  # config.json, {} where there is none
    recipes: Mapping[str, layouts.Recipe]
    source: Source

    def describe(self) -> str:
        """Such as 'lerobot pi05 layout, 812 tensors, bfloat16'."""
        variant = "pi05" if self.config.pi05 else "pi0"
        return f"{self.layout} {variant} layout, {self.num_tensors} tensors, {str(self.dtype).removeprefix('torch.')}"

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that a parameter has in the file."""
        return self.source.header[self.recipes[name].source][1]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters."""
        return parameter_shapes(self.config)

    def tensors(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", progress: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by our name, one after the other. `dtype` None keeps each one's own."""
        ordered = sorted(self.recipes.items(), key=lambda item: item[1].source)  # a JAX array holds all layers
        for name, recipe in tqdm(ordered, "weights", unit="tensor", disable=not progress, leave=False):
            yield name, self._tensor(recipe, dtype or self.stored_dtype(name)).to(device)

    def state_dict(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", progress: bool = False
    ) -> dict[str, torch.Tensor]:
        """All parameters. On the CPU and in their own dtype they are pages of the file, read when first touched;
        writing to them does not change the file."""
        return dict(self.tensors(dtype, device, progress))

    def model(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", progress: bool = False
    ) -> Pi0:
        """A `Pi0` with these weights, in evaluation mode."""
        model = _meta_model(self.config)
        model.load_state_dict(self.state_dict(dtype, device, progress), strict=True, assign=True)
        return model.eval()

    def _tensor(self, recipe: layouts.Recipe, dtype: torch.dtype) -> torch.Tensor:
        stored = self.source.header[recipe.source][1]
        as_is = stored == dtype and recipe.turn is None and recipe.lora is None
        if as_is or recipe.turn or recipe.lora or recipe.index:

            def read(key: str, index: tuple[int, ...]) -> torch.Tensor:
                return self.source.read(key, keep=as_is)[index]

            return recipe.make(read).to(dtype).contiguous()
        shape = self.source.header[recipe.source][0]
        rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
        if not shape or shape[0] <= rows:
            return self.source.read(recipe.source, keep=False).to(dtype).contiguous()
        result = torch.empty(shape, dtype=dtype)
        for start in range(0, shape[0], rows):
            result[start : start + rows] = self.source.read(recipe.source, keep=False)[start : start + rows]
        return result


def open_checkpoint(path: str | Path, *, config: Pi0Config | None = None, base: str | Path | None = None) -> Checkpoint:
    """The checkpoint at `path`: a folder of any layout, a .safetensors file, or openpi's orbax `params/`.

    Args:
        config: the model's sizes, where neither shapes nor a config.json tell them; it must fit the weights.
        base: the checkpoint that a peft adapter folder is an update of.

    Raises:
        CheckpointError: one line that names the file, what is wrong, and every key that is missing, unexpected or
            mis-shaped.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    data = read_json(inside(folder, "config.json")) if (folder / "config.json").is_file() else {}
    if (folder / "adapter_model.safetensors").is_file() and path.is_dir():
        if base is None:
            raise CheckpointError(
                f"{path}: a LoRA adapter without its base model; `convert` merges the two (--base BASE_CHECKPOINT)"
            )
        under = open_checkpoint(base, config=config)
        source: Source = _join(under.source, _safetensors(folder / "adapter_model.safetensors", folder))
        if not data:  # where lerobot writes the tuned policy's own, horizon, cameras, normalisation are not the base's
            config, data = under.config, under.data
        return _assemble(source, str(path), config, data, _lora_config(folder))
    if base is not None:
        raise CheckpointError(f"{path}: a base is given, but there is no adapter_model.safetensors in this folder")
    return _assemble(_open_source(path), str(path), config, data, _lora_config(folder))


def from_state_dict(
    state_dict: Mapping[str, torch.Tensor], *, config: Pi0Config | None = None, data: Mapping[str, Any] | None = None
) -> Checkpoint:
    """As `open_checkpoint`, for tensors in memory, such as those of transformers' PI0. `data` is a config.json."""
    return _assemble(DictSource(state_dict), "state dict", config, data or {}, None)


def parameter_shapes(config: Pi0Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters."""
    return {name: tuple(value.shape) for name, value in _meta_model(config).state_dict().items()}


def save_openpi(checkpoint: Checkpoint, path: Path, dtype: torch.dtype | None = None, progress: bool = False) -> None:
    """Write the weights as openpi's PyTorch `model.safetensors`, which openpi loads strictly: the embedding under its
    tied name, and zeros for the expert's head, which nothing reads."""
    config = checkpoint.config
    shapes = {
        layouts.HEAD if name == layouts.EMBEDDING else name: (shape, dtype or checkpoint.stored_dtype(name))
        for name, shape in checkpoint.shapes().items()
    }
    head = (config.vocab_size, config.expert.width)
    shapes[layouts.EXPERT_HEAD] = (head, dtype or checkpoint.dtype)

    def renamed() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint.tensors(dtype, progress=progress):
            yield layouts.HEAD if name == layouts.EMBEDDING else name, tensor
        yield layouts.EXPERT_HEAD, torch.zeros(head, dtype=shapes[layouts.EXPERT_HEAD][1])

    write_safetensors(path, shapes, renamed(), {layouts.EMBEDDING: layouts.HEAD})


# --- finding the weights ----------------------------------------------------------------------------------------------


def _open_source(path: Path) -> Source:
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _sharded(path)
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"):
            raise CheckpointError(f"{path}: pickled weights are never loaded; convert them to safetensors first")
        return _safetensors(path, path.parent)
    if (path / "model.safetensors").is_file():
        return _safetensors(path / "model.safetensors", path)
    if (path / "model.safetensors.index.json").is_file():
        return _sharded(path / "model.safetensors.index.json")
    for params in (path / "params", path):
        if any((params / name).exists() for name in ("_METADATA", "manifest.ocdbt", "_sharding")):
            from pi0_ros.model.orbax import read_params  # needs tensorstore, an optional extra

            return DictSource(read_params(params))
    found = sorted(p.name for p in path.glob("*.safetensors"))
    if len(found) == 1:
        return _safetensors(path / found[0], path)
    if found:
        raise CheckpointError(f"{path}: no model.safetensors, and several others: {', '.join(found)}; name the file")
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"))
    if pickles:
        raise CheckpointError(f"{path}: pickled weights ({pickles[0]}) are never loaded; convert them to safetensors")
    inside = f"; did you mean {path / 'checkpoint'}?" if (path / "checkpoint").is_dir() else " in this folder"
    raise CheckpointError(f"{path}: no model.safetensors, no model.safetensors.index.json, no params/{inside}")


def _safetensors(path: Path, folder: Path) -> SafetensorsSource:
    header = files.read_header(inside(folder, path.name))
    return SafetensorsSource(dict.fromkeys(header, path), header)


def _sharded(index: Path) -> SafetensorsSource:
    """Shards as Hugging Face writes them: {"weight_map": {key: file}}; every shard must hold what the index says."""
    weight_map = read_json(inside(index.parent, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must be a mapping of keys to files, found {weight_map!r:.80}")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: the file of {key} must be a name, found {name!r:.80}")
    headers = {name: files.read_header(inside(index.parent, name)) for name in sorted(set(weight_map.values()))}
    absent = [f"{key} ({name})" for key, name in weight_map.items() if key not in headers[name]]
    extra = [f"{key} ({name})" for name, header in headers.items() for key in header if weight_map.get(key) != name]
    if absent or extra:
        parts = [f"missing in their shard: {', '.join(absent)}"] if absent else []
        parts += [f"in a shard but not in the index: {', '.join(extra)}"] if extra else []
        raise CheckpointError(f"{index}: {'; '.join(parts)}")
    paths = {key: index.parent / name for key, name in weight_map.items()}
    return SafetensorsSource(paths, {key: headers[name][key] for key, name in weight_map.items()})


def _join(base: Source, adapter: Source) -> JoinedSource:
    """Both; a whole module in the adapter (peft's modules_to_save) replaces the base's."""
    replaced = {layouts.rename(key) for key in adapter.header if ".lora_" not in key}
    kept = {key: entry for key, entry in base.header.items() if layouts.rename(key) not in replaced}
    return JoinedSource(base, adapter, {**kept, **adapter.header})


def _lora_config(folder: Path) -> tuple[float, int] | None:
    """Scale and rank of peft's adapter_config.json; None where there is none."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    data = read_json(inside(folder, path.name))
    rank, alpha = data.get("r"), data.get("lora_alpha")
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise CheckpointError(f"{path}: {name!r} must be a positive number, found {value!r:.80}")
    for name in ("rank_pattern", "alpha_pattern", "use_dora"):
        if data.get(name):
            raise CheckpointError(f"{path}: {name} is not understood; merge the adapter with peft before")
    return alpha / (math.sqrt(rank) if data.get("use_rslora") else rank), int(rank)


# --- checking ---------------------------------------------------------------------------------------------------------


def _assemble(
    source: Source,
    where: str,
    config: Pi0Config | None,
    data: Mapping[str, Any],
    lora: tuple[float, int] | None,
) -> Checkpoint:
    header = source.header
    shapes = {key: shape for key, (shape, _) in header.items()}
    if odd := [key for key, (shape, dtype) in header.items() if dtype is None or 0 in shape]:
        allowed = ", ".join(files.DTYPES)
        raise CheckpointError(f"{where}: weights must be {allowed} and not empty, which is not so for {', '.join(odd)}")
    try:
        plan = layouts.plan(shapes, lora[0] if lora else None)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    loras = [r.lora for r in plan.recipes.values() if r.lora]
    if wrong := [adapter.a for adapter in loras if lora and shapes[adapter.a][:1] != (lora[1],)]:
        raise CheckpointError(f"{where}: adapter_config.json says r = {lora[1]}, other ranks in {', '.join(wrong)}")
    made = layouts.made_shapes(plan.recipes, shapes)
    notes: list[str] = []
    if config is None:
        sound = {name: shape for name, shape in made.items() if not isinstance(shape, str)}
        config, notes = infer.infer_config(sound, plan.pi05, plan.heads, data, f"{where}: config.json")
    _check(made, plan, config, where)
    layout = plan.layout
    if infer.config_kind(data) == "lerobot" and layout == "openpi":
        layout = "lerobot"  # the hub's files of lerobot go without the prefix
    if loras:
        rule = "openpi's alpha / rank of 1" if layout == "jax" else f"a scale of {lora[0]:g}"
        notes.append(f"{len(loras)} LoRA updates merged with {rule}")
    if plan.skipped:
        notes.append(f"not read, no output depends on them: {layouts.listed(list(plan.skipped))}")
    dtype = Counter(header[recipe.source][1] for recipe in plan.recipes.values()).most_common(1)[0][0]
    return Checkpoint(layout, config, dtype, len(header), tuple(notes), data, plan.recipes, source)


def _check(made: Mapping[str, tuple[int, ...] | str], plan: layouts.Plan, config: Pi0Config, where: str) -> None:
    """CheckpointError that lists every key that is missing, unexpected or mis-shaped."""
    if config.pi05 != plan.pi05:
        said, held = ("pi05", "pi0") if config.pi05 else ("pi0", "pi05")
        raise CheckpointError(f"{where}: the config says {said}, but the weights are {held}")
    roots = {"vision": layouts.VISION + "encoder.", "vlm": layouts.VLM, "expert": layouts.EXPERT}
    for section, root in roots.items():  # before a model of that depth is built
        said, held = getattr(config, section).depth, infer.depth(made, root + "layers.")
        if said > held + 100:
            raise CheckpointError(f"{where}: the config says {section}.depth {said}, the weights have {held} layers")
    try:
        expected = parameter_shapes(config)
    except (ConfigError, RuntimeError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{where}: no model has these sizes: {first_line(error)}") from None
    missing = [name for name in expected if name not in made]
    unexpected = [recipe.source for name, recipe in plan.recipes.items() if name not in expected]
    unexpected = sorted({*unexpected, *plan.unexpected})
    wrong = {}
    for name, shape in expected.items():
        if name in made and made[name] != shape:
            found = made[name] if isinstance(made[name], str) else f"is {list(made[name])}"
            wrong[name] = f"{name} {found}, expected {list(shape)}"
    parts = [f"{len(missing)} missing: {layouts.listed(missing)}"] if missing else []
    parts += [f"{len(unexpected)} unexpected: {layouts.listed(unexpected)}"] if unexpected else []
    parts += [f"{len(wrong)} of another shape: {', '.join(wrong.values())}"] if wrong else []
    if parts:
        raise CheckpointError(f"{where}: {plan.layout} layout, but the parameters do not fit; {'; '.join(parts)}")


def _meta_model(config: Pi0Config) -> Pi0:
    with torch.device("meta"):
        return Pi0(config)


def _checked_get(reader: Any, key: str, path: Path) -> torch.Tensor:
    try:
        return reader.get_tensor(key)
    except Exception as error:  # safetensors raises its own, torch for weights that are not aligned
        raise CheckpointError(f"{path}: {key} cannot be read: {first_line(error)}") from None
