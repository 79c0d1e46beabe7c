"""What a stage starts from: the weights of --from_weight, their shape and their tokenizer."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dataset.tokenizer import OURS, LazyTokenizer, load_tokenizer, record_of
from model.config import LMConfig
from runtime.ranks import is_shared, world

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
        if self.vocab_size:
            from runtime.recorded_tokenizer import check_size

            check_size(self.tokenizer, entries, self.may_be_padded)
        record = record_of(self.tokenizer)
        return replace(self.shape, vocab_size=entries, tokenizer=record)

    def build(
        self, make: Callable, args, resumed: Path | None = None, shared: bool | None = None
    ) -> nn.Module:
        """A model on its device, with the values that it starts from; says where they come from.

        Args:
            make: () -> the model, with random values.
            args: `device`, and `strategy`, which is chosen.
            resumed: the checkpoint whose values `checkpoint.load_run` puts in later.
            shared: whether processes share the model; by default as `args.strategy` and the mesh
                say. It has no memory then: `parallel.wrap` gives each its part, `fill` the values.

        Raises:
            ValueError: the weights are damaged, or made for another model.
        """
        if resumed is None and world()[0] == 0:
            print(self.line, flush=True)
        if shared is None:
            shared = is_shared(args)
        if not (shared or self.path or resumed):
            return make().to(args.device)
        from runtime import given_weights

        model, self.fill = given_weights.build(make, args.device, self.path, resumed, shared)
        return model


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
    weights = source = known = None
    if path or teacher:
        from runtime import given_weights

        weights, source, known = given_weights.read_shapes(path, teacher, args, suffix_of(args))
    shape = choose_shape(args, weights, path)
    if source:
        from runtime import recorded_tokenizer

        tokenizer, may_be_padded = recorded_tokenizer.open_tokenizer(
            source, known.tokenizer if known else None, args.tokenizer_dir, args.chat_template
        )
    else:
        folder = args.tokenizer_dir or OURS
        tokenizer, may_be_padded = load_tokenizer(folder, args.chat_template), False
    args.tokenizer_dir = str(tokenizer.folder)
    vocab_size = known.vocab_size if known else None
    run_dir = Path(args.out_dir) / f"{args.save_weight}{suffix_of(args)}"
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
    path = Path(args.out_dir) / f"{name or default}{suffix_of(args)}.pth"
    if name is None and not path.exists():
        return None, f"starting from random weights: there is no {path}"
    if name:
        from runtime import given_weights

        path = given_weights.find(name, path, required)
    return path, f"starting from {path}"


def suffix_of(args) -> str:
    """What the shape adds to the name of a run: `_512`, `_512_moe`."""
    return f"_{args.dim or LMConfig.dim}{'_moe' if args.use_moe else ''}"


def choose_shape(args, weights: LMConfig | None, path: Path | None) -> LMConfig:
    """The shape of the model: that of its weights, or as the flags and their defaults say.

    Sets the flags of sizes, --max_seq_len, and `args.shape`: what of the shape has no flag.

    Raises:
        ValueError: a flag contradicts the weights at `path`, or the model has no room here.
    """
    given = {n: vars(args)[n] for n in (*SIZES, *EXPERT_SIZES) if vars(args)[n] is not None}
    if "use_moe" in given:
        given["use_moe"] = bool(given["use_moe"])
    shape, least = weights, 0
    if shape is None:
        shape = LMConfig(**given)
    else:
        from runtime.given_weights import check_sizes

        check_sizes(shape, given, path)
        least = shape.max_seq_len  # shorter rows leave it as it is
    if args.rope_scaling:
        from model.rope import extend_context

        extend_context(shape, args.rope_scaling)
        least = shape.max_seq_len
    shape.max_seq_len = max(least, args.max_seq_len or shape.max_seq_len)
    args.max_seq_len = args.max_seq_len or min(LONGEST_ROW, shape.max_seq_len)
    shape = replace(shape, dropout=args.dropout, aux_loss_alpha=LMConfig.aux_loss_alpha)
    if shape.n_layers * shape.dim * shape.hidden_dim > SMALL or shape.use_moe:
        from runtime.machine import check_memory

        check_memory(shape)
    values = asdict(shape)
    vars(args).update({name: int(values[name]) for name in (*SIZES, *EXPERT_SIZES)})
    args.shape = {n: value for n, value in values.items() if n not in OUTSIDE_THE_SHAPE}
    return shape
