"""A save at the end of a run, and one in the middle, which is written beside training."""

import pytest
import torch
from conftest import checkpoint_tensors

from model.lm import LMConfig, MiniMindLM
from runtime import checkpoint
from runtime.optim import make_optimizer
from runtime.saving import background, safe_load, validity

IDENTITY = {"--dim": 32, "the last step": 2}
CONFIG = LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=32)


@pytest.fixture
def run(monkeypatch):
    """Return (model, optimizer, scaler, progress) behind the first step."""
    monkeypatch.setattr(background, "_buffers", {})
    torch.manual_seed(0)
    model = MiniMindLM(CONFIG)
    optimizer = make_optimizer(model, "adamw", 1e-3, 0.1)
    model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    progress = {"step": 1, "epoch": 0, "tokens": 8, "total_steps": 2}
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=False), progress


def save(folder, run) -> None:
    checkpoint.save_run(folder, 1, *run, IDENTITY)
    checkpoint.save_weights(folder.with_suffix(".pth"), run[0].state_dict(), CONFIG.to_json())


def test_a_save_beside_training_is_that_of_its_step(run, tmp_path):
    """What changes while it is written is not in it; all else is as in a save at the end."""
    model, optimizer, _, progress = run
    save(tmp_path / "middle", run)
    whole = [value.clone() for value in model.state_dict().values()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    progress["step"] = 2
    checkpoint.wait()
    with torch.no_grad():
        for p, value in zip(model.state_dict().values(), whole, strict=True):
            p.copy_(value)
    progress |= {"step": 1, "total_steps": 1}
    save(tmp_path / "end", run)
    folders = [tmp_path / name / "checkpoints/step_00000001" for name in ("middle", "end")]
    assert [validity.fault(folder) for folder in folders] == ["", ""]
    middle, end = map(checkpoint_tensors, folders)
    assert middle.keys() == end.keys()
    assert any(name.startswith("optimizer.") for name in middle)
    assert all(torch.equal(middle[name], end[name]) for name in middle)
    runs = [safe_load.load(folder / "run.pt") for folder in folders]
    assert runs[0]["progress"] == runs[1]["progress"] | {"total_steps": 2}
    assert runs[0]["identity"] == runs[1]["identity"] == IDENTITY
    texts = [(tmp_path / f"{name}.json").read_text() for name in ("middle", "end")]
    assert texts == [CONFIG.to_json()] * 2
    states = [torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("middle", "end")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_save_at_the_end_is_there_at_once(run, tmp_path):
    run[-1]["total_steps"] = 1
    save(tmp_path / "run", run)
    assert validity.fault(tmp_path / "run/checkpoints/step_00000001") == ""
    assert (tmp_path / "run.pth").exists() and not checkpoint._state["beside"]


@pytest.mark.parametrize("total_steps", [1, 2], ids=["at the end", "beside training"])
def test_a_save_that_fails_says_so_and_leaves_the_weights(run, tmp_path, total_steps):
    """Beside training the next save, or the end, tells it; what was to follow is not written."""
    run[-1]["total_steps"] = total_steps
    (tmp_path / "run").write_text("a file where a folder is to be")
    fault = "cannot save the checkpoint of step 1 in .*: Not a directory; none was saved before"
    with pytest.raises(OSError, match=fault):
        save(tmp_path / "run", run)
        checkpoint.wait()
    assert not list(tmp_path.glob("run.*"))
    checkpoint.wait()  # was told, and is over
