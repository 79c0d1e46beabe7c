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

model="--dim 192 --n_layers 4 --n_heads 6 --n_kv_heads 3 --max_seq_len 256"
dtype=$("$python" -c "import torch; from runtime.optim import fast_dtype; print(fast_dtype(torch.device('cpu')))")
recipe="--dtype ${dtype#torch.} --optimizer muon --learning_rate 3e-3 --batch_size 8 --save_interval 0 --log_interval 50"
export GOMP_SPINCOUNT=2000  # threads that wait soon let others run: on a busy machine the default is ten times slower
say() { printf '\n=== %s\n' "$*"; }
begin=$SECONDS

say "1/4 pretraining: the words, facts and patterns of dataset/demo/pretrain.jsonl"
"$python" trainer/train_pretrain.py $model $recipe --epochs 3 "$@"

say "2/4 supervised fine-tuning: the conversations of dataset/demo/sft.jsonl"
"$python" trainer/train_full_sft.py $model $recipe --epochs 5 "$@"

say "3/4 exact match on prompts that training has never seen"
"$python" eval_model.py --eval_file dataset/demo/held_out.jsonl

say "4/4 a chat"
for prompt in "Who are you?" "你是谁?" "What is 47 + 38?" 'How do you say "water" in Chinese?' "Reverse the letters: c a t s"; do
    echo "> $prompt"
    "$python" eval_model.py --prompt "$prompt"
done
minutes=$(((SECONDS - begin) / 60)) seconds=$(((SECONDS - begin) % 60))
say "done in $minutes min $seconds s. Chat with it: .venv/bin/python eval_model.py"
