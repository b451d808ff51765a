"""Where each parameter of the model stands in the checkpoints of others.

A plan maps our names (openpi's PyTorch keys, the tied embedding stored once) to `Recipe`s: which tensor of the file,
which slice of it, how to turn it, and which LoRA update to add. Plans are made from keys and shapes alone.

Layouts: `pi0_ros` (ours), `openpi` (PyTorch), `lerobot` (the same below `model.`), `transformers` (PI0 as
`save_pretrained` writes it), `transformers state dict` (its names in memory), `jax` (openpi's JAX parameters, flattened
with '/').
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from pi0_ros.model.files import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

VLM = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."
EMBEDDING = VLM + "embed_tokens.weight"
HEAD = "paligemma_with_expert.paligemma.lm_head.weight"  # tied to the embedding; the name that openpi's files keep
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"  # in the files, never read by the model
_PLAIN_NORM = re.escape(EXPERT) + r"(layers\.\d+\.(input|post_attention)_layer)?norm\.weight"
_UNREAD = (HEAD, EXPERT_HEAD, EXPERT + "embed_tokens.weight")


@dataclass(frozen=True)
class Lora:
    """A low-rank update in the file: keys of A and B, its scale, and the rule that multiplies them out.

    `peft`: scale * B @ A. `einsum`: A @ B over the last two axes. `heads` (openpi's attn_vec): A [N, H, r] and
    B [N, r, D] are both summed over heads, so dW[n, h, d] = sum_r A[n, h, r] * sum_m B[m, r, d] (openpi: lora.py).
    """

    a: str
    b: str
    rule: str
    scale: float = 1.0

    def delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The update, float32, in the shape of the weight that it is for."""
        a, b = a.float(), b.float()
        if self.rule == "peft":
            return self.scale * (b @ a)
        return self.scale * (a @ (b.sum(dim=-3, keepdim=True) if self.rule == "heads" else b))


@dataclass(frozen=True)
class Recipe:
    """How one parameter is made: `turn(file[source][index] + lora)`."""

    source: str
    index: tuple[int, ...] = ()  # into leading axes: JAX stacks the layers
    turn: Callable[[torch.Tensor], torch.Tensor] | None = None
    lora: Lora | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys that this parameter is made from."""
        return (self.source, self.lora.a, self.lora.b) if self.lora else (self.source,)

    def make(self, read: Callable[[str, tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
        """The parameter; `read(key, index)` gives a tensor of the file, or a meta tensor to learn shapes."""
        value = read(self.source, self.index)
        if self.lora:
            delta = self.lora.delta(read(self.lora.a, self.index), read(self.lora.b, self.index))
            if delta.shape != value.shape:
                found, expected = list(delta.shape), list(value.shape)
                raise CheckpointError(f"LoRA of {self.source}: its update has shape {found}, expected {expected}")
            value = (value.float() + delta).to(value.dtype)
        return self.turn(value) if self.turn else value


@dataclass(frozen=True)
class Plan:
    """What a file holds: its layout, whether it is pi0.5, a recipe per parameter, and what is left over."""

    layout: str
    pi05: bool
    recipes: dict[str, Recipe]
    unexpected: tuple[str, ...]  # keys of the file that mean nothing here
    skipped: tuple[str, ...]  # keys that no output depends on, such as unused heads
    heads: dict[str, int]  # vision / gemma head counts, where the shapes tell (JAX)


def detect(keys: Mapping[str, object] | set[str]) -> str:
    """The layout that these keys belong to.

    Raises:
        CheckpointError: none of the known ones.
    """
    if any("PaliGemma/" in key for key in keys):
        return "jax"
    if any(re.match(r"(model\.)?(vlm|dit)\.", key) for key in keys):
        return "transformers state dict"
    if any(key.startswith("model.paligemma_with_expert.") for key in keys):
        return "lerobot"
    if any("language_model.model." in key or "vision_tower.embeddings." in key for key in keys):
        return "transformers"
    if any(key.startswith("paligemma_with_expert.") for key in keys):
        return "pi0_ros" if EMBEDDING in keys and HEAD not in keys else "openpi"
    some = ", ".join(sorted(keys)[:3]) or "no tensor at all"
    raise CheckpointError(f"no pi0 or pi0.5 weights in a layout known here; the file holds {len(keys)} keys: {some}")


def plan(shapes: Shapes, lora_scale: float | None = None) -> Plan:
    """A plan for a file with these keys and shapes. `lora_scale`: of peft's updates (alpha / r), if known.

    Raises:
        CheckpointError: no known layout, two keys for one parameter, LoRA keys without what merging them needs.
    """
    layout = detect(shapes)
    return _jax_plan(shapes) if layout == "jax" else _torch_plan(layout, shapes, lora_scale)


# --- PyTorch layouts: renames -----------------------------------------------------------------------------------------


def rename(key: str) -> str:
    """Any PyTorch layout's key -> openpi's."""
    key = key.removeprefix("base_model.model.")  # peft
    key = re.sub(r"^model\.(?=paligemma_with_expert|state_proj|action_|time_mlp|embed_action_time|vlm|dit)", "", key)
    key = re.sub(r"^vlm\.", "paligemma_with_expert.paligemma.model.", key)
    key = re.sub(r"^dit\.", EXPERT, key)
    key = key.removeprefix("embed_action_time.")
    key = key.replace("language_model.model.", "language_model.")
    return re.sub(r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key)


def _torch_plan(layout: str, shapes: Shapes, lora_scale: float | None) -> Plan:
    bases, loras = _split_peft({key.replace(".base_layer.", "."): key for key in shapes}, lora_scale)
    names: dict[str, str] = {}
    for plain, key in bases.items():
        name = rename(plain)
        if name in names:
            raise CheckpointError(f"{names[name]} and {key} both stand for {name}")
        names[name] = key
    pi05 = any(name.startswith(EXPERT) and name.endswith("input_layernorm.dense.weight") for name in names)
    if EMBEDDING not in names and HEAD in names:
        names[EMBEDDING] = names[HEAD]
    skipped = [names.pop(name) for name in _UNREAD if name in names]
    skipped = [key for key in skipped if key not in names.values()]
    if pi05:  # lerobot renames and drops these when it loads them
        names = {re.sub(r"^action_time_mlp_", "time_mlp_", name): key for name, key in names.items()}
        left = [name for name in names if name.startswith("state_proj.") or re.fullmatch(_PLAIN_NORM, name)]
        skipped += [names.pop(name) for name in left]
    else:
        names = {re.sub(r"^time_mlp_", "action_time_mlp_", name): key for name, key in names.items()}
    recipes = {name: Recipe(key, lora=loras.pop(rename(name), None)) for name, key in names.items()}
    if loras:
        raise CheckpointError(f"LoRA weights for layers that the file does not have: {listed(loras)}")
    return Plan(layout, pi05, recipes, (), tuple(skipped), {})


def _split_peft(keys: dict[str, str], scale: float | None) -> tuple[dict[str, str], dict[str, Lora]]:
    """peft's `NAME.lora_A[.ADAPTER].weight` and `lora_B` taken out: -> other keys, and LoRA by openpi's name."""
    pairs: dict[str, dict[str, str]] = {}
    bases = {}
    for plain, key in keys.items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])(\.[^.]+)?\.weight", plain):
            sides = pairs.setdefault(rename(match[1] + ".weight"), {})
            if match[2] in sides:
                raise CheckpointError(f"{sides[match[2]]} and {key}: two adapters; merge them into one before")
            sides[match[2]] = key
        else:
            bases[plain] = key
    if halves := {name: sides for name, sides in pairs.items() if len(sides) < 2}:
        raise CheckpointError(f"LoRA with only one of lora_A and lora_B for {listed(halves)}")
    if pairs and scale is None:
        raise CheckpointError(
            f"{len(pairs)} LoRA updates (lora_A, lora_B) and no adapter_config.json with r and lora_alpha, so their "
            "scale is unknown; put that file beside the weights, or merge the adapter before"
        )
    return bases, {name: Lora(sides["A"], sides["B"], "peft", scale or 1.0) for name, sides in pairs.items()}


# --- JAX: stacked layers, transposed kernels --------------------------------------------------------------------------

_SIGLIP_DENSE = {"MlpBlock_0/Dense_0": "mlp.fc1", "MlpBlock_0/Dense_1": "mlp.fc2"}
_SIGLIP_HEADS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def _transpose(x: torch.Tensor) -> torch.Tensor:  # Dense: kernel [in, out] -> weight [out, in]
    return x.T


def _conv(x: torch.Tensor) -> torch.Tensor:  # [h, w, in, out] -> [out, in, h, w]
    return x.permute(3, 2, 0, 1)


def _vision_heads(x: torch.Tensor) -> torch.Tensor:  # [W, heads, D] -> [heads * D, W]
    return x.flatten(1).T


def _heads_first(x: torch.Tensor) -> torch.Tensor:  # [heads, W, D] -> [heads * D, W]
    return x.transpose(1, 2).flatten(0, 1)


def _out(x: torch.Tensor) -> torch.Tensor:  # [heads, D, W] -> [W, heads * D]
    return x.flatten(0, 1).T


def _flat(x: torch.Tensor) -> torch.Tensor:  # bias [heads, D] -> [heads * D]
    return x.flatten()


def _first(x: torch.Tensor) -> torch.Tensor:  # [1, T, W] -> [T, W]
    return x[0]


def plain_key(key: str) -> str:
    """'params/PaliGemma/.../w/value' -> 'PaliGemma/.../w': what openpi's trainer adds is taken away."""
    return key.removeprefix("params/").removesuffix("/value")


def _jax_plan(shapes: Shapes) -> Plan:
    by_plain = {plain_key(key): key for key in shapes}
    if len(by_plain) < len(shapes):
        raise CheckpointError("the same parameter stands there twice, with and without params/ or /value")
    loras = {key: by_plain.pop(key) for key in sorted(by_plain) if re.search(r"(/|_)lora_[ab]$", key)}
    pi05 = any("pre_attention_norm_1/Dense_0/" in key for key in by_plain)
    recipes: dict[str, Recipe] = {}
    unexpected = []
    for plain, key in by_plain.items():
        made = _jax_entries(plain, key, shapes[key])
        if not made:
            unexpected.append(key)
        a, b, rule = _jax_lora(plain)
        if (a in loras) != (b in loras):
            raise CheckpointError(f"LoRA with only one of {a} and {b}")
        if a in loras:
            lora = Lora(loras.pop(a), loras.pop(b), rule)  # alpha / rank is 1 in openpi's variants
            made = {name: replace(recipe, lora=lora) for name, recipe in made.items()}
        recipes |= made
    if loras:
        raise CheckpointError(f"LoRA weights for layers that the file does not have: {listed(loras)}")
    heads = {}
    q, siglip = (by_plain.get(f"PaliGemma/{rest}") for rest in (_Q_EINSUM, _SIGLIP_QUERY))
    if q and len(shapes[q]) == 4:
        heads |= {"gemma": shapes[q][1]}
    if siglip and len(shapes[siglip]) == 4:
        heads |= {"vision": shapes[siglip][2]}
    return Plan("jax", pi05, recipes, tuple(unexpected), (), heads)


_Q_EINSUM = "llm/layers/attn/q_einsum/w"
_SIGLIP_QUERY = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"


def _jax_lora(plain: str) -> tuple[str, str, str]:
    """A weight's key -> the keys of its LoRA's A and B, and their rule (openpi: models/lora.py)."""
    stem = plain.removesuffix("w") if plain.endswith("/w") else plain + "_"
    return stem + "lora_a", stem + "lora_b", "heads" if "attn_vec_einsum" in plain else "einsum"


def _jax_entries(plain: str, key: str, shape: tuple[int, ...]) -> dict[str, Recipe]:
    """The parameters that one JAX array holds; none if its name is not known."""
    parts = plain.split("/")
    if parts[0] != "PaliGemma":
        if len(parts) == 2 and parts[1] in ("kernel", "bias"):
            return {f"{parts[0]}.{'weight' if parts[1] == 'kernel' else 'bias'}": _dense(key, parts[1])}
        return {}
    rest = "/".join(parts[1:])
    if rest == "llm/embedder/input_embedding":
        return {EMBEDDING: Recipe(key)}
    if rest.startswith("llm/"):
        return _jax_gemma(rest.removeprefix("llm/"), key, shape)
    if rest.startswith("img/Transformer/encoderblock/"):
        return _jax_siglip(rest.removeprefix("img/Transformer/encoderblock/"), key, shape)
    single = {
        "img/embedding/kernel": (VISION + "embeddings.patch_embedding.weight", Recipe(key, turn=_conv)),
        "img/embedding/bias": (VISION + "embeddings.patch_embedding.bias", Recipe(key)),
        "img/pos_embedding": (VISION + "embeddings.position_embedding.weight", Recipe(key, turn=_first)),
        "img/Transformer/encoder_norm/scale": (VISION + "post_layernorm.weight", Recipe(key)),
        "img/Transformer/encoder_norm/bias": (VISION + "post_layernorm.bias", Recipe(key)),
        "img/head/kernel": (PROJECTOR + "weight", Recipe(key, turn=_transpose)),
        "img/head/bias": (PROJECTOR + "bias", Recipe(key)),
    }
    return dict([single[rest]]) if rest in single else {}


def _dense(key: str, kind: str) -> Recipe:
    return Recipe(key, turn=_transpose if kind == "kernel" else None)


def _jax_gemma(rest: str, key: str, shape: tuple[int, ...]) -> dict[str, Recipe]:
    match = re.fullmatch(r"(layers/)?(attn/)?(\w+?)(_1)?(/Dense_0)?/(w|scale|kernel|bias|gating_einsum|linear)", rest)
    if not match:
        return {}
    stacked, _, module, expert, dense, leaf = match.groups()
    root = EXPERT if expert else VLM
    kind = {"scale": "weight", "kernel": "dense.weight", "bias": "dense.bias"}.get(leaf, "")
    if module == "final_norm" and kind and not stacked:
        return {f"{root}norm.{kind}": _dense(key, leaf)}
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    pieces: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor] | None]] = {}
    if module in norms and kind and bool(dense) == (leaf != "scale"):
        pieces = {f"{norms[module]}.{kind}": ((), _transpose if leaf == "kernel" else None)}
    elif (module, leaf) == ("q_einsum", "w"):
        pieces = {"self_attn.q_proj.weight": ((), _heads_first)}
    elif (module, leaf) == ("kv_einsum", "w"):
        pieces = {"self_attn.k_proj.weight": ((0,), _heads_first), "self_attn.v_proj.weight": ((1,), _heads_first)}
    elif (module, leaf) == ("attn_vec_einsum", "w"):
        pieces = {"self_attn.o_proj.weight": ((), _out)}
    elif (module, leaf) == ("mlp", "gating_einsum"):
        pieces = {"mlp.gate_proj.weight": ((0,), _transpose), "mlp.up_proj.weight": ((1,), _transpose)}
    elif (module, leaf) == ("mlp", "linear"):
        pieces = {"mlp.down_proj.weight": ((), _transpose)}
    if not stacked or not pieces:
        return {}
    return {
        f"{root}layers.{layer}.{name}": Recipe(key, (layer, *index), turn)
        for layer in range(shape[0] if shape else 0)
        for name, (index, turn) in pieces.items()
    }


def _jax_siglip(rest: str, key: str, shape: tuple[int, ...]) -> dict[str, Recipe]:
    module, _, leaf = rest.rpartition("/")
    attention = module.removeprefix("MultiHeadDotProductAttention_0/")
    turn: Callable[[torch.Tensor], torch.Tensor] | None = None
    if module in ("LayerNorm_0", "LayerNorm_1") and leaf in ("scale", "bias"):
        name = f"layer_norm{int(module[-1]) + 1}"
    elif leaf not in ("kernel", "bias"):
        return {}
    elif module in _SIGLIP_DENSE:
        name, turn = _SIGLIP_DENSE[module], _transpose if leaf == "kernel" else None
    elif attention in _SIGLIP_HEADS:
        name, turn = f"self_attn.{_SIGLIP_HEADS[attention]}", _vision_heads if leaf == "kernel" else _flat
    elif attention == "out":
        name, turn = "self_attn.out_proj", _out if leaf == "kernel" else None
    else:
        return {}
    end = "bias" if leaf == "bias" else "weight"
    return {
        f"{VISION}encoder.layers.{layer}.{name}.{end}": Recipe(key, (layer,), turn)
        for layer in range(shape[0] if shape else 0)
    }


# --- shapes of parameters, and lists of keys for errors ---------------------------------------------------------------


def made_shapes(recipes: Mapping[str, Recipe], shapes: Shapes) -> dict[str, tuple[int, ...] | str]:
    """The shape of every parameter that the recipes make, or the reason why they cannot be followed."""

    def read(key: str, index: tuple[int, ...]) -> torch.Tensor:
        rest = shapes[key]
        for i in index:
            if not rest or i >= rest[0]:
                raise CheckpointError(f"{key} has shape {list(shapes[key])}, no item {list(index)}")
            rest = rest[1:]
        return torch.empty(rest, device="meta")

    made: dict[str, tuple[int, ...] | str] = {}
    for name, recipe in recipes.items():
        try:
            made[name] = tuple(recipe.make(read).shape)
        except (RuntimeError, IndexError, ValueError) as error:
            found = ", ".join(f"{key} {list(shapes[key])}" for key in recipe.reads)
            reason = f": {error}" if isinstance(error, CheckpointError) else ""  # torch's own words do not help
            made[name] = f"cannot be made from {found}{reason}"
    return made


def listed(keys: Mapping[str, object] | list[str]) -> str:
    """Every key, those that differ in a layer number alone written as one: 'layers.{0-17}.mlp.up_proj.weight'."""
    groups: dict[tuple[str, str], list[int]] = {}
    for key in sorted(keys):
        match = re.match(r"(.*?layers\.)(\d+)(\..*)", key)
        if match and len(match[2]) < 10:
            groups.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            groups[(key, "")] = []
    return ", ".join(start + _ranges(numbers) + end for (start, end), numbers in groups.items())


def _ranges(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs) + "}"
