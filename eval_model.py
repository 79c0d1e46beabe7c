"""Chat with a model in the terminal, or score it on a file of prompts with known answers.

Reads the weights (out/full_sft_512.pth), the configuration beside them (out/full_sft_512.json) and
the tokenizer. Without flags it takes the newest SFT weights in out/. Replies are streamed; text
that you type is always text, also where it spells a control token.

    python eval_model.py                                                # chat; /clear forgets, /exit leaves
    python eval_model.py --prompt "Who are you?"                        # one reply and nothing else
    printf 'hi\\nwho are you?\\n' | python eval_model.py                  # a conversation from a pipe
    python eval_model.py --weight pretrain --raw 1 --prompt "Once upon" # continue plain text, without the chat layout
    python eval_model.py --eval_file dataset/demo/held_out.jsonl        # a table of right answers
    python eval_model.py --text_file README.md                          # bits per byte
    python eval_model.py --lora lora                                    # with the adapter of train_lora.py
"""

import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import torch

from model.generate import stream_text
from model.newest import newest_weights
from runtime.chat_model import ChatModel, open_chat_model, open_device
from runtime.flags import check_flags, usage_error
from runtime.process import exits
from runtime.process.terminal import prepare_streams


def write(text: str) -> None:
    print(text, end="", flush=True)


def clean(text: str) -> str:
    """Text as typed, whatever the locale: undecodable bytes arrive as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def stream_reply(model: ChatModel, prompt: list[int], name: str = "") -> tuple[list[int], bool]:
    """Print one reply as it comes, behind a name; its ids, and whether Ctrl-C cut it short."""
    reply, stopped = [], []

    def stop(*_) -> None:  # an exception at any instant could get lost inside the model
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    before = signal.signal(signal.SIGINT, stop)
    write(name + model.opening)
    for piece in stream_text(model.model, model.decode, prompt, reply, **model.sampling):
        write(piece)
        if stopped:
            break
    signal.signal(signal.SIGINT, before)
    write(" (stopped)\n" if stopped else "\n")
    return reply, bool(stopped)


def chat(model: ChatModel, name: str, system: list[dict]) -> None:
    """The conversation, until /exit, the end of the input, or Ctrl-C twice."""
    from runtime.conversation import Conversation

    conversation = Conversation(model, system)
    size = f"{sum(p.numel() for p in model.model.parameters()) / 1e6:.1f} M parameters"
    leave = "/clear forgets, /exit leaves"
    write(f"{name}: {size}, context of {model.context} tokens. {leave}\n")
    for prompt in conversation.prompts():
        reply, stopped = stream_reply(model, prompt, "bot> ")
        conversation.add(reply, stopped)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = usage_error
    what = parser.add_argument_group("what to do (without these: chat)")
    what.add_argument("--prompt", help="print the reply to this text and exit")
    what.add_argument("--raw", type=int, choices=(0, 1), default=0, help="1: continue plain text")
    rows = "score on its rows: with choices, answer or accept"
    what.add_argument("--eval_file", help=rows)
    what.add_argument("--text_file", help="bits per byte of this text")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--weight", default="full_sft", help="stage (its newest run), run, path or folder"
    )
    model.add_argument("--lora", help="adapter on top of these weights: stage, run or path")
    model.add_argument("--out_dir", default=str(ROOT / "out"), help="where weights are looked for")
    model.add_argument("--tokenizer_dir", help="tokenizer folder (default: that of the weights)")
    model.add_argument("--chat_template", help="Jinja file, instead of the tokenizer's own")
    scaling = "longer context: linear, llama3 or yarn:4"
    model.add_argument("--rope_scaling", metavar="KIND:FACTOR", help=scaling)
    model.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    spread = "auto: a model that no device holds, over GPUs, CPU memory and disk"
    model.add_argument("--device_map", choices=("auto",), help=spread)
    most = "for --device_map, by default what is free: 0=20GiB cpu=64GiB"
    model.add_argument("--max_memory", nargs="+", metavar="DEVICE=SIZE", help=most)
    dtypes = ("float32", "float16", "bfloat16")
    model.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on GPU")
    reply = parser.add_argument_group("reply")
    reply.add_argument("--system", default="", help="system message")
    think = "1: think first, 0: do not (default: as the chat template does)"
    reply.add_argument("--thinking", type=int, choices=(0, 1), help=think)
    reply.add_argument("--temperature", type=float, default=0.0, help="0: take the likeliest token")
    reply.add_argument("--top_k", type=int, default=0, help="among so many tokens (0: all)")
    reply.add_argument("--top_p", type=float, default=1.0, help="among those of this probability")
    reply.add_argument("--repetition_penalty", type=float, default=1.0, help="1: none")
    reply.add_argument("--max_new_tokens", type=int, default=256, help="longest reply in tokens")
    reply.add_argument("--seed", type=int, default=42, help="seed of everything random")
    score = parser.add_argument_group("scoring (greedy, whatever the flags above)")
    score.add_argument("--batch_size", type=int, default=64, help="prompts answered at once")
    score.add_argument("--eval_out", help="write every reply to this file, as JSON lines")
    score.add_argument("--show_wrong", type=int, default=0, metavar="N", help="print N of them")
    args = parser.parse_args()
    check_flags({k: v for k, v in vars(args).items() if k != "temperature" or v != 0})
    tasks = ("prompt", "eval_file", "text_file")
    given = [name for name in tasks if getattr(args, name) is not None]
    for name, good, must in (
        ("prompt", args.prompt is None or args.prompt.strip(), "not be empty"),
        ("raw", not args.raw or given, "come with --prompt or --eval_file"),
        ("eval_file", not args.eval_file or len(given) == 1, "come alone"),
        ("text_file", not args.text_file or len(given) == 1, "come alone"),
        ("max_memory", not args.max_memory or args.device_map, "come with --device_map auto"),
        ("lora", not (args.lora and args.device_map), "not come with --device_map: merge it first"),
    ):
        if not good:
            raise ValueError(f"--{name} {getattr(args, name)}: must {must}")
    return args


def open_model(args: argparse.Namespace, path: Path, device: torch.device) -> ChatModel:
    names = ("dtype", "tokenizer_dir", "chat_template", "rope_scaling", "device_map", "max_memory")
    options = {name: getattr(args, name) for name in names}
    options["lora"] = newest_weights(args.lora, args.out_dir, "--lora") if args.lora else None
    options["thinking"] = None if args.thinking is None else bool(args.thinking)
    flags = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
    sampling = {flag: getattr(args, flag) for flag in flags}
    model = open_chat_model(
        path, device, raw=bool(args.raw or args.text_file), sampling=sampling, **options
    )
    generator = torch.Generator(model.model.lm_head.weight.device)
    model.sampling["generator"] = generator.manual_seed(args.seed)
    return model


def main() -> int:
    # 1. Flags and device
    args = parse_args()
    exits.end_with_reader()
    if args.eval_file and args.eval_out:
        from runtime.scoring.score import check_writable

        check_writable(args.eval_out)
    if not os.environ.get("PYTHONIOENCODING"):
        prepare_streams("utf-8")  # whatever the locale
    device = open_device(args.device)

    # 2. Model and tokenizer
    path = newest_weights(args.weight, args.out_dir)
    model = open_model(args, path, device)
    system = [{"role": "system", "content": clean(args.system)}] if args.system else []

    # 3. Score, answer once, or chat
    if args.eval_file:
        from runtime.scoring.score import score

        score(model, Path(args.eval_file), args.batch_size, args.show_wrong, args.eval_out)
    elif args.text_file:
        from runtime.scoring.text import score_text

        score_text(model, Path(args.text_file))
    elif args.prompt is not None:
        text = clean(args.prompt)
        question = {"role": "user", "content": text}
        ids = model.plain(text) if args.raw else model.encode([*system, question])
        _, stopped = stream_reply(model, model.check(ids))
        return 130 if stopped else 0
    else:
        chat(model, path.name if path.is_dir() else path.stem, system)
    return 0


if __name__ == "__main__":
    exits.run(main)
