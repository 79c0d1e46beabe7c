"""Chat with a model that no single device holds: its blocks lie on GPUs, in CPU memory, on disk.

Embedding, last norm and head lie on the first device, and whatever lies in slower memory is
computed there as well. Accelerate's hooks move weights and activations; what they do not know of,
the positions and masks of a pass and the KV cache, is moved here.
"""

import dataclasses
import logging
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from model.hf import meta_model
from model.kv_cache import Decoder
from model.layout import Layout
from model.lm import LMConfig, MiniMindLM
from model.weights import open_weights, read_config
from runtime.machine import GIB, machine_memory

Device = int | str  # the number of a GPU, "mps", "cpu" or "disk"
SHARE = 0.9  # of the memory that is free; the rest is for activations


def load_spread(path: Path, dtype: torch.dtype, max_memory: list[str] | None = None) -> MiniMindLM:
    """Load a model over several devices: the GPUs first, then CPU memory, then the disk.

    Its input and its logits are on the device of `model.lm_head.weight`. What lies on disk is in a
    temporary folder, which goes with the model.

    Args:
        path: a .pth file, or a folder in Hugging Face's format.
        max_memory: what may be used, as ["0=20GiB", "cpu=64GiB"]; by default most of what is free.

    Raises:
        ValueError: accelerate is not installed, a limit makes no sense, or not even embedding, head
            and one block fit on the first device.
    """
    try:
        from accelerate import dispatch_model
        from accelerate.utils import set_module_tensor_to_device
    except ImportError:
        raise ValueError("--device_map needs accelerate: pip install accelerate") from None
    config = read_config(path)
    model = meta_model(config).eval()
    tensors = open_weights(model, path, lazily=True)
    places = place_blocks(model, dtype, free_memory(max_memory))
    main = places[""]
    # A module is tied to nothing on disk: these are always in memory.
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), main) | places
    del device_map[""]
    folder = tempfile.TemporaryDirectory(prefix="minimind_offload_")
    index: dict[str, dict] = {}
    for name, _ in model.named_parameters():
        device = places.get(".".join(name.split(".")[:3]), main)
        value = tensors[name][:].to(dtype)
        if device == "disk":
            write_to_disk(value, name, Path(folder.name), index)
        else:
            set_module_tensor_to_device(model, name, device, value=value)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    # It warns that tensors are on the meta device, as if that were a fault.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    options = {"offload_dir": folder.name, "offload_index": index} if index else {}
    dispatch_model(model, device_map, main_device=main, force_hooks=True, **options)
    model.offload_folder = folder
    keep_layout_near(model, places)
    return model


def describe(model: MiniMindLM) -> str:
    """How many blocks lie where, in a line."""
    counts: dict[str, int] = {}
    for name, device in model.hf_device_map.items():
        if name.startswith("model.layers."):
            place = f"GPU {device}" if isinstance(device, int) else str(device)
            counts[place] = counts.get(place, 0) + 1
    blocks = ", ".join(f"{count} on {place}" for place, count in counts.items())
    return f"blocks: {blocks}"


def free_memory(max_memory: list[str] | None) -> dict[Device, int]:
    """Bytes that may be used of each device, the fastest one first."""
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    memory = {device: int(SHARE * size) for device, size in get_max_memory().items()}
    if (limit := machine_memory()) and "cpu" in memory:  # a container's, unknown to accelerate
        memory["cpu"] = min(memory["cpu"], int(SHARE * limit))
    for text in max_memory or ():
        name, _, size = text.partition("=")
        device = int(name) if name.isdigit() else name
        try:
            size = int(size) if size.isdigit() else convert_file_size_to_int(size)
        except ValueError:
            size = -1
        if device not in memory or size < 0:
            known = ", ".join(map(str, memory))
            form = "must be DEVICE=SIZE, as 0=20GiB or cpu=64GiB"
            raise ValueError(f"--max_memory {text}: {form}; the devices here are {known}")
        memory[device] = size
    return {device: memory[device] for device in sorted(memory, key=lambda d: d == "cpu")}


def place_blocks(
    model: MiniMindLM, dtype: torch.dtype, memory: dict[Device, int]
) -> dict[str, Device]:
    """Fill one device after the other with blocks and their part of a KV cache.

    Args:
        model: on the meta device.
        memory: bytes of each device; "disk" comes behind and has no end.

    Returns:
        Name of a block -> its device; "" -> the first device, where all begins and ends.
    """
    config, width = model.config, torch.empty((), dtype=dtype).element_size()
    cache = width * cache_values(config)
    sizes = {
        f"model.layers.{n}": width * sum(p.numel() for p in block.parameters()) + cache
        for n, block in enumerate(model.model.layers)
    }
    block, total = max(sizes.values()), width * sum(p.numel() for p in model.parameters())
    fixed = total + cache * len(sizes) - sum(sizes.values())  # embedding, head, norm
    main, *others = memory
    room = memory[main] - fixed
    if room < block:
        need = f"embedding, head and one block take {(fixed + block) / GIB:.2f} GiB"
        raise ValueError(f"--device_map: {need}, {main} has {memory[main] / GIB:.2f} GiB")
    on_others = sum(memory[device] for device in others if device != "cpu")
    if sum(sizes.values()) > room + on_others:  # some blocks are fetched, one at a time
        room -= block
    places: dict[str, Device] = {"": main}
    queue = [(device, memory[device]) for device in others] + [("disk", 1 << 62)]
    device = main
    for name, size in sizes.items():
        while size > room:
            device, room = queue.pop(0)
        places[name], room = device, room - size
    return places


def cache_values(config: LMConfig) -> int:
    """Keys and values of a full context, in one block."""
    return 2 * config.n_kv_heads * config.head_dim * config.max_seq_len


def write_to_disk(value: Tensor, name: str, folder: Path, index: dict[str, dict]) -> None:
    """Put a tensor where accelerate's hooks look for it, and into their index."""
    from accelerate.utils import offload_weight

    offload_weight(value, name, str(folder), index)


def keep_layout_near(model: MiniMindLM, places: dict[str, Device]) -> None:
    """Have each block find its positions, masks and KV cache on its own device.

    Args:
        places: of `place_blocks`.
    """
    home = torch.device(places[""])
    devices = []  # where each block computes
    for n in range(len(model.model.layers)):
        place = places[f"model.layers.{n}"]
        devices.append(home if place in ("cpu", "disk") else torch.device(place))
    moved: dict[torch.device, tuple[Layout, Layout]] = {}  # device -> the last layout, its copy

    def with_layout(block, inputs):
        x, layout = inputs
        device = devices[block.self_attn.index]
        if device not in moved or moved[device][0] is not layout:
            moved[device] = layout, move_layout(layout, device)
        return x, moved[device][1]

    def to_main(block, _, outputs):
        x, aux_loss = outputs
        is_last = block.self_attn.index == len(devices) - 1
        return x.to(home) if is_last else x, aux_loss.to(home)

    for block, device in zip(model.model.layers, devices, strict=True):
        if device != home:
            block.register_forward_pre_hook(with_layout)
            block.register_forward_hook(to_main)
    if any(device != home for device in devices):
        model.make_decoder = lambda model, cache: spread_decoder(model, cache, devices)


def move_layout(layout: Layout, device: torch.device) -> Layout:
    """The layout with its tensors on another device, but for those that belong to the host."""

    def move(name: str, value):
        if name == "slots" and value is not None:
            return tuple(part.to(device) for part in value)
        return value.to(device) if isinstance(value, Tensor) and name != "doc_lens" else value

    values = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    return Layout(**{name: move(name, value) for name, value in values.items()})


def spread_decoder(model: nn.Module, cache, devices: list[torch.device]) -> Decoder:
    """The plain decoder, with the keys and values of each block on its device."""
    cache.kv = LayerCaches(cache.kv, devices)
    return Decoder(model, cache)


class LayerCaches:
    """What stands for `KVCache.kv`: a tensor for each layer, indexed as if they were one."""

    def __init__(self, kv: Tensor, devices: list[torch.device]):
        self.device = kv.device
        self.layers = [torch.zeros_like(kv[0], device=device) for device in devices]

    def __getitem__(self, index: int | tuple) -> Tensor:
        layer, *rest = index if isinstance(index, tuple) else (index,)
        return self.layers[layer][tuple(rest)]
