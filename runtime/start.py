"""What a stage starts from: the weights of --from_weight, their shape and their tokenizer."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dataset.tokenizer import LazyTokenizer
from model.config import LMConfig
from model.initial import on_meta_device
from runtime import tokenizer_record
from runtime.ranks import SHARDED, mesh_sizes, world

SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe")
EXPERT_SIZES = ("n_experts", "n_experts_per_tok", "n_shared_experts")
# Fields of an LMConfig that have a flag, or none because they are no part of a model's shape
OUTSIDE_THE_SHAPE = {*SIZES, *EXPERT_SIZES, "dropout", "aux_loss_alpha", "max_seq_len"}
OUTSIDE_THE_SHAPE |= {"vocab_size", "tokenizer"}
SMALL = 2**26  # layers x width x width of the MLP that any machine has memory for
LONGEST_ROW = 512  # tokens, where --max_seq_len is not given and the context allows more


@dataclass
class Start:
    """What a stage starts from, see `open_start`.

    Attributes:
        path: a weights file, or a folder in Hugging Face's format; None: random weights.
        line: says so.
        shape: of the model, without its vocabulary.
        tokenizer: of the weights; loaded on first use.
        vocab_size: of the weights; None: as many as the tokenizer has entries.
        may_be_padded: the vocabulary beyond the tokenizer. Not in weights of ours that do not say
            what tokenizer they were trained with.
        run_dir: of what the run writes; its weights lie beside it.
        fill: of `build`, where processes share the model: gives their parts the values.
    """

    path: Path | None
    line: str
    shape: LMConfig
    tokenizer: LazyTokenizer
    vocab_size: int | None
    may_be_padded: bool
    run_dir: Path
    fill: Callable[[nn.Module, torch.device], None] | None = None

    @functools.cached_property
    def config(self) -> LMConfig:
        """The shape with its vocabulary, and the record of the tokenizer.

        Ask for it once the data is open: a warm token cache knows the size of the tokenizer.

        Raises:
            ValueError: the tokenizer does not fit the weights.
        """
        entries = self.vocab_size or len(self.tokenizer)
        tokenizer_record.check_size(self.tokenizer, entries, self.may_be_padded)
        record = tokenizer_record.record_of(self.tokenizer)
        return replace(self.shape, vocab_size=entries, tokenizer=record)

    def build(
        self,
        make: Callable[[], nn.Module],
        args,
        resumed: Path | None = None,
        shared: bool | None = None,
    ) -> nn.Module:
        """`build_model` with these weights; says where they come from, and sets `fill`."""
        if resumed is None and world()[0] == 0:
            print(self.line, flush=True)
        model, self.fill = build_model(make, args, self.path, resumed, shared)
        return model


def build_model(
    make: Callable[[], nn.Module],
    args,
    path: Path | None,
    resumed: Path | None = None,
    shared: bool | None = None,
) -> tuple[nn.Module, Callable[[nn.Module, torch.device], None] | None]:
    """A model on its device, with the values that it starts from.

    Args:
        make: makes the model, whose values are random.
        args: `device`, and `strategy`, which is chosen.
        path: a weights file or a folder; None: random values.
        resumed: the checkpoint whose values `checkpoint.load_run` puts in later.
        shared: whether processes share the model; by default as `args.strategy` and the mesh say.

    Returns:
        The model and None. Where processes share it, it has no memory yet: `parallel.wrap` gives
        each its part, and what is returned here instead of None gives that part its values.

    Raises:
        ValueError: the weights are damaged, or made for another model.
    """
    if shared is None:
        shared = args.strategy in SHARDED or mesh_sizes["tensor"] > 1
    if shared:
        from runtime.distributed import sharded_start

        return sharded_start.build(make, path, resumed)
    if path is None and resumed is None:
        return make().to(args.device), None
    from model.weights import allocate, load_weights

    with on_meta_device():  # the values come from elsewhere: none are made
        model = make()
    if resumed is None:
        load_weights(model, path, new_head=True, device=args.device)
    else:
        allocate(model, args.device)
    return model, None


def open_start(args, default: str, teacher: Path | None = None, required: bool = True) -> Start:
    """Find what --from_weight means; sets the flags of the shape, of rows and of the tokenizer.

    Args:
        args: the flags of the stage.
        default: the stage whose weights are taken, if they are there, without --from_weight.
        teacher: weights whose vocabulary and tokenizer a model without weights takes over.
        required: weights that are named must be there. A run that goes on does without.

    Raises:
        ValueError: there are no such weights; a flag contradicts their shape; their tokenizer is
            not there, or another one is given.
    """
    required = required and args.resume == "none"
    path, line = find_weights(args.from_weight, default, args, required)
    weights = read_shape(path)
    if path is not None and not path.exists():
        from runtime.saving.own_weights import own_weights

        weights = read_shape(own_weights(args, suffix_of(args)))
    given = {n: vars(args)[n] for n in (*SIZES, *EXPERT_SIZES) if vars(args)[n] is not None}
    if "use_moe" in given:
        given["use_moe"] = bool(given["use_moe"])
    if weights is not None:
        check_sizes(weights, given, path)
    shape = LMConfig(**given) if weights is None else weights
    set_context(args, shape, 0 if weights is None else weights.max_seq_len)
    shape = replace(shape, dropout=args.dropout, aux_loss_alpha=LMConfig.aux_loss_alpha)
    if shape.n_layers * shape.dim * shape.hidden_dim > SMALL or shape.use_moe:
        from runtime.machine import check_memory

        check_memory(shape)
    values = asdict(shape)
    vars(args).update({name: int(values[name]) for name in (*SIZES, *EXPERT_SIZES)})
    args.shape = {n: value for n, value in values.items() if n not in OUTSIDE_THE_SHAPE}
    source, known = (teacher, read_shape(teacher)) if weights is None else (path, weights)
    record = tokenizer_record.find_record(source, known.tokenizer if known else None)
    tokenizer = tokenizer_record.open_tokenizer(
        args.tokenizer_dir, args.chat_template, source, record
    )
    args.tokenizer_dir = str(tokenizer.folder)
    vocab_size = known.vocab_size if known else None
    run_dir = Path(args.out_dir) / f"{args.save_weight}{suffix_of(args)}"
    is_foreign = source is not None and source.is_dir()
    may_be_padded = record is not None or is_foreign
    return Start(path, line, shape, tokenizer, vocab_size, may_be_padded, run_dir)


def find_weights(
    name: str | None, default: str, args, required: bool = True
) -> tuple[Path | None, str]:
    """The weights that a flag means, None for random ones; a line that says so.

    Args:
        name: a stage (`pretrain` is `{out_dir}/pretrain_512.pth`), a path, a folder in Hugging
            Face's format, the name of one on the hub, 'none', or None for the stage `default` if
            its file is there.

    Raises:
        ValueError: they are not there, and required.
    """
    if "none" in (name, name or default):
        return None, "starting from random weights"
    from model.newest import is_path

    if name and is_path(name):
        path = Path(name)
        if not name.endswith(".pth") and not path.exists():
            from model.hf import resolve_folder

            try:
                path = resolve_folder(name, "--from_weight")
            except ValueError:
                if required:
                    raise
    else:
        path = Path(args.out_dir) / f"{name or default}{suffix_of(args)}.pth"
        if name and not path.exists() and Path(name).is_dir():
            path = Path(name)
    if not path.exists() and name is None:
        return None, f"starting from random weights: there is no {path}"
    if not path.exists() and required:
        advice = "train that stage first, or see --from_weight"
        others = [] if is_path(name) else sorted(path.parent.glob(f"{name}_[0-9]*.pth"))
        if others:
            advice = f"there is {others[0]}: name it as a path, or its width with --dim"
        raise ValueError(f"{path}: no such weights file; {advice}")
    return path, f"starting from {path}"


def suffix_of(args) -> str:
    """What the shape adds to the name of a run: `_512`, `_512_moe`."""
    return f"_{args.dim or LMConfig.dim}{'_moe' if args.use_moe else ''}"


def read_shape(path: Path | None) -> LMConfig | None:
    """The shape of the model in a weights file or folder; None: no weights, or nothing beside them.

    Raises:
        ValueError: it is damaged, or an adapter's.
    """
    if path is None or not (path.is_dir() or path.with_suffix(".json").is_file()):
        return None
    from model.tensor_file import read_tensors
    from model.weights import read_config

    try:
        return read_config(path, reward=True)
    except ValueError:
        if not path.is_dir():
            read_tensors(path)  # where both are damaged, that of the weights is the error to tell
        raise


def check_sizes(weights: LMConfig, given: dict, path: Path) -> None:
    """ValueError: a size that is given is not that of the weights; names both."""
    names = (*SIZES, *EXPERT_SIZES) if weights.use_moe else SIZES
    for name in names:
        size = getattr(weights, name)
        if given.get(name, size) != size:
            have = f"{path} has {int(size)}"
            remedy = "leave the flag out, or start from other weights"
            raise ValueError(f"--{name} {int(given[name])}: {have}; {remedy}")


def set_context(args, shape: LMConfig, least: int) -> None:
    """--max_seq_len and --rope_scaling: the context of the model, and the longest row.

    Args:
        least: the context of the weights, which shorter rows leave as it is; 0 without weights.
    """
    if args.rope_scaling:
        from model.rope import extend_context

        extend_context(shape, args.rope_scaling)
        least = shape.max_seq_len
    shape.max_seq_len = max(least, args.max_seq_len or shape.max_seq_len)
    args.max_seq_len = args.max_seq_len or min(LONGEST_ROW, shape.max_seq_len)
