"""What a stage starts from: shape, context and tokenizer of its weights, and what contradicts
them."""

import json
import shutil
import sys

import pytest
import torch
from conftest import chat, write_jsonl
from running import ROOT, run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.toy_tokenizers import byte_level
from model.config import LMConfig
from model.lm import MiniMindLM
from model.weights import config_from_json
from runtime import start
from runtime.saving.identity import identity_of
from runtime.saving.identity_changes import check_identity
from trainer import train_distillation, train_dpo, train_full_sft

OURS = ROOT / "model/minimind_tokenizer"
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rope_theta": 5e3,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as transformers writes it, its vocabulary padded to 1,024."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    assert byte_level(folder, "llama3", 1000) < LLAMA["vocab_size"]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    return folder


@pytest.fixture
def weights(llama, tmp_path):
    """Weights with the record of llama's tokenizer, which lies beside them."""
    shutil.copytree(llama, tmp_path / "tokenizer")
    config = opened(f"--from_weight={llama}", f"--tokenizer_dir={tmp_path / 'tokenizer'}").config
    return save(config, tmp_path / "full_sft_32.pth")


def save(config, path):
    torch.save(MiniMindLM(config).state_dict(), path)
    path.with_suffix(".json").write_text(config.to_json())
    return path


def parse(*flags, stage=train_full_sft):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stage.py", *flags])
        return stage.parse_args()


def opened(*flags, default="pretrain", **options):
    return start.open_start(parse(*flags), default, **options)


def refusal(*flags, **options) -> str:
    with pytest.raises(ValueError) as error:
        _ = opened(*flags, **options).config
    assert "\n" not in str(error.value)
    return str(error.value)


def run(script, *flags, code=0) -> str:
    return run_ranks(script, "--device=cpu", *flags, code=code)


# --------------------------------------------------------------------------------------------------
# Through the scripts
# --------------------------------------------------------------------------------------------------


def test_from_a_llama_over_sft_and_dpo_to_a_chat(llama, tmp_path):
    out = tmp_path / "out"
    data = write_jsonl(tmp_path / "chats.jsonl", [chat(f"say {n}", "yes") for n in range(8)])
    pairs = [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(8)]
    places = (f"--out_dir={out}", f"--cache_dir={tmp_path / 'cache'}", "--max_steps=2")
    printed = run(
        "trainer/train_full_sft.py", *places, f"--data_path={data}", f"--from_weight={llama}"
    )
    assert f"starting from {llama}" in printed
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    base = f"--from_weight={out / 'full_sft_32.pth'}"
    run("trainer/train_dpo.py", *places, f"--data_path={pairs}", base)
    for stage in ("full_sft", "dpo"):
        config = config_from_json(out / f"{stage}_32.json")
        assert (config.dim, config.qk_norm, config.rope_theta) == (32, False, 5e3)
        assert (config.vocab_size, config.max_seq_len, config.norm_eps) == (1024, 96, 1e-6)
        assert config.tokenizer["folder"] == str(llama)
        assert "<|start_header_id|>" in config.tokenizer["chat_template"]
    reply = run("eval_model.py", "--weight=dpo", f"--out_dir={out}", "--prompt=hi")
    assert reply.endswith("\n")
    message = run(
        "eval_model.py",
        f"--weight={out / 'dpo_32.pth'}",
        "--prompt=hi",
        f"--tokenizer_dir={OURS}",
        code=2,
    )
    assert str(OURS) in message and str(llama) in message and "--tokenizer_dir" in message


def test_a_file_of_chat_template_is_recorded_and_taken_over(llama, tmp_path):
    template = (llama / "chat_template.jinja").read_text().replace("<|eot_id|>", "<|end_of_text|>")
    (tmp_path / "t.jinja").write_text(template)
    flags = (f"--from_weight={llama}", f"--chat_template={tmp_path / 't.jinja'}")
    config = opened(*flags).config
    assert config.tokenizer["chat_template"] == template
    path = save(config, tmp_path / "full_sft_32.pth")
    later = opened(f"--from_weight={path}")
    assert later.tokenizer.given_template == template
    assert later.config.tokenizer == config.tokenizer
    assert opened(f"--from_weight={llama}").tokenizer.given_template == ""


# --------------------------------------------------------------------------------------------------
# Shape and context
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, have",
    [("--dim=64", 32), ("--n_layers=3", 2), ("--n_heads=2", 4), ("--n_kv_heads=4", 2)],
)
def test_a_size_that_contradicts_the_weights(llama, flag, have):
    message = refusal(f"--from_weight={llama}", flag)
    assert message.startswith(flag.replace("=", " ")) and f"{llama} has {have}" in message


def test_sizes_that_agree_are_fine_and_those_of_experts_do_not_matter_without(llama):
    args = parse(f"--from_weight={llama}", "--dim=32", "--n_heads=4", "--n_experts=9")
    begun = start.open_start(args, "pretrain")
    assert (args.dim, args.n_layers, args.n_kv_heads, args.use_moe) == (32, 2, 2, 0)
    assert begun.run_dir.name == "full_sft_32" and begun.config.hidden_dim == 48


def test_mixture_and_dense_are_told_apart(tmp_path, tokenizer):
    config = LMConfig(dim=32, n_layers=1, n_heads=4, use_moe=True, vocab_size=len(tokenizer))
    path = save(config, tmp_path / "x.pth")
    assert opened(f"--from_weight={path}").run_dir.name == "full_sft_32_moe"
    assert "--use_moe 0: " in refusal(f"--from_weight={path}", "--use_moe=0")
    assert f"--n_experts 8: {path} has 4" in refusal(f"--from_weight={path}", "--n_experts=8")


def test_without_weights_flags_and_defaults_say_the_shape(tmp_path, tokenizer):
    begun = opened("--dim=64", f"--out_dir={tmp_path}")
    assert begun.path is None and f"there is no {tmp_path / 'pretrain_64.pth'}" in begun.line
    config = LMConfig(dim=64, vocab_size=len(tokenizer))
    config.tokenizer = begun.config.tokenizer
    assert begun.config == config and config.tokenizer["folder"] == "model/minimind_tokenizer"
    assert "n_heads 3" in refusal("--n_heads=3")
    assert "no such weights file" in refusal(f"--out_dir={tmp_path}", "--from_weight=pretrain")
    (tmp_path / "pretrain_64.pth").touch()
    other = f"there is {tmp_path / 'pretrain_64.pth'}: name it as a path, or its width with --dim"
    assert other in refusal(f"--out_dir={tmp_path}", "--from_weight=pretrain")


@pytest.mark.parametrize(
    "flags, context, row",
    [
        ((), 96, 96),
        (("--max_seq_len=40",), 96, 40),
        (("--max_seq_len=100",), 100, 100),
        (("--rope_scaling=yarn:8",), 768, 512),
        (("--rope_scaling=linear:2", "--max_seq_len=100"), 192, 100),
    ],
)
def test_context_and_longest_row(llama, flags, context, row):
    args = parse(f"--from_weight={llama}", *flags)
    config = start.open_start(args, "pretrain").config
    assert (config.max_seq_len, args.max_seq_len) == (context, row)


def test_positions_are_scaled_once(llama, tmp_path):
    config = opened(f"--from_weight={llama}", "--rope_scaling=yarn:4").config
    flag = f"--from_weight={save(config, tmp_path / 'x.pth')}"
    again = opened(flag, "--rope_scaling=yarn:4").config
    assert (again.rope_scaling, again.max_seq_len) == (config.rope_scaling, 384)
    assert opened(flag).config.rope_scaling == config.rope_scaling
    assert "the weights have yarn:4 already" in refusal(flag, "--rope_scaling=linear:2")


def test_what_belongs_to_the_run_is_not_that_of_the_weights(tmp_path, tokenizer):
    config = LMConfig(dim=32, n_heads=4, vocab_size=len(tokenizer), dropout=0.5, aux_loss_alpha=3.0)
    config = opened(f"--from_weight={save(config, tmp_path / 'x.pth')}").config
    assert (config.dropout, config.aux_loss_alpha) == (0.0, LMConfig.aux_loss_alpha)


def test_what_no_flag_says_of_the_shape_is_compared_at_a_resume(llama, tmp_path):
    def identity(folder):
        args = parse(f"--from_weight={folder}")
        start.open_start(args, "pretrain")
        return identity_of({**vars(args), "device": torch.device("cpu")}, 8, "rows")

    other = tmp_path / "llama"
    shutil.copytree(llama, other)
    assert check_identity(identity(llama), identity(other), "x") == {}
    config = json.loads((other / "config.json").read_text())
    theta = next(keys for keys in (config, config.get("rope_parameters")) if "rope_theta" in keys)
    theta["rope_theta"] = 7e3
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the model's rope_theta was 5000.0 and is 7000.0"):
        check_identity(identity(llama), identity(other), "x")


def test_a_run_goes_on_without_the_weights_that_it_started_from(weights, tmp_path):
    absent = f"--from_weight={tmp_path / 'absent.pth'}"
    begun = opened(absent, "--resume=auto", "--dim=32", f"--out_dir={tmp_path}")
    assert begun.config.hidden_dim == 48  # as its own weights say


# --------------------------------------------------------------------------------------------------
# The tokenizer
# --------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_with_both_folders(weights, tmp_path):
    message = refusal(f"--from_weight={weights}", f"--tokenizer_dir={OURS}")
    assert str(OURS) in message and str(tmp_path / "tokenizer") in message


def test_a_copy_of_the_tokenizer_will_do(weights, llama):
    begun = opened(f"--from_weight={weights}", f"--tokenizer_dir={llama}")
    assert begun.config.tokenizer["folder"] == str(llama)


def test_a_tokenizer_that_has_moved(weights, llama, tmp_path):
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    message = refusal(f"--from_weight={weights}")
    assert f"not at {tmp_path / 'tokenizer'} any more" in message and "--tokenizer_dir" in message
    assert opened(f"--from_weight={weights}", f"--tokenizer_dir={tmp_path / 'elsewhere'}").config


def test_a_tokenizer_that_was_changed(weights, tmp_path):
    file = tmp_path / "tokenizer/tokenizer.json"
    file.write_text(file.read_text() + " ")
    assert "was changed" in refusal(f"--from_weight={weights}")


def test_a_template_that_was_changed_in_its_folder_does_not_change_the_run(weights, tmp_path):
    file = tmp_path / "tokenizer/chat_template.jinja"
    before = file.read_text()
    file.write_text("{{ messages[0].content }}")
    begun = opened(f"--from_weight={weights}")
    assert begun.tokenizer.given_template == before == begun.config.tokenizer["chat_template"]


def test_a_record_that_is_none(weights):
    path = weights.with_suffix(".json")
    path.write_text(path.read_text().replace('"sha256"', '"sha1"'))
    assert '"tokenizer" must have folder, sha256, chat_template' in refusal(
        f"--from_weight={weights}"
    )


def test_older_weights_without_a_record(tmp_path, llama, tokenizer):
    path = save(LMConfig(dim=32, n_heads=4, vocab_size=len(tokenizer)), tmp_path / "x.pth")
    assert opened(f"--from_weight={path}").config.tokenizer["folder"] == "model/minimind_tokenizer"
    message = refusal(f"--from_weight={path}", f"--tokenizer_dir={llama}")
    assert f"the model {len(tokenizer)}" in message
    small = save(LMConfig(dim=32, n_heads=4, vocab_size=300), tmp_path / "small.pth")
    assert "the model 300" in refusal(f"--from_weight={small}")


def test_a_folder_without_a_tokenizer_needs_one(llama, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(llama, folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(f"--from_weight={folder}")
    assert opened(f"--from_weight={folder}", f"--tokenizer_dir={llama}").config


def test_a_new_student_has_the_vocabulary_of_its_teacher(llama):
    args = parse("--from_weight=none", "--dim=64", stage=train_distillation)
    config = start.open_start(args, "pretrain", teacher=llama).config
    assert (config.dim, config.vocab_size, config.qk_norm) == (64, 1024, True)
    assert config.tokenizer["folder"] == str(llama)


def test_adapters_and_hub_names_without_a_network(tmp_path, weights):
    text = weights.with_suffix(".json").read_text()
    lora = tmp_path / "lora_32.pth"
    shutil.copy(weights, lora)
    lora.with_suffix(".json").write_text(text.rstrip()[:-1] + ', "lora": {"rank": 8}}')
    assert "an adapter" in refusal(f"--from_weight={lora}")
    message = refusal("--from_weight=someone/model")
    assert message.startswith("--from_weight someone/model: no such folder")


def test_every_stage_takes_the_tokenizer_of_its_weights(weights):
    args = parse(f"--from_weight={weights}", stage=train_dpo)
    start.open_start(args, "full_sft")
    assert args.tokenizer_dir == str(weights.parent / "tokenizer")


def test_a_run_goes_on_though_what_it_started_from_was_moved(llama, tmp_path):
    folder, kept = tmp_path / "start", tmp_path / "tokenizer"
    shutil.copytree(llama, folder)
    data = write_jsonl(tmp_path / "chats.jsonl", [chat("a", "b")] * 8)
    words = ["trainer/train_full_sft.py", f"--data_path={data}", f"--out_dir={tmp_path}"]
    words += [f"--from_weight={folder}", "--device=cpu", "--save_interval=1", "--batch_size=4"]
    run_ranks(*words, "--max_steps=1")
    folder.rename(kept)
    words += ["--resume=auto", "--resume_with_changes", "--max_steps=2"]
    assert "say with --tokenizer_dir" in run_ranks(*words, code=2)
    printed = run_ranks(*words, f"--tokenizer_dir={kept}")
    assert "step_00000001" in printed and (tmp_path / "full_sft_32.pth").is_file()
