"""Run texts through llama.cpp.

    python llama_cpp_worker.py FILE.gguf FOLDER < texts.json

Writes the logits (T, vocab) of text N to FOLDER/N.npy, and prints all token ids as JSON. Needs
nothing of the project: it may run in a Python that has llama_cpp alone.
"""

import json
import sys

import numpy as np


def main() -> None:
    import llama_cpp
    from llama_cpp import llama_cpp as api

    path, folder = sys.argv[1:]
    texts = json.load(sys.stdin)
    defaults = api.llama_model_default_params

    def without_repacking():
        """Matrices as they are in the file: packed for AMX they crash on some machines."""
        params = defaults()
        params.use_extra_bufts = False
        return params

    api.llama_model_default_params = without_repacking
    model = llama_cpp.Llama(
        path,
        n_ctx=0,  # that of the file
        n_batch=4096,
        n_ubatch=4096,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,  # float16 by default
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    all_ids = []
    for n, text in enumerate(texts):
        ids = model.tokenize(text.encode(), add_bos=True, special=True)
        model.reset()
        model.eval(ids[: model.n_ctx()])
        np.save(f"{folder}/{n}.npy", model.scores[: model.n_tokens].astype(np.float32))
        all_ids.append(ids)
    print(json.dumps(all_ids))


if __name__ == "__main__":
    main()
