"""--resume of a run whose start is gone: its own weights say what it is."""

from pathlib import Path


def own_weights(args, suffix: str) -> Path:
    """The weights of a run that goes on though what it started from is not there any more."""
    path = Path(args.out_dir) / f"{args.save_weight}{suffix}.pth"
    others = list(path.parent.glob(f"{args.save_weight}_[0-9]*.pth"))
    return others[0] if len(others) == 1 else path  # a folder said how wide it is
