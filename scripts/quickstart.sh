#!/usr/bin/env bash
# From a fresh clone to a chat model: pretrains, fine-tunes, scores and asks a small model, on a CPU, in minutes.
#
#   bash scripts/quickstart.sh
#
# Makes .venv first where there is none. What it trains goes to out/; run it again and it starts anew. Flags behind it
# go to both training scripts.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh requirements.txt

model="--dim 192 --n_layers 6 --n_heads 3 --n_kv_heads 3 --max_seq_len 256"
dtype=$("$python" -c "import torch; from runtime.device import fast_dtype; print(fast_dtype(torch.device('cpu')))")
recipe="--dtype ${dtype#torch.} --optimizer muon --learning_rate 4e-3 --lr_schedule linear --batch_size 32 --save_interval 0 --log_interval 50"
export GOMP_SPINCOUNT=30000  # threads that wait soon let others run: on a busy machine the default is ten times slower
say() { printf '\n=== %s\n' "$*"; }
begin=$SECONDS

say "1/5 conversations to learn from: dataset/make_demo.py writes thirteen times those of dataset/demo"
"$python" dataset/make_demo.py --out_dir out/demo --scale 13

say "2/5 pretraining: words, facts and patterns"
"$python" trainer/train_pretrain.py $model $recipe --data_path out/demo/pretrain.jsonl --tokenizer_dir dataset/demo/tokenizer "$@"

say "3/5 supervised fine-tuning: conversations"
"$python" trainer/train_full_sft.py $model $recipe --data_path out/demo/sft.jsonl "$@"

say "4/5 exact match on prompts that training has never seen; then what newcomers typed, in words of their own"
"$python" eval_model.py --eval_file dataset/demo/held_out.jsonl
"$python" eval_model.py --eval_file dataset/demo/newcomer.jsonl

say "5/5 a chat, about a name and numbers that were drawn just now"
syllables=(ka zo mi lu ren ta vel shi bo gra nu fe)
name=${syllables[RANDOM % 12]}${syllables[RANDOM % 12]}${syllables[RANDOM % 12]}
"$python" eval_model.py <<END
hello
My name is ${name^}.
capital of France
what's $((RANDOM % 900 + 100)) plus $((RANDOM % 90 + 10))?
What is my name?
/clear
how do you say "water" in Chinese?
Tell me a story about a cat
请计算：$((RANDOM % 90 + 10)) × $((RANDOM % 90 + 10)) = ?
END
minutes=$(((SECONDS - begin) / 60)) seconds=$(((SECONDS - begin) % 60))
say "done in $minutes min $seconds s. Chat with it: .venv/bin/python eval_model.py"
