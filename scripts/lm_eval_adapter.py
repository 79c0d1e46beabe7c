"""Measure a model with lm-eval, EleutherAI's evaluation harness: its tasks, or YAML of your own.

Reads weights as eval_model.py does. The figures are those of lm-eval's own `hf` model on the same
weights in Hugging Face's format, without the export. Most of lm-eval's tasks are downloaded on
first use. Needs: pip install lm-eval

    python scripts/lm_eval_adapter.py --model full_sft --tasks arc_easy hellaswag --limit 100
    python scripts/lm_eval_adapter.py --model out/pretrain_512.pth --tasks my_tasks/
    python scripts/lm_eval_adapter.py --model full_sft --tasks ceval-valid --apply_chat_template 1
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import yaml

from dataset.progress import count_bar
from model.generate_batch import generate_batch
from model.newest import newest_weights
from model.sampling import make_sampler
from runtime.chat_model import ChatModel, open_chat_model, open_device
from runtime.device import keep_memory
from runtime.flags import check_flags, usage_error
from runtime.process import exits
from runtime.scoring.likelihood import Continuation, score_continuations
from runtime.scoring.score import check_writable, write_whole

try:
    from lm_eval.api.model import TemplateLM
except ImportError:
    TemplateLM = object

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")  # of `make_sampler`
KNOWN = {*SAMPLING, "do_sample", "until", "max_gen_toks"}


class HarnessModel(TemplateLM):
    """A `ChatModel`, opened raw, as lm-eval asks models.

    Text is encoded by the tokenizer itself, as lm-eval does: what spells a control token is one.

    Args:
        batch_size: prompts that are answered at once.
    """

    max_gen_toks = 256  # where a task says nothing; lm-eval's own

    def __init__(self, chat_model: ChatModel, batch_size: int):
        super().__init__()
        self.model, self.max_length = chat_model.model, chat_model.context
        self.tokenizer = chat_model.tokenizer.loaded
        self.batch_size, self._device = batch_size, chat_model.model.lm_head.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        flags = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **flags)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, up to where the assistant is to speak or goes on to."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ----------------------------------------------------------------------------------------------
    # Log-probabilities
    # ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        parts = [self.fit(context, ids) for _, context, ids in requests]
        with count_bar(len(parts), "log-probabilities", " texts", disable=disable_tqdm) as bar:
            return [tuple(part) for part in score_continuations(self.model, parts, bar.update)]

    def fit(self, context: Sequence[int], ids: Sequence[int]) -> Continuation:
        """A continuation whose context loses its beginning where it is too long.

        Raises:
            ValueError: the continuation alone is longer than the model's context.
        """
        if len(ids) > self.max_length:
            sizes = f"{len(ids)} tokens, the context of the model is {self.max_length}"
            raise ValueError(f"a continuation makes {sizes}")
        return Continuation(context[-(self.max_length + 1 - len(ids)) :], ids)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            parts = [make_disjoint_window(window) for window in rolling]
            windows += [(None, *part) for part in parts]
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # ----------------------------------------------------------------------------------------------
    # Replies
    # ----------------------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The replies to prompts, up to the stop strings that each request names."""
        from lm_eval.models.utils import normalize_gen_kwargs

        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if unknown := sorted(options.keys() - KNOWN):
                raise ValueError(f"not supported in generation_kwargs: {', '.join(unknown)}")
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(number)
        replies = [""] * len(requests)
        with count_bar(len(requests), "replies", " replies", disable=disable_tqdm) as bar:
            for options, numbers in groups.items():
                prompts = [requests[number].args[0] for number in numbers]
                texts = self.reply_to(prompts, json.loads(options), bar)
                for number, text in zip(numbers, texts, strict=True):
                    replies[number] = text
        return replies

    def reply_to(self, texts: list[str], options: dict, bar) -> list[str]:
        """The replies to prompts whose generation_kwargs are the same.

        A prompt loses its beginning where the reply would not fit, but at most half of the context
        is left to the reply.
        """
        longest = min(options["max_gen_toks"], self.max_length // 2)
        room = self.max_length - longest
        prompts = [self.tok_encode(text)[-room:] for text in texts]
        stops = [stop for stop in options["until"] if stop]
        tail = 4 + 4 * max(map(len, stops), default=0)  # tokens that a stop string may have
        sampling = {name: options[name] for name in SAMPLING if name in options}
        sample = make_sampler(prompts, self.model.config.vocab_size, self._device, **sampling)
        stopped = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)

        def sampler(logits, row, position):
            return torch.where(stopped[row], self.eot_token_id, sample(logits, row, position))

        replies: list[list[int]] = [[] for _ in prompts]
        limits, eos = [longest] * len(prompts), self.eot_token_id
        steps = generate_batch(
            self.model, prompts, limits, sampler, eos, batch_size=self.batch_size
        )
        for row, _, token in steps:
            for number, token_id in zip(row.tolist(), token.tolist(), strict=True):
                reply = replies[number]
                reply.append(token_id)
                bar.update(token_id == eos or len(reply) == longest)
                if stops:
                    end = self.tokenizer.decode(reply[-tail:])
                    stopped[number] = any(stop in end for stop in stops)
        texts = [self.tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def find_tasks(words: list[str]):
    """The tasks that --tasks names, and lm-eval's TaskManager that knows them.

    Args:
        words: names of lm-eval's, .yaml files, or folders of such.

    Raises:
        ValueError: there is no such task.
    """
    from lm_eval.tasks import TaskManager

    folders = [word for word in words if Path(word).is_dir()]
    names = []
    for folder in folders:
        own = TaskManager(include_path=folder, include_defaults=False).all_subtasks
        if not own:
            raise ValueError(f"--tasks {folder}: there is no task in this folder (.yaml)")
        names += own
    others = [word for word in words if word not in folders]
    files = [word for word in others if word.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_path=folders, include_defaults=len(others) > len(files))
    for word in others:
        known = Path(word).is_file() if word in files else manager.match_tasks([word])
        if not known:
            fault = "neither a task of lm-eval (python -m lm_eval ls tasks), nor a file or folder"
            raise ValueError(f"--tasks {word}: {fault}")
    return names + others, manager


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = usage_error
    add = parser.add_argument
    add("--model", default="full_sft", help="stage (its newest run), run, path or folder")
    add("--tasks", nargs="+", required=True, help="names of lm-eval, .yaml files, or folders")
    add("--limit", type=int, help="so many rows of each task (default: all)")
    add("--num_fewshot", type=int, help="examples before each question (default: the task's)")
    shown = "1: prompts are user turns, in the model's chat layout"
    add("--apply_chat_template", type=int, choices=(0, 1), default=0, help=shown)
    add("--batch_size", type=int, default=64, help="prompts answered at once")
    add("--lora", help="adapter on top of these weights: stage, run or path")
    add("--out_dir", default=str(ROOT / "out"), help="where weights are looked for")
    add("--tokenizer_dir", help="tokenizer folder (default: that of the weights)")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    dtypes = ("float32", "float16", "bfloat16")
    add("--dtype", choices=dtypes, help="default: bfloat16 on GPU")
    add("--seed", type=int, default=42, help="seed of few-shot examples and sampling")
    add("--eval_out", help="write the figures and every row's answer to this file, as JSON")
    args = parser.parse_args()
    check_flags(vars(args))
    return args


def main() -> int:
    # 1. Flags
    args = parse_args()
    if TemplateLM is object:
        raise ValueError("this script needs lm-eval: pip install lm-eval")
    if args.eval_out:
        check_writable(args.eval_out)
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    # 2. Model and tasks
    device, path = open_device(args.device), newest_weights(args.model, args.out_dir, "--model")
    adapter = newest_weights(args.lora, args.out_dir, "--lora") if args.lora else None
    options = {"dtype": args.dtype, "lora": adapter, "tokenizer_dir": args.tokenizer_dir}
    chat_model = open_chat_model(path, device, raw=True, **options)
    model = HarnessModel(chat_model, args.batch_size)
    names, manager = find_tasks(args.tasks)

    # 3. Measure
    keep_memory()
    try:
        results = simple_evaluate(
            model,
            tasks=names,
            task_manager=manager,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            apply_chat_template=bool(args.apply_chat_template),
            torch_random_seed=args.seed,
            fewshot_random_seed=args.seed,
            log_samples=bool(args.eval_out),
        )
    except (OSError, ValueError, yaml.YAMLError) as error:  # of tasks: also data that is not there
        reason = " ".join(str(error).split())
        raise ValueError(f"--tasks {' '.join(args.tasks)}: {reason}") from None
    print(make_table(results))
    if args.eval_out:
        kept = {name: results[name] for name in ("results", "samples")}
        text = json.dumps(kept, ensure_ascii=False, indent=1, default=str)
        write_whole(f"{text}\n", args.eval_out)
    return 0


if __name__ == "__main__":
    exits.run(main)
