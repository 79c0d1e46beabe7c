"""The progress of a run on a terminal: a bar of its steps, with the newest numbers."""

from tqdm import tqdm


def open_bar(total_steps: int, first_step: int) -> tqdm:
    """A bar of optimizer steps, of which `first_step` are behind us."""
    return tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)


def show_step(bar: tqdm, metrics: dict, rate: float) -> None:
    """Move the bar to the step of a training line.

    Args:
        metrics: see `Tracker.log`.
        rate: supervised tokens per second.
    """
    bar.update(metrics["step"] - bar.n)
    shown = {"loss": f"{metrics['loss']:.4f}", "lr": f"{metrics['lr']:.2e}"}
    shown |= {"grad": f"{metrics['grad_norm']:.2f}", "sup_tok/s": f"{rate:,.0f}"}
    bar.set_postfix(shown)
