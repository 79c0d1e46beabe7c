"""Nothing that is read from a run's folder, a weights folder or a cache can run code, whatever the
manifest says."""

import json
import pickle
import re

import pytest
import torch
from conftest import RUN_FLAGS, conversations, write_jsonl
from running import ROOT, run_ranks
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from model.lm import LMConfig, MiniMindLM
from model.lora import read_adapter
from model.reward import load_reward_model
from model.weights import load_model
from runtime import checkpoint
from runtime.optim import make_optimizer
from runtime.saving import background, store

IDENTITY = {"the last step": 1, "--dim": 32}


class Payload:
    """What a pickle holds that writes a file when it is read."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


class Foreign:
    """A harmless object of somebody else's class, as of scikit-learn."""


def swap(path, content, form: str) -> None:
    """Put an object in the place of a file of a checkpoint, and its hash into the manifest."""
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        with open(path, "wb") as file:  # torch takes no path that begins with a dot
            torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    folder = next(parent for parent in path.parents if (parent / store.MANIFEST).exists())
    manifest = json.loads((folder / store.MANIFEST).read_text())
    manifest["files"][str(path.relative_to(folder))] = store.describe(path)
    (folder / store.MANIFEST).write_text(json.dumps(manifest))


def small_model() -> MiniMindLM:
    return MiniMindLM(
        LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=32)
    )


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A run folder with one checkpoint of the plain stages, saved and read in this process."""
    monkeypatch.setattr(background, "_buffers", {})
    save(tmp_path / "run", small_model())
    return tmp_path / "run"


def save(run, model: MiniMindLM) -> None:
    optimizer = make_optimizer(model, "adamw", 1e-3, 0.1)
    model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    progress = {
        "step": 1,
        "epoch": 0,
        "step_in_epoch": 1,
        "tokens": 8,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "total_steps": 1,
    }
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    checkpoint.save_run(run, 1, model, optimizer, scaler, progress, IDENTITY)
    checkpoint.wait()


def resume(run) -> dict:
    model = small_model()
    found, _ = checkpoint.find_run(run, "auto", IDENTITY, accept=False)
    return checkpoint.load_run(found, model, make_optimizer(model, "adamw", 1e-3, 0.1), None)


def refusal(call, *args) -> str:
    with pytest.raises(ValueError) as raised:
        call(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_weights_that_are_not_finite_are_refused(saved):
    broken = small_model()
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    save(saved, broken)
    assert "has values that are not finite" in refusal(resume, saved)


FOREIGN = [[1, 2], Foreign(), {"step": 5}, torch.nn.Linear(2, 2)]
FILES = (".metadata", "__0_0.distcp", "run.pt")


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_of_the_plain_stages_runs_nothing(saved, tmp_path, name, form):
    assert resume(saved)["step"] == 1
    path = saved / "checkpoints/step_00000001" / name
    swap(path, Payload(tmp_path / "marker"), form)
    assert str(path) in refusal(resume, saved)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: type(content).__name__)
def test_foreign_content_of_a_checkpoint_is_named_in_one_line(saved, name, content):
    path = saved / "checkpoints/step_00000001" / name
    swap(path, content, "pickle" if name == ".metadata" else "torch")
    assert str(path) in refusal(resume, saved)


def test_an_entry_of_the_metadata_that_would_be_unpickled_is_refused(saved, tmp_path):
    """torch.distributed.checkpoint loads what is no tensor with weights_only=False."""
    folder = saved / "checkpoints/step_00000001"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, place = next(
        (i, p) for i, p in metadata.storage_data.items() if i.fqn == "model.model.norm.weight"
    )
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != index.fqn}
    bare = type(index)(index.fqn)
    metadata.storage_data[bare] = type(place)("payload", 0, 0)
    torch.save(Payload(tmp_path / "marker"), folder / "payload")
    metadata.storage_data[bare].length = (folder / "payload").stat().st_size
    swap(folder / ".metadata", metadata, "pickle")
    assert f"{folder / '.metadata'}" in refusal(resume, saved)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_weights_adapters_and_reward_models_run_nothing(tmp_path, form):
    config = small_model().config.to_json()
    settings = (
        '"lora": {"rank": 1, "alpha": 1, "dropout": 0, "targets": ["q_proj"], "base_sha256": ""}'
    )
    for load, text in (
        (load_model, config),
        (read_adapter, config.rstrip("}\n") + f", {settings}}}"),
        (load_reward_model, config.rstrip("}\n") + ', "head": "score"}'),
    ):
        path = tmp_path / f"{load.__name__}.pth"
        path.with_suffix(".json").write_text(text)
        content = {"model.embed_tokens.weight": Payload(tmp_path / "marker")}
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
        said = refusal(load, path)
        assert str(path) in said and "not a weights file" in said and "two options" not in said
    assert not (tmp_path / "marker").exists()


ENGINES = {
    "accelerate": [
        "engine/pytorch_model.bin",
        "engine/optimizer.bin",
        "engine/random_states_0.pkl",
    ],
    "deepspeed": [
        "deepspeed/mp_rank_00_model_states.pt",
        "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
    "lightning": ["engine"],
    "lightning, model_parallel": ["engine/.metadata", "engine/meta.pt"],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_an_engine_runs_nothing(tmp_path, engine):
    """Nor is anything passed over in silence; what the engine wrote itself is read as before."""
    files, (engine, _, strategy) = ENGINES[engine], engine.partition(", ")
    pytest.importorskip(engine)
    data = write_jsonl(tmp_path / "data.jsonl", conversations(8))
    job = [
        f"trainer/train_sft_{engine}.py",
        *RUN_FLAGS,
        f"--data_path={data}",
        f"--cache_dir={tmp_path / 'cache'}",
    ]
    job += ["--from_weight=none", f"--out_dir={tmp_path}", "--batch_size=2", "--save_total_limit=9"]
    job += ["--resume=auto", "--resume_with_changes"]
    job, nproc = ([*job, "--ddp", f"--strategy={strategy}"], 2) if strategy else (job, None)
    run_ranks(*job, "--max_steps=1", nproc=nproc)
    folder = tmp_path / "full_sft_32/checkpoints/step_00000001"
    for name in files:
        whole = (folder / name).read_bytes()
        swap(
            folder / name,
            Payload(tmp_path / "marker"),
            "pickle" if name.endswith("metadata") else "torch",
        )
        printed = run_ranks(*job, "--max_steps=2", code=2, nproc=nproc)
        assert re.search(rf"^error: .*{re.escape(str(folder / name))}", printed, re.MULTILINE), (
            printed
        )
        assert "Traceback" not in printed and not (tmp_path / "marker").exists()
        (folder / name).write_bytes(whole)
        manifest = json.loads((folder / store.MANIFEST).read_text())
        manifest["files"][name] = store.describe(folder / name)
        (folder / store.MANIFEST).write_text(json.dumps(manifest))
    assert "behind step 1" in run_ranks(*job, "--max_steps=2", nproc=nproc)


def test_a_tokenizer_folder_runs_nothing(tmp_path, tokenizer):
    """auto_map names Python files of the folder, which transformers would import with
    trust_remote_code."""
    from dataset.lm_dataset import load_tokenizer

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Mine: pass\n"
    )
    for name in ("tokenizer_config.json", "config.json"):
        settings = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
        settings |= {"auto_map": {"AutoTokenizer": [None, "code.Mine"], "AutoConfig": "code.Mine"}}
        (tmp_path / name).write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).encode("hello") == tokenizer.encode("hello")
    assert not (tmp_path / "marker").exists()


UNSAFE = (
    r"weights_only=False|\bpickle\.loads?\(|allow_pickle|trust_remote_code|joblib|FileSystemReader|"
)
UNSAFE += r"yaml\.(unsafe_)?load\(|(?<!\.)\b(eval|exec)\("


def test_no_other_reader_of_files_than_the_safe_ones():
    """`runtime/saving/safe_load.py` is the one place for pickles; whatever else loads tensors says
    weights_only=True."""
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name.split("/")[0] in ("tests", "benchmarks", ".venv"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.endswith("# our own prototypes"):  # of functions in C++
                continue
            loads = "torch.load(" in line and "weights_only=True" not in line
            if (loads or re.search(UNSAFE, line)) and name not in (
                "runtime/saving/safe_load.py",
                "dataset/file_kinds.py",
            ):
                wrong.append(f"{name}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)
