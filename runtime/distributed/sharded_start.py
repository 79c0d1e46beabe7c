"""The start of a model that processes share: none of them ever holds all of it.

The model is made without memory, wrapped, and then every process fills its own parts: from its
files, reading no more than that, or with the random numbers that a whole model would have had.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.lm import MiniMindLM, init_parameter
from model.meta_device import SkipRandomInit, on_meta_device
from model.weights import allocate, open_weights
from runtime.device import is_sharded, local


@dataclass
class Fill:
    """Gives a model its values once it has been shared out.

    Attributes:
        values: the tensors in their order: names, and what writes a part of one, (out, part).
    """

    values: Callable[[], Iterable[tuple[str, Callable]]]

    @torch.no_grad()
    def __call__(self, model: MiniMindLM, device: torch.device) -> None:
        """Give the parts that are here memory and values. ValueError: one is not finite."""
        allocate_parts(model, device)
        parameters = dict(model.named_parameters())  # of a stage of a pipeline: some
        for name, write in self.values():
            if name in parameters:
                p = parameters[name]
                write(local(p), own_part(p))


def allocate_parts(model: MiniMindLM, device: torch.device) -> None:
    """As `model.weights.allocate`, of a model whose parameters may be spread over processes."""
    if not any(is_sharded(p) for p in model.parameters()):
        allocate(model, device)
        return
    model.to_empty(device=device)
    if model.config.tie_embeddings:  # to_empty makes two parameters of one
        model.lm_head.weight = model.model.embed_tokens.weight
    if hasattr(model, "score"):
        nn.init.zeros_(model.score.weight)


def build(
    make: Callable[[], nn.Module], path: Path | None, resumed: Path | None
) -> tuple[nn.Module, Fill]:
    """A model on the meta device, and what gives its parts their values once they have memory.

    Args:
        make: makes the model, whose values are random.
        path: weights, a file or a folder; None: it begins with random ones.
        resumed: a checkpoint, which brings the values later.

    Raises:
        ValueError: the weights are damaged, or made for another model.
    """
    if resumed is None and path is None:
        model, state = make_without_memory(make)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        values = functools.partial(random_values, state, shapes, model.config.n_layers)
        return model, Fill(values)
    with on_meta_device():
        model = make()
    tensors = {} if resumed is not None else open_weights(model, path, True, lazily=True)
    return model, Fill(lambda: [(name, tensor.copy_to) for name, tensor in tensors.items()])


def make_without_memory(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    """A model on the meta device that has drawn the random numbers of a real one.

    Layers are made one after the other, and give their memory back when they are put into place.

    Returns:
        The model; the state of the generator when all its layers were there, and it would have
        drawn its values.
    """
    states = []

    def drop_memory(parent: nn.Module, name: str, layer: nn.Module) -> None:
        if name == "lm_head":  # the last one of a MiniMindLM; what is based on it may replace it
            states.append(torch.get_rng_state())
        for key, p in layer.named_parameters(recurse=False):
            setattr(layer, key, nn.Parameter(torch.empty_like(p, device="meta")))

    hook = nn.modules.module.register_module_module_registration_hook(drop_memory)
    try:
        with SkipRandomInit():
            return make(), states[0]
    finally:
        hook.remove()


def random_values(
    state: Tensor, shapes: dict[str, torch.Size], n_layers: int
) -> Iterator[tuple[str, Callable]]:
    """For a `Fill`, those of a random start: whole tensors are drawn one after the other.

    Args:
        state: of the generator, see `make_without_memory`.
        shapes, n_layers: of the whole model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        for name, shape in shapes.items():
            if name == "score.weight":  # of a reward model, which keeps its zeros
                continue
            whole = torch.ones(shape)  # norms stay so
            init_parameter(name, whole, n_layers)
            yield name, lambda out, part, whole=whole: out.copy_(whole[part])


def add_factors(start, targets: list[str]) -> None:
    """Have `start.fill` give LoRA's factors their values, too, as `add_lora` draws them.

    Args:
        targets: names of layers, in the order in which they got their factors.
    """
    fill, state = start.fill, torch.get_rng_state()

    @torch.no_grad()
    def fill_all(model: MiniMindLM, device: torch.device) -> None:
        fill(model, device)
        factors = [(n, p) for n, p in model.named_parameters() if ".lora_" in n]
        factors.sort(key=lambda factor: targets.index(factor[0].split(".")[-2]))
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            for name, p in factors:
                whole = torch.zeros(p.shape)
                if name.endswith("lora_A"):
                    nn.init.normal_(whole, std=p.size(1) ** -0.5)
                local(p).copy_(whole[own_part(p)])

    start.fill = fill_all


def own_part(p: Tensor) -> tuple[slice, ...]:
    """Which part of a whole tensor this process holds."""
    if not is_sharded(p):
        return tuple(slice(0, size) for size in p.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
